"""Shapes and a budget to a plan: which schedule, which blocks, how much memory, and why.

A pure function of shapes, dtypes, wanted gradients and the request, so that it can be printed,
tested without any device, and gives the same answer to fake tensors, ranks and recomputation.
It writes down every schedule it knows over a ladder of block sizes, counts each one's bytes and
flops, and takes the fastest that fits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pad_kernels._checks import fail_value
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.engine.costs import Costs, Way
from pad_kernels.engine.footprint import Footprint
from pad_kernels.engine.plan import Plan, PlanRequest, Shape

#: Default workspace on a CPU: below 256 MiB, and room for (1024, 49152) float32 logits kept whole.
CPU_BUDGET = 240 << 20
#: Share of a GPU's total memory.
GPU_SHARE = 1 / 32
#: Above this many rows a block never holds all of them.
WHOLE_ROWS = 512
#: Statistics that are fused with their products take so many rows at a time, enough that a weight
#: is multiplied more slowly than it is read; and room for so many logits a row, where the parts of
#: a split vocabulary go.
FUSED_ROWS, FUSED_COLS = 4096, 2048
#: So many token blocks add up in a half-precision weight gradient without an accumulator: rounded
#: after each of four, it is off by 1.6 times one rounding, and any product is off by one.
HALF_BLOCKS = 4


def default_budget(device_bytes: int) -> int:
    """Workspace when nobody says otherwise: never a function of what happens to be free.

    Args:
        device_bytes: a GPU's total memory, 0 for a CPU.
    """
    return int(device_bytes * GPU_SHARE) or CPU_BUDGET


@functools.lru_cache(maxsize=4096)
def make_plan(shape: Shape, request: PlanRequest) -> Plan:
    """Choose the plan for a shape: of all that fit the budget, the one predicted to be fastest.

    Raises:
        ValueError: the op cannot run on the requested schedule, or not within the budget; the
            message then names the smallest budget that can.
    """
    budget = request.budget or default_budget(shape.device_bytes)
    candidates = list(_Candidates(shape, request, budget).all())
    fitting = [plan for plan in candidates if plan.workspace_bytes <= budget]
    if not fitting:
        smallest = smallest_budget(shape, request)
        fail_value("plan", f"a workspace budget of at least {smallest} bytes", f"{budget} bytes")
    return min(fitting, key=lambda plan: plan.seconds)


def smallest_budget(shape: Shape, request: PlanRequest) -> int:
    """Bytes of the smallest workspace that some plan for a shape can do with."""
    return min(plan.workspace_bytes for plan in _Candidates(shape, request, 0).all())


def _ladder(total: int, step: int, whole: bool) -> Iterator[int]:
    """Block sizes for ``total`` items, largest first, rounded up to ``step``."""
    blocks, last = (1.0 if whole or total <= step else 2.0), 0
    while True:
        size = -(-total // int(blocks))
        size = min(-(-size // step) * step, total)
        if size != last:
            yield max(size, 1)
            last = size
        if size <= step:
            return
        blocks = max(blocks + 1, blocks * 1.25)


@dataclass(frozen=True)
class _Candidates:
    """Every plan that could do the job, its memory and time written out."""

    shape: Shape
    request: PlanRequest
    budget: int

    def all(self) -> Iterator[Plan]:
        """The plans of the requested schedule, or of all that apply."""
        shape, wanted = self.shape, self.request.schedule
        if not any(shape.needs):
            yield from self._forward_only(wanted or "late")
            return
        if not shape.reduced:
            self.request.refuse_early()
        if shape.reduced and wanted in (None, "early"):
            yield from self._early_tokens()
        if wanted == "early" and torch.float16 not in (shape.input, shape.weight):
            yield from self._over_vocabulary("early")
        if wanted in (None, "late"):
            yield from self._over_vocabulary("late")
        if wanted in (None, "kept"):
            yield from self._kept()

    @functools.cached_property
    def memory(self) -> Footprint:
        """What passes take."""
        return Footprint(self.shape, self.request.filter > 0)

    # --- the schedules ----------------------------------------------------------------------------

    def _token_ladder(self) -> Iterator[int]:
        if self.request.token_block is not None:
            yield min(self.request.token_block, max(self.shape.tokens, 1))
            return
        whole = self.shape.tokens <= WHOLE_ROWS
        yield from _ladder(max(self.shape.tokens, 1), 16, whole)

    def _vocab_ladder(self) -> Iterator[int]:
        if self.request.vocab_block is not None:
            yield min(self.request.vocab_block, self.shape.vocab)
            return
        yield from _ladder(self.shape.vocab, 64, self.shape.tokens <= WHOLE_ROWS)

    def _copy_cols(self) -> int:
        """Vocabulary chunk of token-block passes: only for copied weights and accumulation."""
        # Where every weight row is gathered, products of a GPU should not be narrow for it.
        wide = self.shape.device_bytes > 0 and self.memory.ordered
        nbytes = (64 if wide else 8) << 20
        default = max(64, nbytes // (max(self.shape.hidden) * self.memory.item))
        return min(self.request.vocab_block or default, self.shape.vocab)

    def _forward_only(self, schedule: str) -> Iterator[Plan]:
        if self.shape.fused:
            yield from self._fused(schedule)
        elif self.shape.sweeps == 1:
            for cols in self._vocab_ladder():
                way = Way(schedule, "vocabulary", 0, cols)
                yield self._plan(way, self.memory.chunks(cols, False))
        else:
            cols = self._copy_cols()
            for rows in self._token_ladder():
                way = Way(schedule, "vocabulary", rows, cols)
                yield self._plan(way, self.memory.tokens(rows, cols))

    def _fused(self, schedule: str) -> Iterator[Plan]:
        """Statistics alone, some rows at a time: a chunk is room for the parts of their splits."""
        most = min(self.request.token_block or FUSED_ROWS, max(self.shape.tokens, 1))
        for rows in [most] if self.request.token_block else _ladder(most, 128, True):
            cols = min(self.request.vocab_block or FUSED_COLS, self.shape.vocab)
            for room in [cols] if self.request.vocab_block else _ladder(cols, 64, True):
                way = Way(schedule, "vocabulary", rows, room)
                yield self._plan(way, self.memory.chunks(room, False, rows))

    def _early_tokens(self) -> Iterator[Plan]:
        shape, cols = self.shape, self._copy_cols()
        for rows in self._token_ladder():
            blocks = -(-shape.tokens // rows)
            half = shape.weight == torch.float16 or (
                shape.weight == torch.bfloat16
                and (blocks > HALF_BLOCKS or shape.gemm != torch.bfloat16)
            )
            accumulator = shape.needs[1] and half
            way = Way("early", "tokens", rows, cols, accumulator=accumulator)
            yield self._plan(way, self.memory.early(rows, cols, accumulator))

    def _over_vocabulary(self, schedule: str) -> Iterator[Plan]:
        """Forward keeps statistics only; the gradient runs chunk by chunk over the vocabulary."""
        for cols in self._vocab_ladder():
            need = self.memory.chunks(cols, True)
            if self.shape.sweeps == 1:
                yield self._plan(Way(schedule, "vocabulary", 0, cols), need)
            else:
                for rows in self._token_ladder():
                    forward = self.memory.tokens(rows, cols)
                    way = Way(schedule, "vocabulary", rows, cols)
                    yield self._plan(way, max(need, forward))

    def _kept(self) -> Iterator[Plan]:
        shape = self.shape
        most = shape.tokens
        if self.request.schedule is None and most > WHOLE_ROWS:
            most = most * 7 // 8
        row_bytes = max(self.memory.logits(1, shape.vocab), 1)
        for plan in self._over_vocabulary("kept"):
            room = max(self.budget - plan.workspace_bytes, 0) // row_bytes
            kept = min(most, room) if self.request.kept_rows is None else self.request.kept_rows
            kept = min(kept, shape.tokens)
            need = plan.workspace_bytes + kept * row_bytes
            rows = plan.token_block or min(max(kept, 1), 1024)
            yield self._plan(Way("kept", "vocabulary", rows, plan.vocab_block, kept), need)

    # --- the plan ---------------------------------------------------------------------------------

    def _plan(self, way: Way, need: int) -> Plan:
        shape, costs = self.shape, Costs(self.shape, way)
        return Plan(
            schedule=way.schedule,
            backend=shape.backend,
            token_block=way.rows,
            vocab_block=way.cols,
            kept_rows=way.kept,
            gradient_over=way.over,
            weight_accumulator=way.accumulator,
            gemm=shape.gemm,
            accumulate=accumulate_dtype(shape.input),
            filter=self.request.filter,
            compact=self.request.compact,
            ordered=self.memory.ordered and way.kept == 0,
            workspace_bytes=need,
            flops=costs.flops,
            seconds=costs.seconds,
            reason=_reason(shape, way),
        )


def _reason(shape: Shape, way: Way) -> str:
    """One sentence."""
    cols, rows = way.cols, way.rows
    if not any(shape.needs):
        return "no gradient is wanted: statistics only"
    if way.over == "tokens":
        extra = ", with a float32 weight-gradient accumulator" if way.accumulator else ""
        return f"the output is one number: gradients at once, {rows} rows at a time{extra}"
    if way.schedule == "early":
        return (
            "the output is one number, but a weight-gradient accumulator does not pay or fit: "
            f"statistics first, then gradients {cols} vocabulary entries at a time"
        )
    if way.kept == shape.tokens:
        return f"all rows keep their logits; gradients {cols} vocabulary entries at a time"
    if way.kept:
        return (
            f"{way.kept} of {shape.tokens} rows keep their logits; the backward recomputes the "
            f"rest, {cols} vocabulary entries at a time"
        )
    return f"nothing is kept: the backward recomputes logits {cols} vocabulary entries at a time"
