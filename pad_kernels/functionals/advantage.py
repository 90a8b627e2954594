"""Expected advantage of ADPA (arXiv 2502.17927): the student's mean log-ratio of two teachers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.statistics import (
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    log_ratio,
)

_IDS, _VALUES = "advantage_ids", "advantage_values"


@register
@dataclass(frozen=True)
class Advantage(Functional):
    """E_s[log d - log r] = E_s[(a_d - max_d) - (a_r - max_r)] + log(S_r / S_d).

    Gradient: s (x - E_s[x]) with x the difference of the two teachers' logits.
    """

    looks_back = False
    aligned: int = 1
    reference: int = 2

    @property
    def teachers(self) -> tuple[int, ...]:
        return self.aligned, self.reference

    @property
    def _moment(self) -> Moment:
        return Moment(0, log_ratio(self.aligned, self.reference))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        normalizers = (Normalizer(0), Normalizer(self.aligned), Normalizer(self.reference))
        return *normalizers, self._moment

    def value(self, stats: RowStats) -> Tensor:
        shift = (stats.total(self.reference) / stats.total(self.aligned)).log()
        return (stats[self._moment][0] / stats.total() + shift).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(centred={self._moment: grad[0]})


@register
@dataclass(frozen=True)
class TopKAdvantage(Functional):
    """sum over k tokens of s times an offline log-ratio; elsewhere the log-ratio counts as 0.

    Inputs: ``advantage_ids`` int64 [rows, k], distinct in each row, ``advantage_values`` [rows, k].
    Gradient: s (x - value), x the log-ratio.
    """

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Picked(_IDS)

    def _parts(self, stats: RowStats) -> tuple[Tensor, Tensor]:
        """Student's probability times log-ratio [k, rows], and its sum [rows]."""
        probability = stats.logprobs(0, stats[Picked(_IDS)].t().double()).t().exp()
        weighted = probability * stats.inputs[_VALUES].t().to(probability.dtype)
        return weighted, weighted.sum(0)

    def value(self, stats: RowStats) -> Tensor:
        return self._parts(stats)[1].unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        weighted, mean = self._parts(stats)
        return LogitGradient(
            student=-grad[0] * mean, sparse=[(stats.inputs[_IDS], (grad[0] * weighted).t())]
        )
