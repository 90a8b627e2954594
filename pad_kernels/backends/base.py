"""The contract of a backend: what it does with blocks of logits, and what it may offer besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pad_kernels.engine.problem import Problem
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Tail,
    Total,
)
from pad_kernels.heads import HeadOptions

#: Statistics that every backend with kernels of its own measures in its row passes.
ROW_PASS_STATISTICS = (Normalizer, Moment, Total, Argmax, Tail, Outcomes)
#: Streams of one row pass: the student and three teachers.
ROW_PASS_STREAMS = 4


@dataclass(frozen=True)
class RawBlock:
    """Raw logits of some rows, before bias and head transform, over a range of the vocabulary.

    Args:
        problem: whose streams they are.
        stats: of these rows.
        logits: [rows, cols] for each stream that the rows use, the student's among them.
        offset: vocabulary entry of the first column.
    """

    problem: Problem
    stats: RowStats
    logits: dict[int, Tensor]
    offset: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        rows, cols = self.logits[0].shape
        return rows, cols

    @property
    def device(self) -> torch.device:
        """Where the logits lie."""
        return self.logits[0].device

    def normalizer(self, stream: int) -> Tensor:
        """(max, sum) of a stream, [2, rows]; a scratch pair where no functional asked for one."""
        if (state := self.stats.get(Normalizer(stream))) is not None:
            return state
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        return Normalizer(stream).empty(self.shape[0], {}, like)


class Backend(Protocol):
    """Row passes over blocks of raw logits."""

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        """Why this backend cannot do the recipe; None if it can. Never touches tensors."""
        ...

    def transform(self, head: HeadOptions, raw: Tensor) -> Tensor:
        """A few raw logits, bias added, behind the head transform: the bits that ``measure`` sees.

        A label's logit and its normaliser must be the same function of the same product, or a
        confident log-prob comes out above 0.
        """
        ...

    def measure(self, block: RawBlock, wanted: list[Statistic]) -> None:
        """Merge the block into the wanted running statistics."""
        ...

    def gradient(
        self, block: RawBlock, gradient: LogitGradient, out: Tensor, bound: Tensor | None
    ) -> Tensor | None:
        """Write the gradient with respect to the student's raw logits to ``out`` [rows, cols].

        ``out`` may be the student's logits; where its rows are padded (``engine.plan.row_pitch``),
        the padding may be overwritten. With a filter's ``bound`` (0-d) the largest magnitudes
        of its tiles are returned: [column tiles] over all rows, or [row tiles, column tiles].
        """
        ...


@dataclass(frozen=True)
class HiddenRows:
    """Some rows before their logits are made.

    Args:
        problem: whose streams they are.
        stats: of these rows.
        hidden: [rows, H] for each stream that the rows use, the student's among them.
    """

    problem: Problem
    stats: RowStats
    hidden: dict[int, Tensor]


@runtime_checkable
class FusedBackend(Protocol):
    """What a backend may offer besides: products and row work in one, no logits in memory."""

    def fuses(self, rows: HiddenRows, wanted: list[Statistic], chunk: int) -> bool:
        """Whether it does so for these statistics, and the gradient that goes with them.

        Both or none: a gradient has to see logits that were rounded as those of its statistics.
        ``chunk`` is how many logits of every row and stream the plan has room for.
        """
        ...

    def measure_products(
        self, rows: HiddenRows, wanted: list[Statistic], room: Tensor, chunk: int
    ) -> None:
        """Fill the wanted statistics over the whole vocabulary.

        ``room`` is the plan's for ``chunk`` logits of every row and stream, to be used at will.
        """
        ...

    def differentiate_products(
        self,
        rows: HiddenRows,
        weights: dict[int, Tensor],
        offset: int,
        gradient: LogitGradient,
        out: Tensor,
        bound: Tensor | None,
    ) -> Tensor | None:
        """As :meth:`Backend.gradient`, of the vocabulary entries from ``offset``.

        ``weights`` has their weight rows [cols, H] for each stream. With a filter, tiles below its
        bound may be left unwritten; then no bias gradient is wanted.
        """
        ...


class LiveTiles(Protocol):
    """A block of dL/dz [rows, cols] of which only the tiles that reach the filter's bound count.

    Which they are is decided on the device. ``index`` says which row of the weight, or of its
    gradient, each column is; None: the first is the first.
    """

    def times_weight(
        self, total: Tensor, weight: Tensor, index: Tensor | None, *, add: bool
    ) -> None:
        """Total [rows, H] = dz @ weight[index], or added to it."""
        ...

    def times_hidden(
        self,
        total: Tensor,
        hidden: Tensor,
        index: Tensor | None,
        *,
        add: bool,
        scale: Tensor | None = None,
    ) -> None:
        """Rows ``index`` of the total [V, H] = dz.T @ hidden * scale, or added to it.

        ``scale`` is a power of two (0-d): a total in half precision gets what it can hold.
        """
        ...


@runtime_checkable
class FilteringBackend(Protocol):
    """What a backend may offer besides: products that leave out the tiles that the filter does."""

    def live_tiles(
        self, problem: Problem, hidden: Tensor, dz: Tensor, peaks: Tensor, bound: Tensor
    ) -> LiveTiles | None:
        """The block's live tiles; None where it has no such products for these matrices.

        It has them for every gradient that :class:`FusedBackend` made.
        """
        ...


@runtime_checkable
class WalkingBackend(Protocol):
    """What a backend may offer besides: statistics and gradient in one walk over each row."""

    def walks(self, wanted: list[Statistic]) -> bool:
        """Whether it does so for these statistics."""
        ...

    def walk(
        self,
        block: RawBlock,
        wanted: list[Statistic],
        gradient: LogitGradient,
        out: Tensor,
        bound: Tensor | None,
    ) -> Tensor | None:
        """As :meth:`Backend.gradient`, after measuring both sweeps of a whole vocabulary's block.

        The gradient's coefficients were made without these statistics. The logits are no longer
        needed: a teacher's may be overwritten, too.
        """
        ...


@dataclass(frozen=True)
class GivenTokens:
    """A few tokens of every row, whose logits are wanted and no others.

    Args:
        hidden: [N, H].
        weight: [V, H].
        ids: int64 [N, k], contiguous.
        counted: bool [N]; ids of the other rows may be anything.
    """

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    counted: Tensor


@runtime_checkable
class GatheringBackend(Protocol):
    """What a backend may offer besides: given tokens' logits, from their rows of the weight."""

    def gathers(self, hidden: Tensor) -> bool:
        """Whether it does so for hidden states of this dtype and device."""
        ...

    def gather_logits(self, given: GivenTokens, out: Tensor) -> None:
        """Write products of the counted rows to ``out`` [N, k], zeros in the accumulation dtype."""
        ...

    def gather_gradients(
        self,
        given: GivenTokens,
        grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        workspace: Workspace,
    ) -> None:
        """Write gradients, given those of the products [N, k], to ``hidden`` and ``weight``.

        Both are zeros so far, and one that is not wanted is empty.
        """
        ...


def beyond_row_passes(recipe: Recipe, room: Mapping[type[Statistic], int]) -> str | None:
    """Why row passes cannot do the recipe; None if they can.

    Args:
        recipe: the op.
        room: how many of a kind of statistic one pass takes, where that is limited.
    """
    if len(recipe.heads) > ROW_PASS_STREAMS:
        return f"a row pass has room for {ROW_PASS_STREAMS} streams"
    for functional in recipe.functionals:
        for statistic in functional.statistics:
            if not isinstance(statistic, (*ROW_PASS_STATISTICS, Picked)):
                name = type(functional).__name__
                return f"{name} needs {type(statistic).__name__}, which has no row pass yet"
    for kind, most in room.items():
        if sum(isinstance(s, kind) for s in recipe.statistics) > most:
            return f"a row pass has room for {most} of {kind.__name__}"
    return None
