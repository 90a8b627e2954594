"""Streaming row statistics: measured on a block of logits, merged associatively.

A block is some vocabulary entries of some rows. ``measure`` sees one block alone; ``merge`` joins
the statistics of two disjoint parts of the vocabulary, whether they come from the next chunk,
another thread or another rank. Every statistic is a float64 tensor [width, rows] (Argmax: int64),
so merging is the same code for all of them. Logits are float32 for all but float64 inputs; a
divergence of nearly equal models is the difference of two normalisers that agree to seven digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Block:
    """Logits of some rows over some vocabulary entries, one tensor [rows, cols] per stream.

    ``logits`` are transformed (bias, scale, soft cap, temperature) and in the accumulation dtype,
    by stream: rows that do not use a teacher lack its.
    ``inputs`` are per-row inputs such as ids, sliced to the same rows.
    """

    logits: Mapping[int, Tensor]
    offset: int
    inputs: Mapping[str, Tensor]
    _cache: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def maximum(self, stream: int) -> Tensor:
        """Largest logit of each row, [rows]."""
        key = ("max", stream)
        if key not in self._cache:
            self._cache[key] = self.logits[stream].amax(-1)
        return self._cache[key]

    def exp(self, stream: int) -> Tensor:
        """Exponentials of logit - row maximum, [rows, cols]; 0 in rows that are all -inf."""
        key = ("exp", stream)
        if key not in self._cache:
            reference = finite_or_zero(self.maximum(stream))
            self._cache[key] = torch.exp(self.logits[stream] - reference.unsqueeze(-1))
        return self._cache[key]

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Vocabulary ids to (column in this block, is it in this block)."""
        local = ids - self.offset
        inside = (local >= 0) & (local < self.logits[0].shape[-1])
        return torch.where(inside, local, 0), inside

    def listed(self, ids: Tensor) -> Tensor:
        """Which entries [rows, cols] are among the vocabulary ids [rows, k]."""
        columns, inside = self.columns(ids)
        found = torch.zeros_like(self.logits[0], dtype=torch.uint8)
        return found.scatter_reduce_(1, columns, inside.to(torch.uint8), "amax").bool()


def finite_or_zero(maximum: Tensor) -> Tensor:
    """A reference to subtract: the maximum, or 0 where everything is -inf (so nothing is NaN)."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


class RowStats(dict["Statistic", Tensor]):
    """Statistics of a set of rows, and the per-row inputs they belong to."""

    def __init__(self, values: Mapping[Statistic, Tensor], inputs: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.inputs = inputs

    def maximum(self, stream: int = 0) -> Tensor:
        """Largest logit, [rows]."""
        return self[Normalizer(stream)][0]

    def total(self, stream: int = 0) -> Tensor:
        """Sum of exp(logit - maximum), [rows]."""
        return self[Normalizer(stream)][1]

    def logsumexp(self, stream: int = 0) -> Tensor:
        """The row's log normaliser, [rows]."""
        return finite_or_zero(self.maximum(stream)) + self.total(stream).log()

    def logprobs(self, stream: int, logits: Tensor) -> Tensor:
        """Log-probabilities [rows, cols] of logits [rows, cols].

        Less the maximum first: subtracting a large normaliser at once would round twice as coarsely
        as the logits themselves.
        """
        numbers = finite_or_zero(self.maximum(stream)), self.total(stream).double().log()
        maximum, lse = (x.to(logits.dtype).unsqueeze(-1) for x in numbers)
        return logits - maximum - lse

    def ascending(self, name: str) -> Tensor:
        """Per-row ids [rows, k] as kernels walk them: ascending, contiguous."""
        return self.inputs[name].sort(dim=1).values.contiguous()  # sorting keeps the layout

    def to(self, dtype: torch.dtype) -> RowStats:
        """The same statistics, numbers rounded to a dtype."""
        values = {s: x.to(dtype) if x.is_floating_point() else x for s, x in self.items()}
        return RowStats(values, self.inputs)

    def rows(self, start: int, stop: int) -> RowStats:
        """The same statistics for rows start to stop, as views."""
        values = {statistic: value[:, start:stop] for statistic, value in self.items()}
        return RowStats(values, {name: x[start:stop] for name, x in self.inputs.items()})


