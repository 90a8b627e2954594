"""Matrix products for gradients: in float32 from half-precision operands, and in fast blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of two matrices, in float32 if that is what ``out`` is."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


#: oneDNN multiplies bfloat16 [rows, V] by [V, H] half as fast when rows > 256 and H is below this
#: and not small beside the rows; in blocks of 256 rows it is at most 15 % slower than at its best.
_NARROW, _NARROW_ROWS = 896, 256


def multiply_in_blocks(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of two matrices, in the blocks of rows that the library multiplies fastest."""
    step = left.shape[0]
    if left.dtype == torch.bfloat16 and left.is_cpu and right.shape[1] < _NARROW:
        # A transposed left (a weight gradient's) is not slowed down by its many rows.
        step = _NARROW_ROWS if left.stride(1) == 1 else step
    for start in range(0, left.shape[0], max(step, 1)):
        rows = slice(start, start + step)
        multiply(left[rows], right, out[rows])
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor, part: Tensor | None) -> None:
    """Total += left @ right, through ``part`` where the product has another dtype."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        assert part is not None
        total += multiply_in_blocks(left, right, part)
