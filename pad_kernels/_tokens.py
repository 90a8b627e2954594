"""Arguments that every op over tokens has: labels, weights, and what a mean divides by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    IDS,
    INTEGERS,
    check_constant,
    check_flag,
    check_integer,
    check_number,
    check_reduction,
    check_tensor,
    fail_type,
    fail_value,
)
from pad_kernels.heads import Head
from pad_kernels.sequence.rewards import checked_offsets


def shifted_labels(labels: Tensor, ignore_index: int, cu_seqlens: Tensor | None) -> Tensor:
    """Labels such that row i predicts label i + 1; the last of each sequence predicts nothing."""
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None and labels.shape[0]:
        # The position before each start belongs to the sequence before; -1 is the last anyway.
        starts = checked_offsets(cu_seqlens, labels.shape[0])[:-1]
        shifted[starts - 1] = ignore_index
    return shifted


def check_labels(
    labels: Tensor, hidden: Tensor, ignore_index: int, shift: bool, cu_seqlens: Tensor | None
) -> Tensor:
    check_tensor("labels", labels, dtypes=IDS, device=hidden.device)
    if labels.shape != hidden.shape[:-1]:
        expected = f"hidden's leading shape {tuple(hidden.shape[:-1])}"
        fail_value("labels", expected, f"shape {tuple(labels.shape)}")
    check_integer("ignore_index", ignore_index)
    check_flag("shift", shift)
    labels = labels.to(torch.int64)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, dtypes=IDS, ndim=1, device=hidden.device)
        if cu_seqlens.shape[0] == 0:
            fail_value("cu_seqlens", "at least one boundary", "none")
        if not shift:
            fail_value("cu_seqlens", "shift=True to go with it", "shift=False")
        if labels.dim() != 1:
            fail_value(
                "cu_seqlens", "packed labels [N] to go with it", f"{labels.dim()} dimensions"
            )
    if shift:
        if labels.dim() == 0:
            fail_value("labels", "a sequence dimension to shift along", "a 0-d tensor")
        labels = shifted_labels(labels, ignore_index, cu_seqlens)
    return labels


def check_weights(
    name: str, weights: Tensor | None, shape: torch.Size, device: torch.device
) -> Tensor | None:
    """Per-token weights: None, or floating point of the tokens' shape."""
    if weights is not None:
        check_tensor(name, weights, dtypes=FLOATS, shape=tuple(shape), device=device)
    return weights


def check_normalizer(
    normalizer: float | Tensor | None, reduction: str, device: torch.device
) -> float | Tensor | None:
    if normalizer is None:
        return None
    if reduction != "mean":
        fail_value("normalizer", "reduction='mean' to go with it", f"reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        # A 0-d tensor on the CPU goes with tensors anywhere.
        on = normalizer.device if normalizer.device.type == "cpu" else device
        check_tensor("normalizer", normalizer, dtypes=(*FLOATS, *INTEGERS), ndim=0, device=on)
        check_constant("normalizer", normalizer)
        if normalizer.device.type == "cpu" and not torch.compiler.is_compiling():
            # 0 is what a trainer counts in a batch without tokens, whose mean is 0.
            check_number("normalizer", normalizer.item(), at_least=0.0)
        return normalizer
    return check_number("normalizer", normalizer, above=0.0)


def per_token_weights(
    weights: Tensor | float | None,
    counted: Tensor,
    reduction: str,
    divisor: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What each token's value is multiplied by before the sum, [N].

    Args:
        weights: per-token weights, one number, or None for 1.
        counted: bool [N], the tokens that are not ignored.
        reduction: "mean" or "sum".
        divisor: what a mean divides by; None for the count of tokens.
        dtype: of the result.
    """
    found = counted.to(dtype)
    if isinstance(weights, Tensor):
        found = torch.where(counted, weights.reshape(-1).to(dtype), 0.0)
    elif weights is not None:
        found = found * weights
    if reduction == "mean":
        if divisor is None:
            divisor = counted.sum().clamp(min=1)
        # Where, not only division: no tokens and a normaliser of 0 make a mean of 0.
        found = torch.where(counted, found / divisor, 0.0)
    return found


@dataclass(frozen=True)
class Tokens:
    """Which rows count and what their values are multiplied by."""

    labels: Tensor | None  # aligned, [...]
    leading: torch.Size
    counted: Tensor  # bool [N]
    reduction: str
    divisor: float | Tensor | None

    @staticmethod
    def checked(
        student: Head,
        labels: Tensor | None,
        reduction: str,
        normalizer: float | Tensor | None,
        ignore_index: int,
        shift: bool,
        cu_seqlens: Tensor | None,
    ) -> Tokens:
        """Check what all ops against teachers have in common."""
        if not isinstance(student, Head):
            fail_type("student", "a pad_kernels.Head", student)
        hidden = check_tensor("student.hidden", student.hidden)
        if hidden.dim() == 0:
            fail_value("student.hidden", "shape [..., H]", "a 0-d tensor")
        check_reduction(reduction)
        divisor = check_normalizer(normalizer, reduction, hidden.device)
        leading = hidden.shape[:-1]
        if labels is None:
            check_flag("shift", shift)
            check_integer("ignore_index", ignore_index)
            for name, given in (("shift", shift), ("cu_seqlens", cu_seqlens is not None)):
                if given:
                    fail_type(name, "labels to go with it", "labels=None")
            counted = torch.ones(leading.numel(), dtype=torch.bool, device=hidden.device)
            return Tokens(None, leading, counted, reduction, divisor)
        aligned = check_labels(labels, hidden, ignore_index, shift, cu_seqlens)
        counted = (aligned != ignore_index).reshape(-1)
        return Tokens(aligned, leading, counted, reduction, divisor)

    def weights(self, given: float | Tensor | None, dtype: torch.dtype) -> Tensor:
        """What each token's value is multiplied by before the sum, [N]."""
        return per_token_weights(given, self.counted, self.reduction, self.divisor, dtype)

    def used(self, given: float | Tensor | None) -> Tensor:
        """The tokens whose values matter, bool [N]: a weight of 0 leaves one out."""
        if isinstance(given, Tensor) and not given.requires_grad:
            return self.counted & (given.reshape(-1) != 0)
        return self.counted
