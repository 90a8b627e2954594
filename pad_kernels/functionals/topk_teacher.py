"""Forward KL to an offline teacher that kept k tokens a row, the rest as one bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.statistics import (
    Block,
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
class TopKForwardKL(Functional):
    """KL between (k tokens + tail bucket) outcomes of teacher and student.

    Inputs: ``teacher_ids`` int64 [rows, k], distinct in each row, and ``teacher_logprobs``
    [rows, k]. Gradient: s - t on the k tokens, s - t_tail s / s_tail elsewhere. The last term is an
    element-wise one: as a constant times s with exceptions on the k tokens it would cancel there,
    and t_tail / s_tail has no bound.
    """

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Picked(_IDS), Tail(_IDS)

    def _outcomes(self, stats: RowStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student and teacher log-probs on the k tokens [k, rows] and in the tail [rows]."""
        kept_s = stats.logprobs(0, stats[Picked(_IDS)].t()).t()
        tail_max, tail_sum = stats[Tail(_IDS)]
        tail_s = stats.logprobs(0, finite_or_zero(tail_max).unsqueeze(-1)).squeeze(-1)
        tail_s = tail_s + tail_sum.log()
        kept_t = stats.inputs[_LOGPROBS].t().to(kept_s.dtype)
        # Kept mass above 1 is rounding: the tail is then empty.
        tail_t = (1 - kept_t.exp().sum(0)).clamp(min=0)
        return kept_s, kept_t, tail_s, tail_t

    def value(self, stats: RowStats) -> Tensor:
        kept_s, kept_t, tail_s, tail_t = self._outcomes(stats)
        weight = kept_t.exp()
        kept = torch.where(weight == 0, 0.0, weight * (kept_t - kept_s)).sum(0)
        tail = torch.where(tail_t == 0, 0.0, tail_t * (tail_t.log() - tail_s))
        # Below 0 by rounding alone: the outcomes' masses need not add up to 1 exactly.
        return (kept + tail).clamp(min=0).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        _, kept_t, _, _ = self._outcomes(stats)
        return LogitGradient(
            student=grad[0],
            sparse=[(stats.inputs[_IDS], -(grad[0] * kept_t.exp()).t())],
            curved=[(self, grad)],
        )

    def curved(self, block: Block, grad: Tensor, stats: RowStats) -> Tensor:
        tail_max, tail_sum = stats[Tail(_IDS)].unsqueeze(-1)
        share = torch.exp(block.logits[0] - finite_or_zero(tail_max)) / tail_sum
        kept = block.listed(stats.inputs[_IDS])
        tail_t = self._outcomes(stats)[3]
        return share.masked_fill(kept, 0.0) * -(grad[0] * tail_t).unsqueeze(-1)
