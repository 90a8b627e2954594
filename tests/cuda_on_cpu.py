"""The CUDA kernels on a CPU: the same sources, compiled by the C++ compiler.

A kernel asks its team of threads who it is and never the hardware (csrc/cuda/team.h), so blocks
also run two at a time on a few threads with a barrier each. Modules and cubins are kept under
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
SOURCES = sorted((CSRC / "cuda").glob("*.c*"))


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


def compiler() -> str:
    """The C++ compiler; the test is skipped where there is none."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++ to compile the sources with")
    return found


def build(name: str, sources: list[Path], flags: list[str], kind: str) -> Path:
    """An extension module made of ``sources``; ``flags`` are for all but the bindings."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{x}" for x in (pybind11.get_include(), sysconfig.get_path("include"))]
    common = [compiler(), "-std=c++20", "-fPIC", "-pthread", "-fvisibility=hidden"]
    common += [f"-DPAD_MODULE={NAME}", *includes]

    def compile_all(folder: Path) -> None:
        made = [folder / f"{source.parent.name}-{source.name}.o" for source in sources]

        def one(source: Path, object_: Path) -> None:
            # Bindings hand arguments on and are slow to compile.
            own = ["-O0"] if "bindings" in source.name else ["-O1", *flags]
            run([*common, *own, "-x", "c++", "-c", source, "-o", object_])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, sources, made))
        runtime = [flag for flag in flags if flag.startswith("-fsanitize")]
        # The module's own functions come first: torch has brought an OpenMP runtime along.
        link = [compiler(), "-shared", "-pthread", "-Wl,-Bsymbolic", *runtime, *made]
        run([*link, "-o", folder / f"{name}.so"])

    recipe = " ".join([name, *flags, *(path.read_text("utf-8") for path in sources)])
    return cached(kind, recipe, compile_all) / f"{name}.so"


def imported(path: Path, name: str) -> Any:
    """The module in that file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load() -> Any:
    """The module; skips where there is no compiler."""
    return imported(build(NAME, SOURCES, [], "cuda-on-cpu"), NAME)


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
