"""The CUDA kernels on a CPU: the same sources, compiled by the C++ compiler.

A kernel asks its team of threads who it is and never the hardware (csrc/cuda/team.h), so blocks
also run one after the other on a few threads with a barrier. Module and cubins are kept under
build/, by the hash of what they were made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pad_kernels.backends import registry, streams
from pad_kernels.backends.cuda import CudaBackend
from pad_kernels.sequence import gpu

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
NAME = "_cuda_on_cpu"


def cached(kind: str, recipe: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` has filled from csrc/ as it is, and from a recipe."""
    digest = hashlib.sha256(recipe.encode())
    for path in sorted(CSRC.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / f"{kind}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        for old in folder.parent.glob(f"{kind}-*"):
            shutil.rmtree(old, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
        make(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return folder


def run(command: list[Any]) -> str:
    """Everything that a command prints; the test fails where it does."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _compile(compiler: str, includes: list[str], folder: Path) -> None:
    flags = ["-std=c++20", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden"]
    flags += [f"-DPAD_MODULE={NAME}", *(f"-I{path}" for path in includes)]
    sources = sorted((CSRC / "cuda").glob("*.c*"))
    made = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            [compiler, *flags, "-x", "c++", "-c", source, "-o", object_]
            for source, object_ in zip(sources, made, strict=True)
        ]
        list(pool.map(run, jobs))
    run([compiler, "-shared", "-pthread", *made, "-o", folder / f"{NAME}.so"])


def load() -> Any:
    """The module; skips where there is no compiler."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA sources with")
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    folder = cached("cuda-on-cpu", NAME, lambda to: _compile(compiler, includes, to))
    spec = importlib.util.spec_from_file_location(NAME, folder / f"{NAME}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def in_place_of_a_gpu(module: Any) -> Iterator[None]:
    """Whatever would run on CUDA tensors runs on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "cuda", lambda: module)
        patch.setattr(registry, "cuda_error", lambda device=0: "")
        patch.setattr(streams, "current_stream", lambda device: contextlib.nullcontext(0))
        patch.setattr(CudaBackend, "devices", ("cpu",))
        patch.setattr(gpu, "DEVICE", "cpu")
        yield
