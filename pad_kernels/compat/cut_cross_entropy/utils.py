"""What code around the loss imports from ``cut_cross_entropy.utils``: the z-loss, a soft cap."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels._checks import FLOATS, IDS, check_integer, check_reduction, check_tensor
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.compat._arguments import check_shift
from pad_kernels.compat.cut_cross_entropy.constants import IGNORE_INDEX


def compute_z_loss(
    lse: Tensor,
    targets: Tensor | None = None,
    shift: bool | int = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """Square of the log normalisers that ``linear_cross_entropy(return_lse=True)`` returns.

    Args:
        lse: [..., T - shift] floating point.
        targets: [..., T] integer as given to the loss, to leave out ignored rows; None counts all.
        shift: as given to the loss.
        ignore_index: label of rows that do not count.
        reduction: "mean" over the rows that count, "sum" or "none".

    Returns:
        0-d, or for "none" like ``lse`` with 0 where ignored; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> compute_z_loss(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([5, -100, 7]))
        tensor(10.)
    """
    check_reduction(reduction)
    check_tensor("lse", lse, dtypes=FLOATS)
    counted = torch.ones_like(lse, dtype=torch.bool)
    if targets is not None:
        check_tensor("targets", targets, dtypes=IDS, device=lse.device)
        labels = targets[..., check_shift(shift, targets) :] if targets.dim() else targets
        check_tensor("targets", labels, shape=lse.shape)
        counted = labels != check_integer("ignore_index", ignore_index)
    squares = torch.where(counted, lse.to(accumulate_dtype(lse.dtype)), 0.0).square()
    if reduction == "none":
        return squares
    return squares.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)


def softcapping(logits: Tensor, softcap: float) -> Tensor:
    """``softcap`` · tanh(logits / ``softcap``), as the loss has it.

    Example:
        >>> import torch
        >>> softcapping(torch.tensor([0.0, 1e9]), 20.0)
        tensor([ 0., 20.])
    """
    return torch.tanh(logits / softcap) * softcap
