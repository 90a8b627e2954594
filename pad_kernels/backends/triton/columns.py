"""A row's numbers as kernels take them: side by side, each at a place known when they compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pad_kernels.backends.triton.gradient import DIVERGENCES
from pad_kernels.functionals import Divergence
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import Normalizer, RowStats, Tail, finite_or_zero


class Columns:
    """Per-row numbers, and the place of each; -1 is the place of none.

    Args:
        stats: of the rows.
        used: the streams that the kernel reads, in its order.
    """

    def __init__(self, stats: RowStats, used: Sequence[int]) -> None:
        self._stats, self._used = stats, used
        self._found: list[Tensor] = []

    @property
    def count(self) -> int:
        return len(self._found)

    def packed(self) -> Tensor:
        """[count, rows] float32."""
        return torch.stack([x.float() for x in self._found])

    def _add(self, numbers: Tensor | None) -> int:
        if numbers is None:
            return -1
        self._found.append(numbers)
        return len(self._found) - 1

    def streams(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Places of what logits are relative to, and of 1 / sum, of each stream."""
        known = [self._stats.get(Normalizer(j)) for j in self._used]
        shifts = tuple(self._add(None if n is None else finite_or_zero(n[0])) for n in known)
        return shifts, tuple(self._add(None if n is None else _inverse(n[1])) for n in known)

    def linear(self, terms: LogitGradient) -> dict[str, Any]:
        """Places of what every stream and the linear terms of a gradient need, as constants."""
        shifts, inverses = self.streams()
        return {
            "SHIFTS": shifts,
            "INVERSES": inverses,
            "CONSTANT": self._add(terms.constant),
            "STUDENT": self._add(terms.student),
            "MOMENTS": tuple(self._add(terms.moments.get(j)) for j in self._used),
            "SHARES": tuple(self._share(j, terms.probabilities.get(j)) for j in self._used),
        }

    def _share(self, j: int, factor: Tensor | None) -> int:
        if factor is None:
            return -1
        return self._add(factor * _inverse(self._stats[Normalizer(j)][1]))

    def log_sums(self, teacher: int) -> int:
        """Place of the logarithm of a teacher's sum over the student's."""
        return self._add((self._stats.total(teacher) / self._stats.total()).log())

    def outside(self, terms: LogitGradient) -> tuple[tuple[int, ...], Tensor | None]:
        """What the tokens outside some ids share: places of their maximum and of a value; the ids.

        The ids are [rows, k], ascending.
        """
        name = next(iter(terms.outside), None)
        if name is None:
            return (), None
        maximum, total = self._stats[Tail(name)]
        value = torch.where(total == 0, 0.0, terms.outside[name] / total)
        places = self._add(finite_or_zero(maximum)), self._add(value)
        return places, self._stats.ascending(name)

    def curved(self, curved: Sequence[tuple[Divergence, Tensor]]) -> tuple[int, ...]:
        """The teacher's place among the streams, the kind's number, and places of numbers."""
        if not curved:
            return ()
        functional, grad = curved[0]
        places = self._used.index(functional.teacher), DIVERGENCES.index(functional.kind)
        numbers = self._add(grad[0]), self._add(self._stats[functional.outcomes][1])
        return *places, *numbers, self.log_sums(functional.teacher)


def _inverse(total: Tensor) -> Tensor:
    """1 / sum, where a row without any mass has probabilities of 0."""
    return torch.where(total == 0, 0.0, 1 / total)
