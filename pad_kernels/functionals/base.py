"""The contract of a row functional, and the registry that recipes are read from.

A functional maps one row of logits to a few values through streaming statistics, and knows its
gradient with respect to the student's logits once those statistics are finished. It never sees how
many rows there are, how they are reduced, or the size of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pad_kernels.functionals.statistics import Block, Moment, RowStats, Statistic

Key = TypeVar("Key")


@dataclass
class LogitGradient:
    """Gradient with respect to the student's (transformed) logits, as per-row coefficients.

    With s_j the probabilities of stream j and a_j its logits, the gradient at vocabulary entry v is
    ``constant + s_0 (student + sum_j moments[j] (a_j - max_j)) + sum_j probabilities[j] s_j``, plus
    ``sparse`` entries, plus ``outside`` times the share of v among the tokens outside its ids,
    plus ``curved`` element-wise parts that are not of this form. Coefficients are [rows]; a sparse
    item is (ids [rows, k], values [rows, k]); ``outside`` is keyed by the name of the ids.

    ``centred`` holds what s_0 (x - E_0[x]) is multiplied by, for a moment of stream 0 whose factor
    is x. Backends get it as the other coefficients, see :meth:`settled`; where they walk over a row
    at once, the mean is not known before.
    """

    constant: Tensor | None = None
    student: Tensor | None = None
    moments: dict[int, Tensor] = field(default_factory=dict)
    probabilities: dict[int, Tensor] = field(default_factory=dict)
    sparse: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outside: dict[str, Tensor] = field(default_factory=dict)
    curved: list[tuple[Functional, Tensor]] = field(default_factory=list)
    centred: dict[Moment, Tensor] = field(default_factory=dict)

    def __add__(self, other: LogitGradient) -> LogitGradient:
        return LogitGradient(
            _add(self.constant, other.constant),
            _add(self.student, other.student),
            _add_all(self.moments, other.moments),
            _add_all(self.probabilities, other.probabilities),
            self.sparse + other.sparse,
            _add_all(self.outside, other.outside),
            self.curved + other.curved,
            _add_all(self.centred, other.centred),
        )

    def uncentred(self) -> LogitGradient:
        """The same but for the means of its centred terms."""
        found = replace(self, centred={})
        for moment, x in self.centred.items():
            parts = {j: c * x for j, c in enumerate(moment.coefficients) if c != 0}
            found = found + LogitGradient(moments=parts)
        return found

    def settled(self, stats: RowStats) -> LogitGradient:
        """The same without centred terms, their means taken from finished statistics.

        Whatever is less its mean is 0 where the student is certain of one entry, and rounding
        would be all that is left of it.
        """
        if not self.centred and not self.curved:
            return self
        certain = stats.total() == 1
        centred = {moment: x.masked_fill(certain, 0.0) for moment, x in self.centred.items()}
        curved = [(functional, g.masked_fill(certain, 0.0)) for functional, g in self.curved]
        found = replace(self, centred=centred, curved=curved).uncentred()
        for moment, x in centred.items():
            found = found + LogitGradient(student=-x * (stats[moment][0] / stats.total()))
        return found

    def rows(self, start: int, stop: int) -> LogitGradient:
        """The same gradient for rows start to stop, as views."""
        return LogitGradient(
            None if self.constant is None else self.constant[start:stop],
            None if self.student is None else self.student[start:stop],
            {j: x[start:stop] for j, x in self.moments.items()},
            {j: x[start:stop] for j, x in self.probabilities.items()},
            [(ids[start:stop], values[start:stop]) for ids, values in self.sparse],
            {name: x[start:stop] for name, x in self.outside.items()},
            [(functional, g[:, start:stop]) for functional, g in self.curved],
            {moment: x[start:stop] for moment, x in self.centred.items()},
        )

    def sorted_sparse(self) -> tuple[Tensor, Tensor] | None:
        """All sparse entries as one (ids, values) pair, ids ascending in each row."""
        if not self.sparse:
            return None
        ids = torch.cat([i for i, _ in self.sparse], 1)
        values = torch.cat([v for _, v in self.sparse], 1)
        if ids.shape[1] > 1:
            ids, order = ids.sort(dim=1, stable=True)
            values = values.gather(1, order)
        return ids.contiguous(), values.contiguous()


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _add_all(a: Mapping[Key, Tensor], b: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    joined = dict(a)
    for j, x in b.items():
        joined[j] = joined[j] + x if j in joined else x
    return joined


@dataclass(frozen=True)
class Functional:
    """One row functional; subclasses are frozen dataclasses of plain numbers and strings."""

    #: Whether the coefficients of its gradient are made of statistics. Where they are not, a
    #: backend may measure and differentiate a row at once.
    looks_back: ClassVar[bool] = True

    @property
    def teachers(self) -> tuple[int, ...]:
        """The streams it reads besides stream 0, the student's."""
        return ()

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that value and gradient read."""
        raise NotImplementedError

    def outputs(self, inputs: Mapping[str, Tensor]) -> int:
        """How many values there are per row."""
        return 1

    def value(self, stats: RowStats) -> Tensor:
        """Values [outputs, rows] from finished statistics."""
        raise NotImplementedError

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        """Gradient with respect to the logits, given that of the values, [outputs, rows]."""
        raise NotImplementedError

    def curved(self, block: Block, grad: Tensor, stats: RowStats) -> Tensor:
        """The element-wise gradient [rows, cols] that coefficients cannot express."""
        raise NotImplementedError


FunctionalType = TypeVar("FunctionalType", bound=type[Functional])
REGISTRY: dict[str, type[Functional]] = {}


def register(cls: FunctionalType) -> FunctionalType:
    """Make a functional known by its class name."""
    REGISTRY[cls.__name__] = cls
    return cls


def parameters(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass of plain data.

    Not ``asdict``: that copies them on Python 3.11 and before, and until torch 2.13 torch.compile
    cannot follow it.
    """
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}


def to_data(functional: Functional) -> list[Any]:
    """A functional as plain data: its name and parameters."""
    return [type(functional).__name__, parameters(functional)]


def from_data(data: list[Any]) -> Functional:
    """The functional that :func:`to_data` described."""
    name, parameters = data
    return REGISTRY[name](**parameters)
