"""Entropy of the student's next-token distribution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.statistics import Moment, Normalizer, RowStats, Statistic

_SELF = Moment(0, (1.0,))


@register
@dataclass(frozen=True)
class Entropy(Functional):
    """-sum s log s = log S - M/S, with S and M relative to the row maximum.

    Gradient: -s (log s + entropy).
    """

    looks_back = False

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), _SELF

    def value(self, stats: RowStats) -> Tensor:
        total = stats.total()
        return (total.log() - stats[_SELF][0] / total).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        # log s + entropy = (a - max) - M/S
        return LogitGradient(centred={_SELF: -grad[0]})
