"""The Triton backend: every functional of the library on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels.backends.base import ROW_PASS_STATISTICS, beyond_row_passes, get_backend
from pad_kernels.backends.registry import interpreting, triton_error
from pad_kernels.backends.triton.fused import fusable, plan_gradient, plan_statistics
from pad_kernels.backends.triton.launch import Block, Device, run, transform
from pad_kernels.backends.triton.live import LiveTiles, multiplies
from pad_kernels.backends.triton.topk import MOST, merge_largest
from pad_kernels.engine.gradients import FILTER_TILE
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import Largest, RowStats, Statistic, Tail
from pad_kernels.heads import HeadOptions

#: How many of a kind one pass takes.
_ROOM: dict[type[Statistic], int] = {Tail: 1, Outcomes: 1}
_HALF = (torch.bfloat16, torch.float16)


class TritonBackend:
    """Row passes on a GPU; under ``TRITON_INTERPRET=1`` also on CPU tensors, for tests."""

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        if reason := triton_error():
            return reason
        if device.type != "cuda" and not (interpreting() and device.type == "cpu"):
            return f"tensors are on {device.type}"
        if recipe.gemm not in (torch.float32, *_HALF):
            return f"no row pass for {recipe.gemm}: the kernels compute in float32"
        return beyond_row_passes(recipe, _ROOM)

    def transform(self, head: HeadOptions, raw: Tensor) -> Tensor:
        logits = raw.contiguous().clone()
        run(logits, transform(head, logits))
        return logits

    def measure(
        self,
        problem: Problem,
        stats: RowStats,
        wanted: list[Statistic],
        logits: dict[int, Tensor],
        offset: int,
    ) -> None:
        largest = [s for s in wanted if isinstance(s, Largest) and s.k <= MOST]
        ours = [s for s in wanted if isinstance(s, ROW_PASS_STATISTICS)]
        if others := [s for s in wanted if s not in ours and s not in largest]:
            get_backend("torch_blocked").measure(problem, stats, others, logits, offset)
        block = Block(problem, stats, logits, offset, Device.of(logits[0].device))
        if not block.rows:
            return
        for top in largest:
            run(logits[0], merge_largest(problem.streams[0], logits[0], offset, stats[top]))
        for statistic in ours:
            if isinstance(statistic, Outcomes):
                launch, partial = block.outcomes(statistic)
                run(logits[0], launch)
                stats[statistic] += partial.sum(1)
        first: list[Statistic] = [s for s in ours if not isinstance(s, Outcomes)]
        if first:
            run(logits[0], *block.statistics(first))

    def fuses(
        self,
        problem: Problem,
        stats: RowStats,
        wanted: list[Statistic],
        hidden: dict[int, Tensor],
        chunk: int,
    ) -> bool:
        return fusable(problem, stats, wanted, hidden, chunk) is not None

    def measure_products(
        self,
        problem: Problem,
        stats: RowStats,
        wanted: list[Statistic],
        hidden: dict[int, Tensor],
        room: Tensor,
        chunk: int,
    ) -> None:
        launches = plan_statistics(problem, stats, wanted, hidden, room, chunk)
        run(hidden[0], *launches)

    def differentiate_products(
        self,
        problem: Problem,
        out: Tensor,
        hidden: dict[int, Tensor],
        weights: dict[int, Tensor],
        offset: int,
        stats: RowStats,
        gradient: LogitGradient,
        bound: Tensor | None,
    ) -> Tensor | None:
        peaks = _peaks(out, bound)
        least = None if bound is None else bound.float().reshape(1)
        launch = plan_gradient(problem, out, hidden, weights, offset, stats, gradient, peaks, least)
        run(out, launch)
        return None if peaks is None else peaks.view(torch.float32)

    def gradient(
        self,
        problem: Problem,
        out: Tensor,
        logits: dict[int, Tensor],
        offset: int,
        stats: RowStats,
        gradient: LogitGradient,
        bound: Tensor | None,
    ) -> Tensor | None:
        peaks = _peaks(out, bound)
        block = Block(problem, stats, logits, offset, Device.of(out.device))
        if block.rows:
            run(out, block.gradient(gradient, out, peaks))
        return None if peaks is None else peaks.view(torch.float32)

    def live_tiles(
        self, problem: Problem, hidden: Tensor, dz: Tensor, peaks: Tensor, bound: Tensor
    ) -> Live | None:
        if not multiplies(problem, hidden):
            return None
        live = Live(dz, peaks, bound.float().reshape(1))
        run(dz, *live.lists())
        return live


class Live(LiveTiles):
    """The live tiles of a block, and products over them."""

    def times_weight(
        self, total: Tensor, weight: Tensor, index: Tensor | None, *, add: bool
    ) -> None:
        run(total, self.product(total, weight, index, transposed=False, add=add))

    def times_hidden(
        self, total: Tensor, hidden: Tensor, index: Tensor | None, *, add: bool
    ) -> None:
        run(total, self.product(total, hidden, index, transposed=True, add=add))


def _peaks(out: Tensor, bound: Tensor | None) -> Tensor | None:
    """Room for the bits of the largest magnitudes of the filter's tiles, if it is on."""
    if bound is None:
        return None
    tiles = [-(-size // FILTER_TILE) for size in out.shape]
    return out.new_zeros(tiles, dtype=torch.int32)
