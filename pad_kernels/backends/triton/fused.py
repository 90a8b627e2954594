"""Launching the fused kernels: what a recipe measures, block sizes, arguments and grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pad_kernels.backends.triton.fused_stats import fused_statistics_kernel, merge_splits_kernel
from pad_kernels.backends.triton.math import CAPPED, IDENTITY, LINEAR
from pad_kernels.engine.problem import Stream
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Total,
)
from pad_kernels.heads import HeadOptions


@dataclass(frozen=True)
class Tiling:
    """Block sizes of a kernel that multiplies, with its reason.

    Args:
        rows: token rows of a tile.
        cols: vocabulary entries of a tile.
        depth: hidden features of one step of the product.
        warps: of 32 threads.
        stages: steps whose tiles are in shared memory at a time.
        group: token tiles side by side, see :func:`tiles.place`.
        reason: why these.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int
    reason: str


@dataclass(frozen=True)
class Measured:
    """Which statistics a launch measures, of streams by their place among those of the part.

    Args:
        streams: the streams' numbers in the recipe.
        moments: the moments among the wanted statistics.
        total: whether the sum of the student's logits is wanted.
        argmax: whether the greedy token is.
        picked: the picked logits, if any.
    """

    streams: tuple[int, ...]
    moments: tuple[Moment, ...]
    total: bool
    argmax: bool
    picked: Picked | None

    @staticmethod
    def of(streams: tuple[int, ...], wanted: Sequence[Statistic]) -> Measured | None:
        """What to measure; None if some statistic is not among those that stay on the chip."""
        picked = [s for s in wanted if isinstance(s, Picked)]
        known = (Normalizer, Moment, Total, Argmax, Picked)
        if len(picked) > 1 or not all(isinstance(s, known) for s in wanted):
            return None
        moments = tuple(s for s in wanted if isinstance(s, Moment))
        return Measured(
            streams, moments, Total() in wanted, Argmax() in wanted, picked[0] if picked else None
        )

    @property
    def slots(self) -> list[tuple[Statistic, int]]:
        """(statistic, which of its numbers) of each number of a state, in the kernels' order."""
        found: list[tuple[Statistic, int]] = []
        found += [(Normalizer(j), 0) for j in self.streams]
        found += [(Normalizer(j), 1) for j in self.streams]
        found += [(moment, 0) for moment in self.moments]
        found += [(Total(), 0)] * self.total
        found += [(Argmax(), 0)] * self.argmax
        return found

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that both kernels share."""
        coefficients = [
            moment.coefficients[j] if j < len(moment.coefficients) else 0.0
            for moment in self.moments
            for j in self.streams
        ]
        return {
            "WEIGHTS": tuple(self.streams.index(moment.stream) for moment in self.moments),
            "COEFFICIENTS": tuple(coefficients),
            "TOTAL": self.total,
            "ARGMAX": self.argmax,
        }


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it takes to start it, or to compile it ahead of time."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Start it on the current stream."""
        self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Operands:
    """The matrices and heads of some streams as kernels take them, for some rows."""

    hidden: list[Tensor]  # (rows, H) for each stream
    weight: list[Tensor]  # (V, H)
    biases: tuple[Tensor | None, ...]  # (V,) float32
    heads: list[HeadOptions]

    @staticmethod
    def of(streams: Sequence[Stream], hidden: dict[int, Tensor]) -> Operands:
        """Of the streams that ``hidden`` has."""
        used = [streams[j] for j in hidden]
        return Operands(
            list(hidden.values()),
            [s.weight for s in used],
            tuple(s.bias for s in used),
            [s.head for s in used],
        )

    @property
    def copyable(self) -> bool:
        """Whether the copy engine takes every matrix: rows that start at multiples of 16 bytes."""
        return all(
            x.stride(0) * x.element_size() % 16 == 0
            and (x.device.type == "meta" or x.data_ptr() % 16 == 0)
            for x in (*self.hidden, *self.weight)
        )

    def arguments(self, tiling: Tiling, *, tma: bool) -> dict[str, Any]:
        """Arguments that the kernels share."""
        found: dict[str, Any] = {}
        for j in range(3):
            pair = (None, None)
            if j < len(self.hidden):
                pair = self.hidden[j], self.weight[j]
                if tma:
                    sizes = (tiling.rows, tiling.cols)
                    pair = tuple(
                        TensorDescriptor(x, list(x.shape), list(x.stride()), [size, tiling.depth])
                        for x, size in zip(pair, sizes, strict=True)
                    )
            found[f"hidden{j}"], found[f"weight{j}"] = pair
        pairs = zip(self.hidden, self.weight, strict=True)
        found["biases"] = self.biases
        found["shapes"] = tuple((h.shape[1], h.stride(0), w.stride(0)) for h, w in pairs)
        found["heads"] = tuple(
            (float(h.logit_scale), float(h.softcap or 1.0), float(h.temperature))
            for h in self.heads
        )
        found["rows"], found["vocab"] = self.hidden[0].shape[0], self.weight[0].shape[0]
        return found

    def constants(self, tiling: Tiling, *, tma: bool) -> dict[str, Any]:
        """Constants that the kernels share."""
        return {
            "KINDS": tuple(_kind(head) for head in self.heads),
            "BLOCK_M": tiling.rows,
            "BLOCK_N": tiling.cols,
            "BLOCK_K": tiling.depth,
            "GROUP": tiling.group,
            "TMA": tma,
        }


