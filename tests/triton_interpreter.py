"""Kernels under Triton's interpreter: import this before anything that imports triton.

numpy has no bfloat16, so the interpreter keeps its bits in uint16, and multiplies those bits as
integers in ``tl.dot``. Products of bfloat16 are exact in float32, which is what a GPU adds up. It
also cuts float32 off to bfloat16, where a GPU rounds to nearest.

Every call from one kernel function to another makes the interpreter look through all of
triton.language for what it has to replace, a third of a test's time. Once in a launch is enough.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def _numbers(x: TensorHandle) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    return TensorHandle(np.matmul(_numbers(a), _numbers(b)) + d.data, d.dtype.scalar)


def _cast(self, src, dst_type):  # type: ignore[no-untyped-def]
    of, to = src.dtype.scalar, dst_type.scalar
    if (of, to) == (tl.bfloat16, tl.float32):
        return TensorHandle(_numbers(src), to)
    if (of, to) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = bits + (0x7FFF + (bits >> 16 & 1))
        bits = np.where(np.isnan(src.data), bits | 0x400000, rounded)
        return TensorHandle((bits >> 16).astype(np.uint16), to)
    return _cast_others(self, src, dst_type)


_cast_others = InterpreterBuilder.cast_impl
InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _cast, _dot

_replace, _launch = interpreter._patch_lang, GridExecutor.__call__
_replaced: set[str] = set()


@functools.cache
def _languages(fn: Callable[..., Any]) -> frozenset[str]:
    """Which of the two modules that the interpreter replaces things in a function can see."""
    values = list(fn.__globals__.values())
    return frozenset(m.__name__ for m in (tl, tl.core) if any(v is m for v in values))


def _replace_once(fn: Callable[..., Any]) -> Any:
    if _languages(fn) <= _replaced:
        return None  # what a launch undoes at its end is in the scope of its first call
    _replaced.update(_languages(fn))
    return _replace(fn)


def _first_replace(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
    _replaced.clear()
    _launch(self, *args, **kwargs)


interpreter._patch_lang, GridExecutor.__call__ = _replace_once, _first_replace

import triton_sanitizer  # noqa: E402, F401  (last: it watches launches as they are now)
