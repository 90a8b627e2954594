"""Which dtype computes what. One place for the numeric policy of docs/design.md."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, values and gradient accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the matrix products' operands for inputs of ``dtype``.

    float16 products run in float32 on cast blocks: float16 cannot hold a flat softmax's gradient
    (1/V is subnormal from V = 16k on), and CPUs are no faster in float16.
    """
    return torch.float32 if dtype == torch.float16 else dtype
