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
from pad_kernels._dtypes import accumulate_dtype, product_dtype
from pad_kernels.engine.devices import DEVICES
from pad_kernels.engine.plan import Plan, PlanRequest, Shape, row_pitch

#: Default workspace on a CPU: below 256 MiB, and room for (1024, 49152) float32 logits kept whole.
CPU_BUDGET = 240 << 20
#: Share of a GPU's total memory.
GPU_SHARE = 1 / 32
#: Element-wise temporaries of the plain torch row passes: tiles of this many elements, about so
#: many of them alive at once.
TORCH_TILE = 1 << 18
TORCH_TEMPORARIES = 16
#: Bytes for each entry of an ordered vocabulary: the order, its inverse, and what sorting takes.
ORDER_BYTES = 48
#: Above this many rows a block never holds all of them.
WHOLE_ROWS = 512
#: Rows of statistics that are fused with their products: as many as keep a product busy reading no
#: weight twice as fast as it is multiplied, gathered at a time; and room for their splits' parts.
FUSED_ROWS, FUSED_COLS = 4096, 2048
#: Bytes a row, of so many rows at least, for what row passes on a GPU make besides: coefficients
#: side by side, and the parts of rows that are split over programs. 64 doubles.
ROW_NUMBERS, LEAST_ROWS = 512, 4096
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
        if wanted == "early" and not shape.reduced:
            fail_value("plan", "late or kept for per-token outputs", "'early'")
        if shape.reduced and wanted in (None, "early"):
            yield from self._early_tokens()
        if wanted == "early" and torch.float16 not in (shape.input, shape.weight):
            yield from self._over_vocabulary("early", 0)
        if wanted in (None, "late"):
            yield from self._over_vocabulary("late", 0)
        if wanted in (None, "kept"):
            yield from self._kept()

    # --- memory of each pass, in the terms of engine/schedule.py -------------------------------

    @property
    def _item(self) -> int:
        return self.shape.gemm.itemsize

    @property
    def _acc(self) -> int:
        return accumulate_dtype(self.shape.input).itemsize

    @property
    def _product(self) -> int:
        """Bytes of an entry of a gradient's product."""
        return product_dtype(self.shape.gemm).itemsize

    def _shared(self, cols: int) -> int:
        """Buffers of every pass: a copied weight chunk, a row's numbers, the torch backend's."""
        copied = cols * max(self.shape.hidden) * self._item if self.shape.copied_weights else 0
        if self.shape.device_bytes:
            copied += max(self.shape.tokens, LEAST_ROWS) * ROW_NUMBERS
        tiles = TORCH_TILE * TORCH_TEMPORARIES * self._acc
        copied += self._order_bytes(cols)
        return copied + (tiles if self.shape.backend == "torch_blocked" else 0)

    def _ordered(self, kept: int) -> bool:
        """Whether the filter's tiles are of a vocabulary that is put in order."""
        gradient = self.request.filter > 0 and any(self.shape.needs)
        return gradient and kept == 0 and not self.shape.copied_weights

    def _order_bytes(self, cols: int) -> int:
        """The order, biases in it, and weight rows on their way into and out of it."""
        if not self._ordered(kept=0):
            return 0
        shape, h = self.shape, self.shape.hidden[0]
        rows = cols * (sum(shape.hidden) * self._item + h * (self._item + self._acc))
        return rows + shape.vocab * (ORDER_BYTES + shape.streams * self._acc)

    def _rows_bytes(self, rows: int) -> int:
        """Hidden states of some rows of every stream, gathered in the product's dtype."""
        return rows * sum(self.shape.hidden) * self._item

    def _logits_bytes(self, rows: int, cols: int) -> int:
        return self.shape.streams * rows * cols * self._item

    def _room_bytes(self, rows: int, cols: int) -> int:
        """Room for logits, whose rows are apart as far as the device likes it."""
        return self._logits_bytes(rows, row_pitch(cols, self.shape.device_bytes))

    def _tokens_bytes(self, rows: int, cols: int) -> int:
        """A token block through the whole vocabulary, no gradient."""
        return (
            self._room_bytes(rows, self.shape.vocab) + self._rows_bytes(rows) + self._shared(cols)
        )

    def _chunks_bytes(self, cols: int, gradient: bool, rows: int = 0) -> int:
        """All rows, or so many at a time, through a vocabulary chunk."""
        shape = self.shape
        rows = rows or shape.tokens
        need = self._room_bytes(rows, cols) + self._rows_bytes(rows) + self._shared(cols)
        if gradient and shape.needs[0]:
            half = shape.gemm.itemsize == 2
            need += shape.tokens * shape.hidden[0] * (self._acc + (self._product if half else 0))
        if gradient and shape.needs[1] and shape.weight != product_dtype(shape.gemm):
            need += cols * shape.hidden[0] * self._product
        if gradient and shape.needs[2]:
            need += shape.vocab * self._acc
        return need

    def _early_extra(self, rows: int, cols: int, accumulator: bool) -> int:
        """What the gradient adds to a token block."""
        shape, h = self.shape, self.shape.hidden[0]
        need = 0
        if shape.needs[0]:
            need += rows * h * self._product
            if shape.copied_weights or self.request.filter:
                need += rows * h * self._acc
            if shape.input == torch.float16:
                need += shape.tokens * h * self._acc
        if shape.needs[1]:
            need += cols * h * self._product if accumulator or shape.weight != shape.gemm else 0
            need += shape.vocab * h * self._acc if accumulator else 0
        if shape.needs[2]:
            need += shape.vocab * self._acc
        return need

    # --- the schedules ---------------------------------------------------------------------------

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
        wide = self.shape.device_bytes > 0 and self._ordered(kept=0)
        nbytes = (64 if wide else 8) << 20
        default = max(64, nbytes // (max(self.shape.hidden) * self._item))
        return min(self.request.vocab_block or default, self.shape.vocab)

    def _forward_only(self, schedule: str) -> Iterator[Plan]:
        if self.shape.fused:
            yield from self._fused(schedule)
        elif self.shape.sweeps == 1:
            for cols in self._vocab_ladder():
                yield self._plan(
                    schedule, "vocabulary", 0, cols, 0, self._chunks_bytes(cols, False)
                )
        else:
            cols = self._copy_cols()
            for rows in self._token_ladder():
                yield self._plan(
                    schedule, "vocabulary", rows, cols, 0, self._tokens_bytes(rows, cols)
                )

    def _fused(self, schedule: str) -> Iterator[Plan]:
        """Statistics alone, some rows at a time: a chunk is room for the parts of their splits."""
        most = min(self.request.token_block or FUSED_ROWS, max(self.shape.tokens, 1))
        for rows in [most] if self.request.token_block else _ladder(most, 128, True):
            cols = min(self.request.vocab_block or FUSED_COLS, self.shape.vocab)
            for room in [cols] if self.request.vocab_block else _ladder(cols, 64, True):
                need = self._chunks_bytes(room, False, rows)
                yield self._plan(schedule, "vocabulary", rows, room, 0, need)

    def _early_tokens(self) -> Iterator[Plan]:
        shape, cols = self.shape, self._copy_cols()
        for rows in self._token_ladder():
            blocks = -(-shape.tokens // rows)
            half = shape.weight == torch.float16 or (
                shape.weight == torch.bfloat16
                and (blocks > HALF_BLOCKS or shape.gemm != torch.bfloat16)
            )
            accumulator = shape.needs[1] and half
            need = self._tokens_bytes(rows, cols) + self._early_extra(rows, cols, accumulator)
            yield self._plan("early", "tokens", rows, cols, 0, need, accumulator)

    def _over_vocabulary(self, schedule: str, kept: int) -> Iterator[Plan]:
        """Forward keeps statistics only; the gradient runs chunk by chunk over the vocabulary."""
        for cols in self._vocab_ladder():
            need = self._chunks_bytes(cols, True)
            if self.shape.sweeps == 1:
                yield self._plan(schedule, "vocabulary", 0, cols, kept, need)
            else:
                for rows in self._token_ladder():
                    forward = self._tokens_bytes(rows, cols)
                    yield self._plan(schedule, "vocabulary", rows, cols, kept, max(need, forward))

    def _kept(self) -> Iterator[Plan]:
        shape = self.shape
        most = shape.tokens
        if self.request.schedule is None and most > WHOLE_ROWS:
            most = most * 7 // 8
        row_bytes = max(self._logits_bytes(1, shape.vocab), 1)
        for plan in self._over_vocabulary("kept", 0):
            room = max(self.budget - plan.workspace_bytes, 0) // row_bytes
            kept = min(most, room) if self.request.kept_rows is None else self.request.kept_rows
            kept = min(kept, shape.tokens)
            need = plan.workspace_bytes + kept * row_bytes
            rows = plan.token_block or min(max(kept, 1), 1024)
            yield self._plan("kept", "vocabulary", rows, plan.vocab_block, kept, need)

    # --- time -------------------------------------------------------------------------------------

    def _plan(
        self,
        schedule: str,
        over: str,
        rows: int,
        cols: int,
        kept: int,
        need: int,
        accumulator: bool = False,
    ) -> Plan:
        shape = self.shape
        student = 2 * shape.tokens * shape.vocab * shape.hidden[0]
        gradient = student * (shape.needs[0] + shape.needs[1])
        flops = 2 * shape.unit + gradient
        if any(shape.needs) and over == "vocabulary":
            flops += 2 * shape.unit * (shape.tokens - kept) // max(shape.tokens, 1)
        device = DEVICES[shape.device]
        blocks = self._blocks(over, rows, cols)
        if device.type == "cpu":
            traffic = self._packed_traffic(over, rows, cols, kept, accumulator)
        else:
            traffic = self._row_traffic(over, rows, kept, accumulator)
        seconds = flops / device.rate(shape.gemm) + traffic / device.bandwidth
        seconds += blocks * device.block_seconds
        return Plan(
            schedule=schedule,
            backend=shape.backend,
            token_block=rows,
            vocab_block=cols,
            kept_rows=kept,
            gradient_over=over,
            weight_accumulator=accumulator,
            gemm=shape.gemm,
            accumulate=accumulate_dtype(shape.input),
            filter=self.request.filter,
            compact=self.request.compact,
            ordered=self._ordered(kept),
            workspace_bytes=need,
            flops=flops,
            seconds=seconds,
            reason=self._reason(schedule, over, rows, cols, kept, accumulator),
        )

    def _blocks(self, over: str, rows: int, cols: int) -> int:
        """How many times the host starts work on a block."""
        blocks = -(-self.shape.tokens // rows) if rows else 0
        if over == "tokens":
            return blocks
        chunks = -(-self.shape.vocab // cols)
        if self.shape.fused:
            return max(blocks, 1) + chunks * any(self.shape.needs)
        return blocks * (self.shape.sweeps == 2) + chunks * (1 + any(self.shape.needs))

    def _accumulator_traffic(self, rows: int) -> float:
        """Bytes to add each block's weight gradient to the accumulator."""
        blocks = -(-self.shape.tokens // rows)
        entry = 2 * self._acc + 2 * self._item
        return float(blocks * self.shape.vocab * self.shape.hidden[0] * entry)

    def _packed_traffic(
        self, over: str, rows: int, cols: int, kept: int, accumulator: bool
    ) -> float:
        """Bytes moved besides a CPU's arithmetic: a product packs its operands at every call."""
        shape, item = self.shape, self._item
        gradient = any(shape.needs)
        weight = shape.vocab * sum(shape.hidden) * item
        logits = self._logits_bytes(shape.tokens, shape.vocab)
        blocks = -(-shape.tokens // rows) if rows else 0
        if over == "tokens":
            # Packing reads and writes W in both products with it; dW is read and written.
            traffic = blocks * weight * (2 + 2 * shape.needs[0] + 2 * shape.needs[1]) + 4 * logits
            return traffic + (self._accumulator_traffic(rows) if accumulator else 0.0)
        chunks = -(-shape.vocab // cols)
        hidden = shape.tokens * sum(shape.hidden) * item
        passes = 1 + (2 + 2 * shape.needs[0] if gradient else 0)
        traffic = chunks * hidden * passes + (2 if gradient else 1) * 2 * weight
        traffic += (6 if gradient else 2) * logits
        if shape.sweeps == 2:
            return traffic + blocks * 2 * weight
        return traffic + (-(-kept // max(rows, 1)) * 2 * weight if kept else 0)

    def _row_traffic(self, over: str, rows: int, kept: int, accumulator: bool) -> float:
        """Bytes moved besides a GPU's products, which overlap their own: the row passes'."""
        shape = self.shape
        logits = self._logits_bytes(shape.tokens, shape.vocab)
        # Statistics read every stream, in each sweep; where no logits are stored, none.
        share = kept / max(shape.tokens, 1) if shape.fused and over == "vocabulary" else 1.0
        traffic = share * shape.sweeps * logits
        if any(shape.needs):
            traffic += logits + logits // shape.streams  # the gradient is written where it was read
        return traffic + (self._accumulator_traffic(rows) if accumulator else 0.0)

    def _reason(
        self, schedule: str, over: str, rows: int, cols: int, kept: int, accumulator: bool
    ) -> str:
        shape = self.shape
        if not any(shape.needs):
            return "no gradient is wanted: statistics only"
        if over == "tokens":
            extra = ", with a float32 weight-gradient accumulator" if accumulator else ""
            return f"the output is one number: gradients at once, {rows} rows at a time{extra}"
        if schedule == "early":
            return (
                "the output is one number, but a weight-gradient accumulator does not pay or fit: "
                f"statistics first, then gradients {cols} vocabulary entries at a time"
            )
        if kept == shape.tokens:
            return f"all rows keep their logits; gradients {cols} vocabulary entries at a time"
        if kept:
            return (
                f"{kept} of {shape.tokens} rows keep their logits; the backward recomputes the "
                f"rest, {cols} vocabulary entries at a time"
            )
        return (
            f"nothing is kept: the backward recomputes logits {cols} vocabulary entries at a time"
        )
