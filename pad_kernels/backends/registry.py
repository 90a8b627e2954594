"""Which backends there are, and why one is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType

#: The oldest Triton whose language has what the kernels use.
TRITON_LEAST = (3, 6)
#: The oldest GPU that they are built for: Ampere.
CAPABILITY_LEAST = (8, 0)


@functools.cache
def _load(name: str, reason_file: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or why it is missing: what its build has left in a file, if it has."""
    # torch first: it loads the OpenMP runtime whose thread pool the extension then shares.
    importlib.import_module("torch")
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        note = os.path.join(os.path.dirname(os.path.dirname(__file__)), reason_file)
        if os.path.exists(note):
            with open(note, encoding="utf-8") as file:
                return None, file.read().strip()
        return None, f"the compiled module is missing: {error}"


def native() -> ModuleType | None:
    """The compiled extension, or None where it could not be built or loaded."""
    return _load("pad_kernels._C", "_native_build.txt")[0]


def native_error() -> str:
    """Why :func:`native` is None; empty when it is there."""
    return _load("pad_kernels._C", "_native_build.txt")[1]


def cuda() -> ModuleType | None:
    """The extension compiled by nvcc, or None. It loads on machines without a GPU too."""
    return _load("pad_kernels._cuda", "_cuda_build.txt")[0]


@functools.cache
def cuda_error(device: int = 0) -> str:
    """Why no kernel of :func:`cuda` can run on that GPU; empty when they can."""
    module, reason = _load("pad_kernels._cuda", "_cuda_build.txt")
    return reason if module is None else str(module.device_error(device))


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, instruction by instruction, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _version(*names: str) -> str:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0.0"


@functools.cache
def triton_error() -> str:
    """Why there are no Triton kernels on this machine; empty when there are. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = _version("triton", "pytorch-triton")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < TRITON_LEAST:
        return f"triton {version} is too old: {'.'.join(map(str, TRITON_LEAST))} or later is needed"
    if interpreting():
        return ""
    cuda = importlib.import_module("torch").cuda
    if not cuda.is_available():
        return "torch finds no CUDA device"
    if (found := cuda.get_device_capability()) < CAPABILITY_LEAST:
        return f"the GPU is sm_{found[0]}{found[1]}, and sm_80 or later is needed"
    return ""
