"""Which backends there are, and why one is missing."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType


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
