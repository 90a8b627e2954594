"""The log normaliser, its square (z-loss), and the sum of the logits (label smoothing)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.statistics import Normalizer, RowStats, Statistic, Total


@register
@dataclass(frozen=True)
class LogSumExp(Functional):
    """log sum exp(a). Gradient: s."""

    looks_back = False

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Normalizer(0),)

    def value(self, stats: RowStats) -> Tensor:
        return stats.logsumexp().unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(student=grad[0])


@register
@dataclass(frozen=True)
class SquaredLogSumExp(Functional):
    """(log sum exp(a))**2, the z-loss. Gradient: 2 lse s."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Normalizer(0),)

    def value(self, stats: RowStats) -> Tensor:
        return stats.logsumexp().square().unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(student=2 * stats.logsumexp() * grad[0])


@register
@dataclass(frozen=True)
class LogitSum(Functional):
    """sum a. Label smoothing is epsilon (lse - sum a / V): V enters through the coefficient."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Total(),)

    def value(self, stats: RowStats) -> Tensor:
        return stats[Total()]

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(constant=grad[0])