def _kind(head: HeadOptions) -> int:
    if head.softcap is not None:
        return CAPPED
    return IDENTITY if head.logit_scale == 1.0 == head.temperature else LINEAR


def options_of(tiling: Tiling) -> dict[str, Any]:
    """Compile options."""
    return {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": False}


def choose_splits(row_tiles: int, col_tiles: int, processors: int, group: int, most: int) -> int:
    """Into how many parts to split the vocabulary.

    At least so many that one group of token tiles keeps every processor busy; among up to four
    times that, the number that leaves the fewest idle in the last round.
    """
    least = -(-processors // min(group, row_tiles))
    most = max(min(most, col_tiles), 1)
    candidates = range(min(least, most), min(4 * least, most) + 1)

    def rounds(splits: int) -> int:
        """Column tiles that the busiest processor goes through."""
        return -(-row_tiles * splits // processors) * -(-col_tiles // splits)

    return min(candidates, key=lambda splits: (rounds(splits), splits))


def statistics_launches(
    measured: Measured,
    operands: Operands,
    tiling: Tiling,
    stats: RowStats,
    partial: Tensor,
    *,
    tma: bool,
) -> tuple[Launch, Launch]:
    """The two launches that fill ``stats``; ``partial`` is [splits, slots, rows] float64."""
    rows, vocab = operands.hidden[0].shape[0], operands.weight[0].shape[0]
    col_tiles = -(-vocab // tiling.cols)
    split_cols = -(-col_tiles // partial.shape[0]) * tiling.cols
    splits = -(-vocab // split_cols)
    ids, picks = None, None
    if measured.picked is not None:
        ids = stats.inputs[measured.picked.ids].contiguous()
        target = stats[measured.picked]
        picks = target, ids.shape[1], target.stride(0)
    arguments = {
        **operands.arguments(tiling, tma=tma),
        "ids": ids,
        "picks": picks,
        "partial": partial,
        "split_cols": split_cols,
    }
    constants = {**measured.constants, **operands.constants(tiling, tma=tma)}
    grid = -(-rows // tiling.rows) * splits
    first = Launch(fused_statistics_kernel, grid, arguments, constants, options_of(tiling))
    targets = tuple(stats[s][i] if s in stats else None for s, i in measured.slots)
    arguments = {"partial": partial, "targets": targets, "rows": rows, "splits": splits}
    constants = {**measured.constants, "STREAMS": len(measured.streams), "BLOCK_M": 128}
    second = Launch(
        merge_splits_kernel,
        -(-rows // 128),
        arguments,
        constants,
        {"num_warps": 4, "enable_fp_fusion": False},
    )
    return first, second
