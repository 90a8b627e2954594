"""``torch.nn.functional.linear_cross_entropy`` with its signature (torch 2.13).

In place of ``import torch.nn.functional as F`` where ``F.linear_cross_entropy`` is called.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import check_number, check_reduction, fail_type, fail_value
from pad_kernels.compat._arguments import check_head, check_labels
from pad_kernels.compat._class_weights import (
    check_class_weights,
    class_weighted_losses,
    label_weights,
)

# Fields of LinearCrossEntropyOptions. Torch 2.9 to 2.12 have no such class, or another one.
_OPTIONS = ("allow_retain_graph", "batch_chunk_size", "chunking_method", "acc_policy", "acc_dtype")


def _plan(options: Any, input: Tensor) -> str | None:
    """Check torch's options; only whether a second backward is allowed changes anything."""
    if options is None:
        return None
    if not all(hasattr(options, name) for name in _OPTIONS):
        fail_type("options", "None or a torch.nn.LinearCrossEntropyOptions", options)
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    if options.acc_dtype not in (None, wide):
        fail_value("options.acc_dtype", f"None or {wide}", options.acc_dtype)
    return "late" if options.allow_retain_graph else None


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, as torch's function.

    Args:
        input: [N, in_features] or [in_features]; other leading dimensions are welcome too.
        linear_weight: [C, in_features].
        target: class indices, integer, with the leading shape of ``input``.
        linear_bias: [C].
        weight: [C] floating point, a weight per class; the mean divides by the targets' weights.
        reduction: "mean", "sum" or "none".
        ignore_index: target that does not count; None is -100.
        label_smoothing: in [0, 1].
        options: None or a ``torch.nn.LinearCrossEntropyOptions``: ``allow_retain_graph=True``
            allows a second backward; how to chunk has no effect, the schedule is planned.

    Returns:
        0-d, or the leading shape of ``input`` for "none"; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range, and what is not
            supported: class probabilities as target, a ``linear_weight`` of more dimensions.

    Example:
        >>> import torch
        >>> linear_cross_entropy(torch.zeros(2, 8), torch.zeros(10, 8), torch.tensor([1, -100]))
        tensor(2.3026)
    """
    check_head(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    if isinstance(target, Tensor) and target.is_floating_point():
        fail_type("target", "class indices, an integer dtype, not probabilities", target.dtype)
    check_labels("target", target, input)
    check_reduction(reduction)
    smoothing = check_number("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
    ignored = -100 if ignore_index is None else ignore_index
    plan = _plan(options, input)
    arguments: dict[str, Any] = {"bias": linear_bias, "ignore_index": ignored}
    arguments["label_smoothing"] = smoothing
    if weight is None:
        plan = None if reduction == "none" else plan
        return pk.linear_cross_entropy(
            input, linear_weight, target, reduction=reduction, plan=plan, **arguments
        )
    check_class_weights("weight", weight, linear_weight)
    losses, _ = class_weighted_losses(input, linear_weight, target, weight, **arguments)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "mean":
        weights = label_weights(weight.to(losses.dtype), target, ignored).sum()
        total = total / torch.where(weights == 0, math.inf, weights)
    return total
