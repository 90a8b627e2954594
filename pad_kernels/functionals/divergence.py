"""Divergences between a student's and a teacher's next-token distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.statistics import (
    Block,
    Moment,
    Normalizer,
    RowStats,
    Statistic,
    log_ratio,
)

#: Kinds whose value is a mean of logit differences, finished after one sweep.
ONE_SWEEP = ("forward_kl", "reverse_kl")
#: Kinds that need both normalisers first, and what their alpha is if nobody says.
DEFAULT_ALPHA = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
KINDS = (*ONE_SWEEP, *DEFAULT_ALPHA, "tvd")


class Outcome(NamedTuple):
    """What one outcome adds to a divergence, from its probabilities s and t.

    Attributes:
        value: phi(s, t); summed over outcomes this is the divergence.
        slope: s (dphi/ds + c). With G its sum, the gradient by the student's logit is slope - s G,
            whatever c is: what makes slopes small. They are 0 where s = t, but for
            skew_forward_kl: without c its slopes are no larger than t, with it as large as s, and
            a certain student's would cancel.
        balance: a number c such that phi + c (s - t) is never below 0. As s and t both sum to 1,
            the sum is the same, and errors of the normalisers cancel to first order.
    """

    value: Tensor
    slope: Tensor
    balance: float


def _weighted(weight: Tensor, factor: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * factor)


def outcome(kind: str, alpha: float, student: Tensor, teacher: Tensor) -> Outcome:
    """The divergence's summand from log-probabilities of one shape.

    Mixtures: logarithms of m over the larger of s and t, which is at most 1, so that neither huge
    ratios nor nearly equal probabilities lose digits.
    """
    s, t = student.exp(), teacher.exp()
    # Outcomes that neither has: any finite ratio does, they weigh nothing.
    ratio = torch.where((s == 0) & (t == 0), 0.0, teacher - student)
    if kind == "forward_kl":
        return Outcome(_weighted(t, ratio), s - t, 1.0)
    if kind == "reverse_kl":
        value = _weighted(s, -ratio)
        return Outcome(value, value, -1.0)
    if kind == "tvd":
        return Outcome((s - t).abs() / 2, s * torch.sign(s - t) / 2, 0.0)
    of_t, of_s = (1 - alpha, alpha) if kind == "skew_reverse_kl" else (alpha, 1 - alpha)
    teacher_leads = ratio >= 0
    under = torch.where(teacher_leads, of_s, torch.full_like(ratio, of_t))  # of the smaller
    over = torch.where(teacher_leads, of_t, torch.full_like(ratio, of_s))
    # Near 1 the logarithm needs what m is short of it, and else m itself.
    short, whole = under * torch.expm1(-ratio.abs()), over + under * torch.exp(-ratio.abs())
    below = torch.where(short > -0.5, torch.log1p(short), whole.log())
    of_student = torch.where(teacher_leads, -ratio, 0.0) - below  # log s/m
    of_teacher = torch.where(teacher_leads, 0.0, ratio) - below  # log t/m
    if kind == "jsd":
        slope = (1 - alpha) * _weighted(s, of_student)
        return Outcome(alpha * _weighted(t, of_teacher) + slope, slope, 0.0)
    if kind == "skew_forward_kl":
        slope = (alpha - 1) * t * of_student.exp()
        return Outcome(_weighted(t, of_teacher), slope, 1 - alpha)
    value = _weighted(s, of_student)
    slope = value + alpha * (1 - alpha) * (t - s) * of_student.exp()
    return Outcome(value, slope, alpha - 1)


@register
@dataclass(frozen=True)
class ForwardKL(Functional):
    """sum t log(t/s) = E_t[(a_t - max_t) - (a_s - max_s)] + log(S_s / S_t). Gradient: s - t."""

    looks_back = False
    teacher: int = 1

    @property
    def teachers(self) -> tuple[int, ...]:
        return (self.teacher,)

    @property
    def _moment(self) -> Moment:
        return Moment(self.teacher, log_ratio(self.teacher, 0))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Normalizer(self.teacher), self._moment

    def value(self, stats: RowStats) -> Tensor:
        total = stats.total(self.teacher)
        mean = stats[self._moment][0] / total
        return (mean + (stats.total() / total).log()).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(student=grad[0], probabilities={self.teacher: -grad[0]})


@register
@dataclass(frozen=True)
class ReverseKL(Functional):
    """sum s log(s/t) = E_s[(a_s - max_s) - (a_t - max_t)] + log(S_t / S_s).

    Gradient: s (log(s/t) - value).
    """

    looks_back = False
    teacher: int = 1

    @property
    def teachers(self) -> tuple[int, ...]:
        return (self.teacher,)

    @property
    def _moment(self) -> Moment:
        return Moment(0, log_ratio(0, self.teacher))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Normalizer(self.teacher), self._moment

    def value(self, stats: RowStats) -> Tensor:
        total = stats.total()
        mean = stats[self._moment][0] / total
        return (mean + (stats.total(self.teacher) / total).log()).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(centred={self._moment: grad[0]})


@dataclass(frozen=True)
class Outcomes(Statistic):
    """Sums of an :class:`Outcome`'s balanced value and slope, once the normalisers are known."""

    sweep = 2
    kind: str
    alpha: float
    teacher: int

    def width(self, inputs: Mapping[str, Tensor]) -> int:
        return 2

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        assert first is not None
        student, teacher = (first.logprobs(j, block.logits[j]) for j in (0, self.teacher))
        found = outcome(self.kind, self.alpha, student, teacher)
        value = found.value
        if found.balance:
            value = value + found.balance * (student.exp() - teacher.exp())
        return torch.stack([x.sum(-1, dtype=torch.float64) for x in (value, found.slope)])


@register
@dataclass(frozen=True)
class Divergence(Functional):
    """jsd, skew_forward_kl, skew_reverse_kl or tvd. Gradient: slope - s sum(slope).

    jsd and the skewed ones mix with ``alpha`` (arXiv 2306.13649, arXiv 2402.03898); tvd ignores it.
    """

    looks_back = False
    kind: str = "jsd"
    alpha: float = 0.5
    teacher: int = 1

    @property
    def teachers(self) -> tuple[int, ...]:
        return (self.teacher,)

    @property
    def outcomes(self) -> Outcomes:
        """The statistic of the second sweep."""
        return Outcomes(self.kind, self.alpha, self.teacher)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Normalizer(self.teacher), self.outcomes

    def value(self, stats: RowStats) -> Tensor:
        return stats[self.outcomes][:1]

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(curved=[(self, grad)])

    def curved(self, block: Block, grad: Tensor, stats: RowStats) -> Tensor:
        student, teacher = (stats.logprobs(j, block.logits[j]) for j in (0, self.teacher))
        slope = outcome(self.kind, self.alpha, student, teacher).slope
        mean = stats[self.outcomes][1].to(slope.dtype).unsqueeze(-1)
        return (slope - student.exp() * mean) * grad[0].to(slope.dtype).unsqueeze(-1)


def divergence(kind: str, alpha: float, teacher: int) -> Functional:
    """The functional of a kind, against the teacher of that stream; tvd and KLs have no alpha."""
    if kind == "forward_kl":
        return ForwardKL(teacher)
    if kind == "reverse_kl":
        return ReverseKL(teacher)
    return Divergence(kind, alpha, teacher)
