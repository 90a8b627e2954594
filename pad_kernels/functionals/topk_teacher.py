"""Forward KL to an offline teacher that kept k tokens a row, the rest as one bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
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
class TopKForwardKL(Functional):
    """KL between (k tokens + tail bucket) outcomes of teacher and student.

    Inputs: ``teacher_ids`` int64 [rows, k], distinct in each row, and ``teacher_logprobs``
    [rows, k]. Gradient: s - t on the k tokens, s (1 - t_tail / s_tail) elsewhere: one constant
    times s, with sparse exceptions.
    """

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Picked(_IDS), Tail(_IDS)

    def _outcomes(self, stats: RowStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student and teacher log-probs on the k tokens [k, rows] and in the tail [rows]."""
        lse = stats.logsumexp()
        kept_s = stats[Picked(_IDS)] - lse
        tail_max, tail_sum = stats[Tail(_IDS)]
        tail_s = finite_or_zero(tail_max) + tail_sum.log() - lse
        kept_t = stats.inputs[_LOGPROBS].t().to(lse.dtype)
        # Kept mass above 1 is rounding: the tail is then empty.
        tail_t = (1 - kept_t.exp().sum(0)).clamp(min=0)
        return kept_s, kept_t, tail_s, tail_t

    def value(self, stats: RowStats) -> Tensor:
        kept_s, kept_t, tail_s, tail_t = self._outcomes(stats)
        weight = kept_t.exp()
        kept = torch.where(weight == 0, 0.0, weight * (kept_t - kept_s)).sum(0)
        tail = torch.where(tail_t == 0, 0.0, tail_t * (tail_t.log() - tail_s))
        return (kept + tail).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        kept_s, kept_t, tail_s, tail_t = self._outcomes(stats)
        ratio = torch.where(tail_t == 0, 0.0, tail_t * torch.exp(-tail_s))
        exception = kept_s.exp() * ratio - kept_t.exp()
        return LogitGradient(
            student=grad[0] * (1 - ratio),
            sparse=[(stats.inputs[_IDS], (grad[0] * exception).t())],
        )
