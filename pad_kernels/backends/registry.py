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
def _load() -> tuple[ModuleType | None, str]:
    # torch first: it loads the OpenMP runtime whose thread pool the extension then shares.
    importlib.import_module("torch")
    try:
        return importlib.import_module("pad_kernels._C"), ""
    except ImportError as error:
        note = os.path.join(os.path.dirname(os.path.dirname(__file__)), "_native_build.txt")
        if os.path.exists(note):
            with open(note, encoding="utf-8") as file:
                return None, file.read().strip()
        return None, f"the compiled module is missing: {error}"


def native() -> ModuleType | None:
    """The compiled extension, or None where it could not be built or loaded."""
    return _load()[0]


def native_error() -> str:
    """Why :func:`native` is None; empty when it is there."""
    return _load()[1]


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, instruction by instruction, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _version(*names: str) -> str:
    """Of the first of these distributions that is installed."""
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
