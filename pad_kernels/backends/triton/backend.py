"""The Triton backend: every functional of the library on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels.backends.base import (
    ROW_PASS_STATISTICS,
    GivenTokens,
    HiddenRows,
    RawBlock,
    beyond_row_passes,
)
from pad_kernels.backends.choice import get_backend
from pad_kernels.backends.registry import interpreting, triton_error
from pad_kernels.backends.triton.fused import fusable, plan_gradient, plan_statistics
from pad_kernels.backends.triton.fused_operands import Operands
from pad_kernels.backends.triton.gather import gather_hidden, gather_logits, scatter_weight
from pad_kernels.backends.triton.launch import Device, run
from pad_kernels.backends.triton.live import LiveLaunches
from pad_kernels.backends.triton.passes import Passes, transform
from pad_kernels.backends.triton.topk import MOST, merge_largest
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import Largest, Statistic, Tail
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

    def measure(self, block: RawBlock, wanted: list[Statistic]) -> None:
        largest = [s for s in wanted if isinstance(s, Largest) and s.k <= MOST]
        ours = [s for s in wanted if isinstance(s, ROW_PASS_STATISTICS)]
        if others := [s for s in wanted if s not in ours and s not in largest]:
            get_backend("torch_blocked").measure(block, others)
        raw, passes = block.logits[0], Passes(block, Device.of(block.device))
        if not passes.rows:
            return
        for top in largest:
            student = block.problem.streams[0]
            run(raw, merge_largest(student, raw, block.offset, block.stats[top]))
        for statistic in ours:
            if isinstance(statistic, Outcomes):
                launch, partial = passes.outcomes(statistic)
                run(raw, launch)
                block.stats[statistic] += partial.sum(1)
        first: list[Statistic] = [s for s in ours if not isinstance(s, Outcomes)]
        if first:
            run(raw, *passes.statistics(first))

    def fuses(self, rows: HiddenRows, wanted: list[Statistic], chunk: int) -> bool:
        return fusable(rows, wanted, chunk) is not None

    def measure_products(
        self, rows: HiddenRows, wanted: list[Statistic], room: Tensor, chunk: int
    ) -> None:
        run(room, *plan_statistics(rows, wanted, room, chunk))

    def differentiate_products(
        self,
        rows: HiddenRows,
        weights: dict[int, Tensor],
        offset: int,
        gradient: LogitGradient,
        out: Tensor,
        bound: Tensor | None,
    ) -> Tensor | None:
        peaks = _peaks(out, bound)
        least = None if bound is None else bound.float().reshape(1)
        run(out, plan_gradient(rows, weights, offset, gradient, out, peaks, least))
        return None if peaks is None else peaks.view(torch.float32)

    def gradient(
        self, block: RawBlock, gradient: LogitGradient, out: Tensor, bound: Tensor | None
    ) -> Tensor | None:
        peaks = _peaks(out, bound)
        passes = Passes(block, Device.of(out.device))
        if passes.rows:
            run(out, passes.gradient(gradient, out, peaks))
        return None if peaks is None else peaks.view(torch.float32)

    def live_tiles(
        self, problem: Problem, hidden: Tensor, dz: Tensor, peaks: Tensor, bound: Tensor
    ) -> Live | None:
        if not Operands.of(problem, {0: hidden}).readable:
            return None
        live = Live(dz, peaks, bound.float().reshape(1))
        run(dz, *live.lists())
        return live

    def gathers(self, hidden: Tensor) -> bool:
        return hidden.dtype != torch.float64 and (hidden.is_cuda or interpreting())

    def gather_logits(self, given: GivenTokens, out: Tensor) -> None:
        if out.numel():
            run(out, gather_logits(given, out))

    def gather_gradients(
        self,
        given: GivenTokens,
        grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        workspace: Workspace,
    ) -> None:
        ids, grad = given.ids, grad.contiguous()
        if not ids.numel():
            return
        if hidden.numel():
            run(grad, gather_hidden(given, grad, hidden))
        if weight.numel():
            # The pairs of an id side by side: one program adds them up, no float32 sum of [V, H].
            keys, found, order = workspace.empty(3, ids.numel(), dtype=torch.int64)
            counted = given.counted.unsqueeze(1)
            keys.view(ids.shape).copy_(ids).masked_fill_(~counted, weight.shape[0])
            torch.sort(keys, stable=True, out=(found, order))
            run(grad, scatter_weight(grad, given.hidden, found, order, weight))


class Live(LiveLaunches):
    """The live tiles of a block, and products over them."""

    def times_weight(
        self, total: Tensor, weight: Tensor, index: Tensor | None, *, add: bool
    ) -> None:
        run(total, self.product(total, weight, index, transposed=False, add=add))

    def times_hidden(
        self,
        total: Tensor,
        hidden: Tensor,
        index: Tensor | None,
        *,
        add: bool,
        scale: Tensor | None = None,
    ) -> None:
        run(total, self.product(total, hidden, index, transposed=True, add=add, scale=scale))


def _peaks(out: Tensor, bound: Tensor | None) -> Tensor | None:
    """Room for the bits of the largest magnitudes of the filter's tiles, if it is on."""
    if bound is None:
        return None
    tiles = [-(-size // FILTER_TILE) for size in out.shape]
    return out.new_zeros(tiles, dtype=torch.int32)
