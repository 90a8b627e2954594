"""The row passes over logits in memory, as launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pad_kernels.backends.base import RawBlock
from pad_kernels.backends.triton import autotune, configs, gradient, statistics
from pad_kernels.backends.triton.columns import Columns
from pad_kernels.backends.triton.launch import Device, Launch, head_kind, reach
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals import Divergence
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import Argmax, Moment, Statistic, Tail, Total
from pad_kernels.heads import HeadOptions

_VALUES = 1024


class Passes:
    """The passes over one block of raw logits."""

    def __init__(self, block: RawBlock, device: Device) -> None:
        self.block, self.stats, self.device = block, block.stats, device
        self.rows, self.cols = block.shape

    def _streams(self, used: Sequence[int]) -> dict[str, Any]:
        """The arguments that describe the streams in use."""
        logits, streams = self.block.logits, self.block.problem.streams
        start, stop = self.block.offset, self.block.offset + self.cols
        biases = [streams[j].bias for j in used]
        return {
            "logits": tuple(logits[j] for j in used),
            "strides": tuple(logits[j].stride(0) for j in used),
            "biases": tuple(None if b is None else b[start:stop] for b in biases),
            "heads": tuple(streams[j].head.numbers for j in used),
            "rows": self.rows,
            "cols": self.cols,
            "reach": reach(self.cols, *(logits[j] for j in used)),
        }

    def _kinds(self, used: Sequence[int]) -> tuple[int, ...]:
        return tuple(head_kind(self.block.problem.streams[j].head) for j in used)

    def _measured(
        self,
        name: str,
        used: Sequence[int],
        shipped: configs.RowConfig,
        trials: Sequence[configs.RowConfig],
        attempt: Callable[[configs.RowConfig, Workspace], list[Launch]],
    ) -> configs.RowConfig:
        """The shape of a pass over some streams: shipped, or the fastest if that was asked for."""
        like = self.block.logits[0]
        dtype = str(like.dtype).removeprefix("torch.")
        heads = "".join(map(str, self._kinds(used)))
        key = f"{name}/{dtype}/heads {heads}/{autotune.shape_class(self.rows, self.cols)}"
        return autotune.choose(key, like, shipped, trials, attempt)

    def _split(
        self, config: configs.RowConfig, rows: int | None = None
    ) -> tuple[int, int, dict[str, int]]:
        """Tiles of a program, programs of each of some rows, and the tile's constants."""
        rows, itemsize = rows or self.rows, self.block.logits[0].element_size()
        tile = config.tile(itemsize)
        tiles = configs.tiles_of_split(rows, self.cols, tile, self.device.multiprocessors)
        shape = {"DEPTH": config.depth, "LANES": config.lanes(itemsize)}
        return tiles, -(-self.cols // (tiles * tile)), shape

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.block.device)

    def statistics(
        self, wanted: Sequence[Statistic], config: configs.RowConfig | None = None
    ) -> tuple[Launch, Launch]:
        """Launches that merge this block into first-sweep statistics; the first adds nothing."""
        used = sorted(self.block.logits)
        moments = [s for s in wanted if isinstance(s, Moment)]
        tails = [s for s in wanted if isinstance(s, Tail)]
        total = tuple(self.stats[s][0] for s in wanted if isinstance(s, Total))
        greedy = next((self.stats[s][0] for s in wanted if isinstance(s, Argmax)), None)
        tail = tuple(x for s in tails for x in self.stats[s].unbind())
        config = config or self._measured(
            f"row statistics/{len(moments)}{len(total)}{len(tail)}{int(greedy is not None)}",
            used,
            configs.statistics_config(self.device.capability, len(used)),
            configs.TRIALS[len(used)],
            lambda tried, scratch: [self.statistics(wanted, tried)[0]],
        )
        tiles, splits, shape = self._split(config)
        fields = 2 * len(used) + len(moments) + len(total) + len(tail) + (greedy is not None)
        normalizers = [self.block.normalizer(j) for j in used]
        ids = self.stats.ascending(tails[0].ids) if tails else None
        parts = {
            "partial": self._empty(fields, splits, self.rows, dtype=torch.float64),
            "best": None if greedy is None else self._empty(splits, self.rows, dtype=torch.int32),
            "rows": self.rows,
            "offset": self.block.offset,
        }
        padded = [[*m.coefficients, *[0.0] * (max(used) + 1)] for m in moments]
        constants = {
            "WEIGHTS": tuple(used.index(m.stream) for m in moments),
            "COEFFICIENTS": tuple(float(row[j]) for row in padded for j in used),
        }
        measure = Launch(
            statistics.row_statistics,
            (self.rows, splits),
            {
                **self._streams(used),
                **parts,
                "ids": ids,
                "count": 0 if ids is None else ids.shape[1],
                "tiles": tiles,
            },
            {**constants, **shape, "KINDS": self._kinds(used), "TOTAL": bool(total)},
            config.warps,
        )
        merge = Launch(
            statistics.merge_statistics,
            (-(-self.rows // configs.MERGE_ROWS),),
            {
                **parts,
                "maxima": tuple(n[0] for n in normalizers),
                "sums": tuple(n[1] for n in normalizers),
                "moments": tuple(self.stats[m][0] for m in moments),
                "total": total,
                "tail": tail,
                "argmax": greedy,
                "splits": splits,
            },
            {**constants, "BLOCK": configs.MERGE_ROWS},
        )
        return measure, merge

    def outcomes(
        self, statistic: Outcomes, config: configs.RowConfig | None = None
    ) -> tuple[Launch, Tensor]:
        """The launch of a second sweep, and where it puts its sums [2, splits, rows]."""
        used = [0, statistic.teacher]
        config = config or self._measured(
            f"row outcomes/{statistic.kind}",
            used,
            configs.OUTCOMES,
            configs.OUTCOMES_TRIALS,
            lambda tried, scratch: [self.outcomes(statistic, tried)[0]],
        )
        tiles, splits, shape = self._split(config)
        columns = Columns(self.stats, used)
        assert columns.streams() == ((0, 1), (2, 3))
        columns.log_sums(statistic.teacher)
        partial = self._empty(2, splits, self.rows, dtype=torch.float64)
        launch = Launch(
            gradient.row_outcomes,
            (self.rows, splits),
            {
                **self._streams(used),
                "coefficients": columns.packed(),
                "mix": (statistic.alpha, 1.0 - statistic.alpha),
                "partial": partial,
                "tiles": tiles,
            },
            {
                **shape,
                "KINDS": self._kinds(used),
                "DIVERGENCE": gradient.DIVERGENCES.index(statistic.kind),
            },
            config.warps,
        )
        return launch, partial

    def gradient(
        self,
        terms: LogitGradient,
        out: Tensor,
        peaks: Tensor | None,
        config: configs.RowConfig | None = None,
    ) -> Launch:
        """The launch that writes the gradient with respect to the student's raw logits."""
        assert not terms.centred, "a settled gradient is wanted"
        curved = [(f, g) for f, g in terms.curved if isinstance(f, Divergence)]
        read = {0, *terms.moments, *terms.probabilities, *(f.teacher for f, _ in curved)}
        used = sorted(read)
        config = config or self._measured(
            f"row gradient/{len(terms.moments)}{len(terms.probabilities)}{len(terms.outside)}"
            + "".join(f.kind for f, _ in curved),
            used,
            configs.gradient_config(len(used), bool(curved)),
            configs.OUTCOMES_TRIALS if curved else configs.TRIALS[len(used)],
            lambda tried, scratch: [
                self._elsewhere(self.gradient(terms, out, peaks, tried), tried, scratch)
            ],
        )
        columns = Columns(self.stats, used)
        tiles, splits, shape = self._split(config)
        sparse = terms.sorted_sparse()
        linear, (shared, left_out) = columns.linear(terms), columns.outside(terms)
        constants = {
            **shape,
            "KINDS": self._kinds(used),
            **linear,
            "OUTSIDE": shared,
            "CURVED": columns.curved(curved),
            "FILTER": FILTER_TILE,
            "FIELDS": columns.count,
        }
        arguments = {
            **self._streams(used),
            "out": (out, out.stride(0)),
            "out_reach": reach(self.cols, out),
            "coefficients": columns.packed(),
            "sparse": None if sparse is None else (sparse[0], sparse[1].float()),
            "count": 0 if sparse is None else sparse[0].shape[1],
            "outside": left_out,
            "outside_count": 0 if left_out is None else left_out.shape[1],
            "mix": next(((f.alpha, 1.0 - f.alpha) for f, _ in curved), (0.0, 0.0)),
            "peaks": peaks,
            "tiles": tiles,
            "offset": self.block.offset,
        }
        return Launch(
            gradient.row_gradient, (self.rows, splits), arguments, constants, config.warps
        )

    def _elsewhere(self, launch: Launch, config: configs.RowConfig, scratch: Workspace) -> Launch:
        """A gradient of as many rows as scratch has room for, written there.

        In its own place it would run over logits that are gone after the first time.
        """
        out, pitch = launch.arguments["out"]
        rows = max(min(self.rows, autotune.SCRATCH // (pitch * out.element_size())), 1)
        tiles, splits, _ = self._split(config, rows)
        room, peaks = scratch.empty(rows, pitch, dtype=out.dtype), launch.arguments["peaks"]
        if peaks is not None:
            peaks = scratch.empty(*peaks.shape, dtype=peaks.dtype)
        return launch.instead((rows, splits), out=(room, pitch), peaks=peaks, tiles=tiles)


def transform(head: HeadOptions, values: Tensor) -> Launch:
    """The launch that puts contiguous float32 values behind their head, in place."""
    return Launch(
        gradient.transform_values,
        (max(-(-values.numel() // _VALUES), 1),),
        {"values": values, "head": head.numbers, "numel": values.numel()},
        {"KIND": head_kind(head), "BLOCK": _VALUES},
    )
