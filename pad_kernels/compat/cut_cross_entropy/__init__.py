"""Cut Cross-Entropy's ``linear_cross_entropy`` and module, with its signature.

In place of ``from cut_cross_entropy import linear_cross_entropy``; ``utils`` has its z-loss.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Any

import torch
from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels._checks import (
    check_choice,
    check_flag,
    check_number,
    check_reduction,
    fail_value,
)
from pad_kernels.compat._arguments import check_head, check_labels, check_shift
from pad_kernels.compat.cut_cross_entropy.constants import IGNORE_INDEX


class LinearCrossEntropyImpl(IntEnum):
    """Cut Cross-Entropy's implementations: accepted, all of them mean ours."""

    CCE = auto()
    TORCH_COMPILE = auto()
    CCE_KAHAN_FULL_C = auto()
    CCE_KAHAN_FULL_E = auto()
    CCE_EXACT = auto()
    CCE_KAHAN_FULL_C_FULL_E = auto()
    CCE_KAHAN_FULL = auto()


IMPLEMENTATIONS = tuple(impl.name.lower() for impl in LinearCrossEntropyImpl)


def _check_accuracy(
    filter_eps: float | str | None,
    flags: dict[str, bool],
    impl: str | LinearCrossEntropyImpl,
    vocab_parallel_options: Any,
) -> None:
    """Check what says how (in)accurate to be: gradients here are exact, sums in float32."""
    if isinstance(filter_eps, str):
        check_choice("filter_eps", filter_eps, ("auto",))
    elif filter_eps is not None:
        check_number("filter_eps", filter_eps, at_least=0.0)
    for name, value in flags.items():
        check_flag(name, value)
    if not isinstance(impl, LinearCrossEntropyImpl):
        check_choice("impl", impl, IMPLEMENTATIONS)
    if vocab_parallel_options is not None:
        fail_value("vocab_parallel_options", "None: a whole vocabulary", "options")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
    vocab_parallel_options: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of an LM head, with the signature of Cut Cross-Entropy (arXiv 2411.09009).

    Args:
        e: hidden states [..., H] ([..., T, H] to shift).
        c: head weight [V, H].
        targets: [...] integer.
        bias: [V].
        ignore_index: label of rows that do not count.
        softcap: logit soft cap, > 0.
        reduction: "mean" over the rows that count, "sum" or "none".
        shift: position i predicts target i + shift; True is 1; less than T.
        return_lse: return the log normalisers too, differentiable.
        filter_eps: no effect: gradients are exact, no entry is left out.
        accum_e_fp32: no effect: sums are always float32.
        accum_c_fp32: no effect.
        filter_e_grad: no effect.
        filter_c_grad: no effect.
        impl: one of Cut Cross-Entropy's names; no effect.
        vocab_parallel_options: None.

    Returns:
        The loss, 0-d or, for "none", like ``targets[..., shift:]`` with 0 where ignored; with
        ``return_lse`` (loss, lse), the latter shaped like that for every reduction. float32
        (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> e, targets = torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]])
        >>> linear_cross_entropy(e, torch.zeros(10, 8), targets, shift=True, reduction="none")
        tensor([[2.3026, 0.0000]])
    """
    check_head(e=e, c=c, bias=bias)
    check_labels("targets", targets, e)
    check_reduction(reduction)
    check_flag("return_lse", return_lse)
    flags = {
        "accum_e_fp32": accum_e_fp32,
        "accum_c_fp32": accum_c_fp32,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
    }
    _check_accuracy(filter_eps, flags, impl, vocab_parallel_options)
    steps = check_shift(shift, targets)
    labels = targets
    if steps:
        # Labels move, not the hidden states: a slice of those would be copied.
        labels = torch.full_like(targets, ignore_index)
        labels[..., :-steps] = targets[..., steps:]
    kept = slice(0, targets.shape[-1] - steps) if targets.dim() else ...
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "ignore_index": ignore_index}
    if not return_lse:
        loss = pk.linear_cross_entropy(e, c, labels, reduction=reduction, **options)
        return loss[..., kept] if reduction == "none" else loss
    stats = pk.linear_token_stats(e, c, labels, **options)
    loss = -stats.logprob
    if reduction == "none":
        return loss[..., kept], stats.logsumexp[..., kept]
    total = loss.sum()
    if reduction == "mean":
        total = total / (labels != ignore_index).sum().clamp(min=1)
    return total, stats.logsumexp[..., kept]


class LinearCrossEntropy(nn.Module):
    """:func:`linear_cross_entropy` as a module, with the signature of Cut Cross-Entropy's.

    Args:
        ignore_index, softcap, reduction, shift, return_lse and the rest: as in the function.

    Shape:
        ``forward(e, c, targets, bias=None)``, as the function.

    Example:
        >>> import torch
        >>> LinearCrossEntropy()(torch.zeros(2, 8), torch.zeros(10, 8), torch.tensor([1, -100]))
        tensor(2.3026)
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.reduction = reduction
        self.shift = shift
        self.filter_eps = filter_eps
        self.accum_e_fp32 = accum_e_fp32
        self.accum_c_fp32 = accum_c_fp32
        self.filter_e_grad = filter_e_grad
        self.filter_c_grad = filter_c_grad
        self.impl = impl
        self.return_lse = return_lse

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss, or loss and log normalisers, see the function."""
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            reduction=self.reduction,
            shift=self.shift,
            return_lse=self.return_lse,
            filter_eps=self.filter_eps,
            accum_e_fp32=self.accum_e_fp32,
            accum_c_fp32=self.accum_c_fp32,
            filter_e_grad=self.filter_e_grad,
            filter_c_grad=self.filter_c_grad,
            impl=self.impl,
        )
