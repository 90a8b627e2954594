"""``liger_kernel.chunked_loss.jsd_loss``: cross-entropy and generalised JSD to a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels._checks import check_flag, check_number
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.compat._arguments import check_labels, check_schedule
from pad_kernels.compat._distillation import HeadPair, divergence_kind

Losses = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Mixture:
    """soft · divergence + hard · cross-entropy."""

    heads: HeadPair
    labels: Tensor
    kind: str
    alpha: float | None
    soft: float
    hard: float
    ignore_index: int

    def one_pass(self) -> Losses:
        """Loss, divergence and cross-entropy from one set of student logits."""
        out = pk.linear_distill(
            self.heads.student,
            self.labels,
            teacher=self.heads.teacher,
            kind=self.kind,
            alpha=self.alpha,
            ce_weight=self.hard,
            divergence_weight=self.soft,
            ignore_index=self.ignore_index,
        )
        assert out.loss is not None and out.divergence is not None
        assert out.cross_entropy is not None
        # The parts come with their weights, which Liger's are without.
        return out.loss, out.divergence / self.soft, out.cross_entropy / self.hard

    def divergence(self) -> Tensor:
        return pk.linear_divergence(
            self.heads.student,
            self.heads.teacher,
            kind=self.kind,
            alpha=self.alpha,
            labels=self.labels,
            ignore_index=self.ignore_index,
        )

    def cross_entropy(self) -> Tensor:
        # The hard loss is that of the logits as they are: the temperature is not the student's.
        return pk.linear_cross_entropy(
            self.heads.student_input,
            self.heads.student_weight,
            self.labels,
            bias=self.heads.student_bias,
            ignore_index=self.ignore_index,
        )

    def two_passes(self, show: bool) -> Losses:
        """The same where the two parts' logits differ, or where one part has no weight."""
        hidden = self.heads.student_input
        zero = torch.zeros((), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        loss, parts = zero, []
        for weight, part in ((self.soft, self.divergence), (self.hard, self.cross_entropy)):
            # A part without weight is only computed to be shown, and then without gradient.
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                value = part() if weight or show else zero
            loss = loss + weight * value if weight else loss
            parts.append(value)
        return loss, parts[0], parts[1]


class LigerFusedLinearJSDFunction:
    """CE + JSD of two LM heads, called as Liger's autograd function is: ``apply`` by position."""

    @staticmethod
    def apply(
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> Tensor | Losses:
        """Loss; the arguments are those of :class:`LigerFusedLinearJSDLoss`."""
        check_schedule(compiled, chunk_size)
        show = check_flag("return_soft_hard_loss", return_soft_hard_loss)
        hard = check_number("weight_hard_loss", weight_hard_loss)
        soft = check_number("weight_soft_loss", weight_soft_loss)
        kind, alpha = divergence_kind("beta", beta)
        heads = HeadPair(
            student_input,
            student_weight,
            student_bias,
            teacher_input,
            teacher_weight,
            teacher_bias,
            temperature,
        )
        check_labels("true_labels", true_labels, student_input)
        mixture = _Mixture(heads, true_labels, kind, alpha, soft, hard, ignore_index)
        shared = temperature == 1.0 and soft and hard
        losses = mixture.one_pass() if shared else mixture.two_passes(show)
        loss, divergence, cross_entropy = losses
        return (loss, divergence.detach(), cross_entropy.detach()) if show else loss


class LigerFusedLinearJSDLoss(nn.Module):
    """Cross-entropy plus generalised JSD to a teacher, with the signature of Liger's chunked class.

    weight_hard_loss · CE + weight_soft_loss · D, means over the tokens that are not ignored; D is
    β·KL(teacher‖m) + (1 − β)·KL(student‖m) with m = β·teacher + (1 − β)·student (GKD,
    arXiv 2306.13649), KL(teacher‖student) for β = 0 and KL(student‖teacher) for β = 1.

    Args:
        weight_hard_loss: weight of the cross-entropy, which is taken at temperature 1.
        weight_soft_loss: weight of the divergence.
        beta: in [0, 1]: the ``alpha`` of ``pad_kernels.linear_divergence(kind="jsd")``.
        ignore_index: label of tokens that do not count.
        temperature: divisor of both models' logits in the divergence, > 0; no factor of its square.
        compiled: no effect: the schedule is planned.
        chunk_size: no effect: the schedule is planned.
        return_soft_hard_loss: return (loss, divergence, cross-entropy), the last two for logging.

    Shape:
        ``forward(student_input [N, H], student_weight [V, H], teacher_input [N, H'],
        teacher_weight [V', H'], true_labels [N], student_bias [V], teacher_bias [V'])`` gives a 0-d
        loss, float32 (float64 for float64). What V' has beyond V is padding: probability 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 8), torch.zeros(10, 8)
        >>> labels = torch.tensor([1, -100])
        >>> LigerFusedLinearJSDLoss()(hidden, weight, hidden, weight, labels)
        tensor(1.1513)
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, above=0.0)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | Losses:
        """Loss, see the class."""
        return LigerFusedLinearJSDFunction.apply(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias,
            teacher_bias,
            weight_hard_loss=self.weight_hard_loss,
            weight_soft_loss=self.weight_soft_loss,
            beta=self.beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            compiled=self.compiled,
            chunk_size=self.chunk_size,
            return_soft_hard_loss=self.return_soft_hard_loss,
        )
