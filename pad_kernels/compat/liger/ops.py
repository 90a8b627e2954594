"""What ``liger_kernel.ops`` has for an LM head: fused cross-entropy and JSD, ``apply``-style."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import check_flag, check_number, check_reduction, fail_value
from pad_kernels.compat._arguments import check_head, check_labels
from pad_kernels.compat._class_weights import (
    check_class_weights,
    class_weighted_losses,
    label_weights,
)
from pad_kernels.compat._distillation import HeadPair, divergence_kind

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def check_accumulation(accum_dtype: torch.dtype | None, hidden: Tensor) -> None:
    """Check Liger's ``accum_dtype``: ours is float32, and float64 for float64 input."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if accum_dtype not in (None, torch.float32, wide):
        fail_value("accum_dtype", f"None or {wide}: sums are never narrower", accum_dtype)


@dataclass(frozen=True)
class _CrossEntropy:
    """One call of the fused cross-entropy: checked arguments, and the loss's two forms."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    reduction: str
    label_smoothing: float
    z_weight: float
    options: dict[str, Any]  # bias, softcap, ignore_index

    def __post_init__(self) -> None:
        check_head(ndim=2, _input=self.hidden, weight=self.weight, bias=self.options["bias"])
        check_labels("target", self.target, self.hidden)
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, at_least=0.0, at_most=1.0)
        check_number("lse_square_scale", self.z_weight, at_least=0.0)

    @property
    def counted(self) -> Tensor:
        return self.target != self.options["ignore_index"]

    def reduced(self, values: Tensor, reduction: str, divisor: Tensor | None = None) -> Tensor:
        """Values, their sum, or their sum over ``divisor``: the count of counted rows."""
        if reduction != "mean":
            return values if reduction == "none" else values.sum()
        divisor = self.counted.sum() if divisor is None else divisor
        return values.sum() / torch.where(divisor == 0, math.inf, divisor)

    def stats(self) -> pk.TokenStats:
        """Per-token statistics without gradient."""
        with torch.no_grad():
            return pk.linear_token_stats(self.hidden, self.weight, self.target, **self.options)

    def loss(self, factors: Tensor | None) -> Tensor:
        """Without class weights; ``factors`` per token or None."""
        return pk.linear_cross_entropy(
            self.hidden,
            self.weight,
            self.target,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_weight,
            token_weights=factors,
            **self.options,
        )

    def class_weighted_loss(self, class_weight: Tensor, factors: Tensor | None) -> Tensor:
        """With a weight per class: those divide the mean, and the z-loss has none."""
        check_class_weights("ce_weight", class_weight, self.weight)
        losses, lse = class_weighted_losses(
            self.hidden,
            self.weight,
            self.target,
            class_weight,
            label_smoothing=self.label_smoothing,
            **self.options,
        )
        z_losses = self.z_weight * lse.square()
        if factors is not None:
            losses, z_losses = losses * factors, z_losses * factors
        class_weight = class_weight.to(losses.dtype)
        weights = label_weights(class_weight, self.target, self.options["ignore_index"]).sum()
        loss = self.reduced(losses, self.reduction, weights)
        return loss + self.reduced(z_losses, self.reduction)


class LigerFusedLinearCrossEntropyFunction:
    """Cross-entropy of an LM head, called as Liger's autograd function is: ``apply``."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> Outputs:
        """(loss, z_loss, token_accuracy, predicted_tokens), None for what is not asked for.

        The arguments are those of
        :class:`pad_kernels.compat.liger.transformers.LigerFusedLinearCrossEntropyLoss`.
        """
        options = {"bias": bias, "softcap": softcap, "ignore_index": ignore_index}
        call = _CrossEntropy(
            _input, weight, target, reduction, label_smoothing, lse_square_scale, options
        )
        check_accumulation(accum_dtype, _input)
        scaled = check_flag("use_token_scaling", use_token_scaling)
        z_shown = check_flag("return_z_loss", return_z_loss)
        hits_shown = check_flag("return_token_accuracy", return_token_accuracy)
        tokens_shown = check_flag("return_predicted_tokens", return_predicted_tokens)
        stats = call.stats() if scaled or z_shown or hits_shown or tokens_shown else None
        # Token scaling is by the label's own probability, taken for a constant.
        factors = stats.logprob.exp() if stats is not None and scaled else None
        if ce_weight is None:
            loss = call.loss(factors)
        else:
            loss = call.class_weighted_loss(ce_weight, factors)
        z_loss, accuracy = None, None
        if stats is not None and z_shown:
            z_losses = lse_square_scale * stats.logsumexp.square()
            z_loss = call.reduced(z_losses if factors is None else z_losses * factors, reduction)
        if stats is not None and hits_shown:
            hits = (call.counted & (stats.argmax == target)).to(torch.float32)
            # A share of the tokens, whatever the reduction, unless it is "none".
            accuracy = call.reduced(hits, "none" if reduction == "none" else "mean")
        return loss, z_loss, accuracy, stats.argmax if stats is not None and tokens_shown else None


class LigerFusedLinearJSDFunction:
    """Generalised JSD of two LM heads, called as Liger's autograd function is: ``apply``."""

    @staticmethod
    def apply(
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The arguments are those of :class:`...transformers.LigerFusedLinearJSD`."""
        kind, alpha = divergence_kind("jsd_beta", jsd_beta)
        heads = HeadPair(
            student_input, student_weight, None, teacher_input, teacher_weight, None, temperature
        )
        check_accumulation(accum_dtype, student_input)
        if shift_labels is not None:
            check_labels("shift_labels", shift_labels, student_input)
        return pk.linear_divergence(
            heads.student,
            heads.teacher,
            kind=kind,
            alpha=alpha,
            labels=shift_labels,
            ignore_index=ignore_index,
        )
