"""Log-probabilities of given tokens: the label, or a few candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.statistics import (
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    finite_or_zero,
)


@register
@dataclass(frozen=True)
class LogProb(Functional):
    """log softmax(a)[id] for every id in ``inputs[ids]``, int64 [rows, k].

    Gradient: +1 at the id, -s everywhere.
    """

    looks_back = False
    ids: str = "labels"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Picked(self.ids)

    def outputs(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs[self.ids].shape[1]

    def value(self, stats: RowStats) -> Tensor:
        shifted = stats[Picked(self.ids)] - finite_or_zero(stats.maximum())
        return shifted - stats.total().log()

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(student=-grad.sum(0), sparse=[(stats.inputs[self.ids], grad.t())])
