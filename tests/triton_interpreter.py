"""Kernels under Triton's interpreter: import this before anything that imports triton.

numpy has no bfloat16, so the interpreter keeps its bits in uint16, and multiplies those bits as
integers in ``tl.dot``. Products of bfloat16 are exact in float32, which is what a GPU adds up.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _numbers(x: TensorHandle) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    return TensorHandle(np.matmul(_numbers(a), _numbers(b)) + d.data, d.dtype.scalar)


InterpreterBuilder.create_dot = _dot
