"""Divergence to an offline teacher that kept k tokens a row, the rest as one bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.divergence import outcome
from pad_kernels.functionals.statistics import (
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Tail,
    finite_or_zero,
)

_IDS, _LOGPROBS = "teacher_ids", "teacher_logprobs"


@register
@dataclass(frozen=True)
class TopKDivergence(Functional):
    """Divergence between (k tokens + tail bucket) outcomes of teacher and student.

    Inputs: ``teacher_ids`` int64 [rows, k], distinct in each row, and ``teacher_logprobs``
    [rows, k]. With the outcomes' slopes and their sum G, the gradient is slope - s G on the k
    tokens and (slope_tail - s_tail G) times the token's share of the tail elsewhere. That is not a
    coefficient of s: it would have to cancel on the k tokens, and s underflows where the share,
    s / s_tail, does not.

    ``whole`` says that the k tokens are the vocabulary, so that there is no tail.
    """

    kind: str = "forward_kl"
    alpha: float = 0.5
    whole: bool = False

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Picked(_IDS), Tail(_IDS)

    def _logprobs(self, stats: RowStats) -> tuple[Tensor, Tensor]:
        """Log-probs of student's and teacher's outcomes, float64 [k + 1, rows], the tail last."""
        kept_s = stats.logprobs(0, stats[Picked(_IDS)].t().double()).t()
        tail_max, tail_sum = stats[Tail(_IDS)].double()
        tail_s = stats.logprobs(0, finite_or_zero(tail_max).unsqueeze(-1)).squeeze(-1)
        tail_s = tail_s + tail_sum.log()
        # A large tail is what the k tokens leave of 1: the log of a ratio near 1 of two sums would
        # be their rounding. A small one is its own sum.
        mass = kept_s.exp().sum(0)
        tail_s = torch.where(mass < 0.5, torch.log1p(-mass), tail_s)
        kept_t = stats.inputs[_LOGPROBS].t().to(kept_s.dtype)
        # Kept mass above 1 is rounding: the tail is then empty.
        tail_t = torch.log1p(-kept_t.exp().sum(0).clamp(max=1))
        if self.whole:
            tail_s, tail_t = (torch.full_like(x, -torch.inf) for x in (tail_s, tail_t))
        return torch.cat((kept_s, tail_s[None])), torch.cat((kept_t, tail_t[None]))

    def value(self, stats: RowStats) -> Tensor:
        found = outcome(self.kind, self.alpha, *self._logprobs(stats)).value.sum(0)
        # Below 0 by rounding alone: the outcomes' masses need not add up to 1 exactly.
        return found.clamp(min=0).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        g, (student, teacher) = grad[0], self._logprobs(stats)
        slope, s = outcome(self.kind, self.alpha, student, teacher).slope, student.exp()
        by_outcome = g * (slope - s * slope.sum(0))
        return LogitGradient(
            outside={_IDS: by_outcome[-1]}, sparse=[(stats.inputs[_IDS], by_outcome[:-1].t())]
        )