@dataclass(frozen=True)
class Statistic:
    """One streaming statistic. Equal statistics of several functionals are computed once."""

    #: 1: from logits alone. 2: from log-probabilities, once the normalisers are known.
    sweep = 1

    def width(self, inputs: Mapping[str, Tensor]) -> int:
        """How many numbers there are per row."""
        return 1

    def empty(self, rows: int, inputs: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The statistic of no vocabulary entries: merge's neutral element."""
        return like.new_zeros(self.width(inputs), rows)

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        """The statistic of one block; ``first`` holds the finished first sweep in the second."""
        raise NotImplementedError

    def merge(self, a: RowStats, b: RowStats, merged: RowStats) -> Tensor:
        """Join two disjoint parts; ``merged`` already holds the joined normalisers."""
        return a[self] + b[self]


def _merge_normalizers(a: Tensor, b: Tensor) -> Tensor:
    maximum = torch.maximum(a[0], b[0])
    reference = finite_or_zero(maximum)
    total = a[1] * torch.exp(a[0] - reference) + b[1] * torch.exp(b[0] - reference)
    return torch.stack((maximum, total))


@dataclass(frozen=True)
class Normalizer(Statistic):
    """(max, sum of exp(logit - max)) of one stream."""

    stream: int = 0

    def width(self, inputs: Mapping[str, Tensor]) -> int:
        return 2

    def empty(self, rows: int, inputs: Mapping[str, Tensor], like: Tensor) -> Tensor:
        state = like.new_zeros(2, rows)
        state[0].fill_(-torch.inf)
        return state

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        total = block.exp(self.stream).sum(-1, dtype=torch.float64)
        return torch.stack((block.maximum(self.stream).double(), total))

    def merge(self, a: RowStats, b: RowStats, merged: RowStats) -> Tensor:
        return _merge_normalizers(a[self], b[self])


@dataclass(frozen=True)
class Moment(Statistic):
    """Sum of exp(a_w - max_w) * sum_j c_j (a_j - max_j): an expectation, not yet normalised.

    Shifting by the maxima keeps divergences free of cancellation between large normalisers.
    """

    stream: int
    coefficients: tuple[float, ...]

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        weight = block.exp(self.stream)
        factor = torch.zeros_like(weight)
        for j, c in enumerate(self.coefficients):
            if c != 0:
                factor += c * (block.logits[j] - finite_or_zero(block.maximum(j)).unsqueeze(-1))
        terms = torch.where(weight == 0, 0.0, weight * factor)
        return terms.sum(-1, dtype=torch.float64).unsqueeze(0)

    def merge(self, a: RowStats, b: RowStats, merged: RowStats) -> Tensor:
        parts = [self._shifted(side, merged) for side in (a, b)]
        return (parts[0] + parts[1]).unsqueeze(0)

    def _shifted(self, side: RowStats, merged: RowStats) -> Tensor:
        """This side's moment relative to the merged maxima; sides without mass count 0."""
        target = finite_or_zero(merged.maximum(self.stream))
        scale = torch.exp(side.maximum(self.stream) - target)
        shift = torch.zeros_like(scale)
        for j, c in enumerate(self.coefficients):
            if c != 0:
                own, joined = finite_or_zero(side.maximum(j)), finite_or_zero(merged.maximum(j))
                shift += c * (own - joined)
        mass = side.total(self.stream)
        moved = scale * (side[self][0] + shift * mass)
        return torch.where(scale * mass == 0, 0.0, moved)


def log_ratio(over: int, under: int) -> tuple[float, ...]:
    """Coefficients of a moment: the logits of stream ``over`` less those of ``under``."""
    signs = {over: 1.0, under: -1.0}
    return tuple(signs.get(j, 0.0) for j in range(max(over, under) + 1))


@dataclass(frozen=True)
class Total(Statistic):
    """Sum of the student's logits."""

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        return block.logits[0].sum(-1, dtype=torch.float64).unsqueeze(0)


@dataclass(frozen=True)
class Argmax(Statistic):
    """Vocabulary id of the student's largest logit, the lowest id among equals; int64."""

    def empty(self, rows: int, inputs: Mapping[str, Tensor], like: Tensor) -> Tensor:
        return like.new_full((1, rows), -1, dtype=torch.int64)

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        # torch.argmax does not promise the first of equal maxima.
        is_max = block.logits[0] == block.maximum(0).unsqueeze(-1)
        return (is_max.to(torch.uint8).argmax(-1) + block.offset).unsqueeze(0)

    def merge(self, a: RowStats, b: RowStats, merged: RowStats) -> Tensor:
        ours, theirs = a.maximum(), b.maximum()
        first = torch.where(b[self] >= 0, torch.minimum(a[self], b[self]), a[self])
        keep = (ours > theirs) | (b[self] < 0)
        return torch.where(
            (a[self] >= 0) & keep,
            a[self],
            torch.where((ours == theirs) & (a[self] >= 0), first, b[self]),
        )


@dataclass(frozen=True)
class Picked(Statistic):
    """Student logits at given vocabulary ids: ``inputs[ids]`` is int64 [rows, k]."""

    ids: str

    def width(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs[self.ids].shape[1]

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        columns, inside = block.columns(block.inputs[self.ids])
        return torch.where(inside, block.logits[0].gather(1, columns), 0.0).t()


@dataclass(frozen=True)
class Tail(Statistic):
    """Normaliser of the student's logits outside the given ids: never 1 minus their mass."""

    ids: str

    def width(self, inputs: Mapping[str, Tensor]) -> int:
        return 2

    def empty(self, rows: int, inputs: Mapping[str, Tensor], like: Tensor) -> Tensor:
        return Normalizer(0).empty(rows, inputs, like)

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        rest = block.logits[0].masked_fill(block.listed(block.inputs[self.ids]), -torch.inf)
        maximum = rest.amax(-1)
        rest = torch.exp(rest - finite_or_zero(maximum).unsqueeze(-1))
        return torch.stack((maximum.double(), rest.sum(-1, dtype=torch.float64)))

    def merge(self, a: RowStats, b: RowStats, merged: RowStats) -> Tensor:
        return _merge_normalizers(a[self], b[self])


@dataclass(frozen=True)
class Largest(Statistic):
    """The k largest student logits, largest first, lowest id among equals.

    Stored as values [k, rows] over ids [k, rows], both float64; unused places hold -inf and id -1.
    """

    k: int

    def width(self, inputs: Mapping[str, Tensor]) -> int:
        return 2 * self.k

    def empty(self, rows: int, inputs: Mapping[str, Tensor], like: Tensor) -> Tensor:
        state = like.new_full((2 * self.k, rows), -torch.inf)
        state[self.k :] = -1
        return state

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        logits = block.logits[0]
        count = min(self.k, logits.shape[1])
        values, columns = _first_largest(logits, count)
        state = self.empty(logits.shape[0], block.inputs, logits.double()[:0])
        state[:count] = values.t()
        state[self.k : self.k + count] = (columns + block.offset).t().to(state.dtype)
        return state

    def merge(self, a: RowStats, b: RowStats, merged: RowStats) -> Tensor:
        values = torch.cat((a[self][: self.k], b[self][: self.k]))
        ids = torch.cat((a[self][self.k :], b[self][self.k :]))
        # Real entries before unused places, then by value, then by id: three stable sorts, the
        # least important first, each of what the one before left.
        for key in (lambda v, i: i, lambda v, i: -v, lambda v, i: (i < 0).to(i.dtype)):
            order = key(values, ids).sort(dim=0, stable=True).indices
            values, ids = values.gather(0, order), ids.gather(0, order)
        return torch.cat((values[: self.k], ids[: self.k]))


def _first_largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk over the last dimension, with the lowest index among equal values."""
    if logits.dtype != torch.float32:
        values, columns = logits.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], columns[:, :k]
    # One integer orders (value, -column): the float's bits made monotone, then the column.
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    columns = torch.arange(logits.shape[1], device=logits.device)
    best = ((ordered << 32) - columns).topk(k, -1, sorted=True).values
    found = -best & 0xFFFFFFFF
    return logits.gather(1, found), found


def empty_stats(
    statistics: Iterable[Statistic], rows: int, inputs: Mapping[str, Tensor], device: torch.device
) -> RowStats:
    """Neutral statistics for ``rows`` rows."""
    like = torch.empty(0, dtype=torch.float64, device=device)
    return RowStats({s: s.empty(rows, inputs, like) for s in statistics}, inputs)


def measure(statistics: Iterable[Statistic], block: Block, first: RowStats | None) -> RowStats:
    """The statistics of one block alone."""
    found = {s: s.measure(block, first) for s in statistics}
    return RowStats(
        {s: x.double() if x.is_floating_point() else x for s, x in found.items()}, block.inputs
    )


def merge(a: RowStats, b: RowStats) -> RowStats:
    """Join the statistics of two disjoint parts of the vocabulary. Associative."""
    merged = RowStats({}, a.inputs)
    for statistic in sorted(a, key=lambda s: not isinstance(s, Normalizer)):
        merged[statistic] = statistic.merge(a, b, merged)
    return merged
