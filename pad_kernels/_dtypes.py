"""Which dtype computes what. One place for the numeric policy of docs/design.md."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, values and gradient accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Dtype of the matrix products' operands for inputs of ``dtype`` on a type of device.

    On a CPU float16 products run in float32 on cast blocks, and are no slower. A GPU multiplies
    float16 and adds up in float32; what a flat softmax's gradient then needs, see
    ``GradientBuffers.operand``.
    """
    return torch.float32 if dtype == torch.float16 and device != "cuda" else dtype


def product_dtype(gemm: torch.dtype) -> torch.dtype:
    """Dtype that a gradient's products of ``gemm`` operands are written in.

    float16 has not the range: a sum over rows may overflow whose mean does not.
    """
    return torch.float32 if gemm == torch.float16 else gemm


def without_autocast(device: torch.device) -> torch.autocast:
    """Where the body of an op runs: it casts block by block, to what its recipe says."""
    return torch.autocast(device.type, enabled=False)
