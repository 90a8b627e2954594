"""The block loops: statistics and gradients over token blocks or vocabulary chunks.

These functions are ordinary code over tensors, without autograd; the ops wrap them. Nothing here
holds N x V numbers: a token block holds rows x V, a vocabulary chunk N x cols, and kept logits are
as many rows as the plan says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pad_kernels.backends.base import (
    Backend,
    FilteringBackend,
    FusedBackend,
    HiddenRows,
    LiveTiles,
    RawBlock,
    WalkingBackend,
)
from pad_kernels.backends.choice import get_backend
from pad_kernels.engine.devices import total_memory
from pad_kernels.engine.feed import blocks, weight_chunks
from pad_kernels.engine.gradients import GradientBuffers, filter_bound
from pad_kernels.engine.plan import Plan, row_pitch
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.rows import Part
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import Picked, RowStats, Statistic, empty_stats


@dataclass
class Pass:
    """One walk over the rows: the problem, its plan, the backend and the buffers."""

    problem: Problem
    plan: Plan
    backend: Backend
    workspace: Workspace
    copies: list[Tensor | None]
    _rooms: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def start(problem: Problem, plan: Plan, workspace: Workspace) -> Pass:
        """Take the buffers that every pass needs."""
        copies = problem.copied_weight_buffers(workspace, plan.vocab_block)
        return Pass(problem, plan, get_backend(plan.backend), workspace, copies)

    def _room(self, name: str, numel: int) -> Tensor:
        """A flat buffer in the products' dtype, made once."""
        if name not in self._rooms:
            self._rooms[name] = self.workspace.empty(numel, dtype=self.problem.recipe.gemm)
        return self._rooms[name]

    def _pitch(self, cols: int) -> int:
        return row_pitch(cols, total_memory(self.problem.device))

    def logit_room(self, rows: int, cols: int) -> Tensor:
        """Room for rows x cols logits of every stream, [streams, flat]."""
        count = len(self.problem.streams)
        return self._room("logits", count * rows * self._pitch(cols)).view(count, -1)

    def logits_in(
        self, room: Tensor, streams: Iterable[int], rows: int, cols: int
    ) -> dict[int, Tensor]:
        """A block [rows, cols] for each of some streams, in what :meth:`logit_room` made."""
        pitch = self._pitch(cols)
        return {j: room[j, : rows * pitch].view(rows, pitch)[:, :cols] for j in streams}

    def hidden(
        self, part: Part, start: int, stop: int, room: int, *, inside: bool = False
    ) -> dict[int, Tensor]:
        """Hidden states of the live rows start to stop, of the part's streams.

        Args:
            room: rows to have room for, whatever this call needs.
            inside: put them at ``start`` of that room, beside those of other rows, and not at its
                beginning.
        """
        live, gemm = self.problem.live, self.problem.recipe.gemm
        found, offset = {}, start if inside else 0
        for j in part.streams:
            stream = self.problem.streams[j]
            width = stream.hidden.shape[1]
            buffer = self._room(f"hidden {j}", room * width).view(room, width)
            found[j] = stream.rows(live, start, stop, gemm, buffer[offset : offset + stop - start])
        return found

    def logits(
        self, hidden: dict[int, Tensor], start: int, stop: int, out: dict[int, Tensor]
    ) -> None:
        """Raw products of some rows with the vocabulary entries start to stop."""
        for j, h in hidden.items():
            stream = self.problem.streams[j]
            pieces = weight_chunks(stream.weight, start, stop, self.copies[j], stream.order)
            for a, b, weight in pieces:
                torch.mm(h, weight.t(), out=out[j][:, a - start : b - start])

    def measure(self, part: Part, block: RawBlock, sweep: int) -> None:
        """Merge a block of raw logits into the running statistics that the part needs."""
        wanted = [s for s in self.problem.recipe.measured(part.functionals) if s.sweep == sweep]
        if rest := self.pick(block, wanted):
            self.backend.measure(block, rest)

    def fused(self, part: Part, rows: HiddenRows) -> FusedBackend | None:
        """The backend, if it has products and row work in one for these rows."""
        backend = self.backend
        # What is gathered for an order alone could be read as it lies, as in the statistics' pass.
        copied = self.problem.order is None and any(c is not None for c in self.copies)
        if not isinstance(backend, FusedBackend) or copied:
            return None
        wanted = list(self.problem.recipe.measured(part.functionals))
        return backend if backend.fuses(rows, wanted, self.plan.vocab_block) else None

    def live_tiles(
        self, hidden: Tensor, dz: Tensor, peaks: Tensor | None, bound: Tensor | None
    ) -> LiveTiles | None:
        """The tiles that the filter keeps, if the backend multiplies those alone."""
        if peaks is None or bound is None or not isinstance(self.backend, FilteringBackend):
            return None
        return self.backend.live_tiles(self.problem, hidden, dz, peaks, bound)

    def pick(self, block: RawBlock, wanted: Iterable[Statistic]) -> list[Statistic]:
        """Merge what is picked of a block; the wanted statistics besides."""
        rest = []
        for statistic in wanted:
            if isinstance(statistic, Picked):
                block.stats[statistic] += self._picked(statistic, block)
            else:
                rest.append(statistic)
        return rest

    def _picked(self, statistic: Picked, block: RawBlock) -> Tensor:
        """Logits at given ids: a gather, the same on every backend."""
        student, raw = self.problem.streams[0], block.logits[0]
        ids = block.stats.inputs[statistic.ids]
        local = ids - block.offset
        inside = (local >= 0) & (local < raw.shape[1])
        found = raw.gather(1, local.clamp(0, raw.shape[1] - 1)).to(self.problem.accumulate)
        if student.bias is not None:
            found = found + student.bias[ids]
        logits = self.backend.transform(student.head, found)
        return torch.where(inside, logits, 0.0).t()

    def empty_stats(self, rows: int, inputs: dict[str, Tensor]) -> RowStats:
        """Running statistics before the first block."""
        return empty_stats(self.problem.recipe.measured(), rows, inputs, self.problem.device)


def reduce_stats(stats: RowStats) -> RowStats:
    """Between sweeps and before values: the place for an all-reduce over vocabulary shards."""
    return stats


def measure_rows(run: Pass, kept: Tensor | None) -> RowStats:
    """Statistics of every live row; the first rows' raw logits go to ``kept``, if there is room."""
    problem = run.problem
    stats = run.empty_stats(problem.rows, problem.inputs)
    held = 0 if kept is None else min(kept.shape[1], problem.rows)
    over_tokens = problem.recipe.sweeps == 2
    rest = 0 if over_tokens else problem.rows - held
    if not any(problem.recipe.needs) and run.plan.token_block:
        rest = min(rest, run.plan.token_block)
    room = max(min(run.plan.token_block, problem.rows), rest)
    for part in problem.parts:
        # Rows of this part that are kept come first.
        inner = min(max(held, part.start), part.stop)
        _over_tokens(run, part, stats, (part.start, inner), kept, room)
        if over_tokens:
            _over_tokens(run, part, stats, (inner, part.stop), None, room)
        else:
            _over_vocabulary(run, part, stats, (inner, part.stop), rest, room)
    return reduce_stats(stats)


def _over_tokens(
    run: Pass, part: Part, stats: RowStats, span: tuple[int, int], kept: Tensor | None, room: int
) -> None:
    """Statistics token block by token block, both sweeps while the block's logits are at hand."""
    vocab = run.problem.recipe.vocab
    start, stop = span
    step = min(run.plan.token_block, run.problem.rows)
    for a, b in blocks(stop - start, step):
        a, b = start + a, start + b
        if kept is None:
            flat = run.logit_room(step, vocab)
            logits = run.logits_in(flat, part.streams, b - a, vocab)
        else:
            logits = {j: kept[j, a:b] for j in part.streams}
        run.logits(run.hidden(part, a, b, room), 0, vocab, logits)
        rows = stats.rows(a, b)
        run.measure(part, RawBlock(run.problem, rows, logits, 0), sweep=1)
        if run.problem.recipe.sweeps == 2:
            run.measure(part, RawBlock(run.problem, reduce_stats(rows), logits, 0), sweep=2)


def _over_vocabulary(
    run: Pass, part: Part, stats: RowStats, span: tuple[int, int], most: int, room: int
) -> None:
    """One-sweep statistics of some rows, at most ``most`` at a time, chunk by chunk."""
    cols = run.plan.vocab_block
    flat = run.logit_room(most, cols)
    for first, last in blocks(span[1] - span[0], most):
        start, stop = span[0] + first, span[0] + last
        hidden = run.hidden(part, start, stop, room)
        rows = HiddenRows(run.problem, stats.rows(start, stop), hidden)
        if (fused := run.fused(part, rows)) is not None:
            wanted = list(run.problem.recipe.measured(part.functionals))
            fused.measure_products(rows, wanted, flat, cols)
            continue
        for a, b in blocks(run.problem.recipe.vocab, cols):
            logits = run.logits_in(flat, part.streams, stop - start, b - a)
            run.logits(hidden, a, b, logits)
            run.measure(part, RawBlock(run.problem, rows.stats, logits, a), sweep=1)


def _values(problem: Problem, part: Part, stats: RowStats, out: Tensor) -> None:
    """Write the values of the part's rows to ``out`` [outputs, rows]; 0 for what it has not."""
    done = 0
    for i, functional in enumerate(problem.recipe.functionals):
        count = functional.outputs(problem.inputs)
        mine = i in part.functionals
        out[done : done + count] = functional.value(stats) if mine else 0.0
        done += count


def values_of(problem: Problem, stats: RowStats) -> Tensor:
    """Values [outputs, live rows] of every functional."""
    shape = (problem.recipe.outputs(problem.inputs), problem.rows)
    values = torch.empty(shape, dtype=problem.accumulate, device=problem.device)
    for part in problem.parts:
        rows = slice(part.start, part.stop)
        _values(problem, part, stats.rows(part.start, part.stop), values[:, rows])
    return values


def _gradient(problem: Problem, part: Part, grad: Tensor, stats: RowStats) -> LogitGradient:
    """Gradient with respect to the logits, given that of the values [outputs, rows]."""
    total, done = LogitGradient(), 0
    for i, functional in enumerate(problem.recipe.functionals):
        count = functional.outputs(problem.inputs)
        if i in part.functionals:
            total = total + functional.gradient(grad[done : done + count], stats)
        done += count
    return total


def _settled_gradient(problem: Problem, part: Part, grad: Tensor, stats: RowStats) -> LogitGradient:
    """The same, with everything known that it is made of."""
    # Coefficients that cancel must have been rounded alike, to what the row pass computes in.
    stats, grad = stats.to(problem.accumulate), grad.to(problem.accumulate)
    return _gradient(problem, part, grad, stats).settled(stats)


def differentiate_tokens(run: Pass, weights: Tensor, out: GradientBuffers) -> Tensor:
    """Early: values and gradients of sum(weights * values), token block by token block.

    Args:
        weights: [outputs, live rows].
        out: receives the gradients.

    Returns:
        The values, [outputs, live rows].
    """
    problem, plan = run.problem, run.plan
    vocab = problem.recipe.vocab
    values = torch.empty(weights.shape, dtype=problem.accumulate, device=problem.device)
    step = min(plan.token_block, problem.rows)
    weights = out.operand(weights)
    bound = filter_bound(plan, weights)
    for part in problem.parts:
        for a, b in blocks(part.stop - part.start, step):
            a, b = part.start + a, part.start + b
            hidden = run.hidden(part, a, b, step)
            room = run.logit_room(step, vocab)
            logits = run.logits_in(room, part.streams, b - a, vocab)
            run.logits(hidden, 0, vocab, logits)
            stats = run.empty_stats(b - a, {name: x[a:b] for name, x in problem.inputs.items()})
            block = RawBlock(problem, stats, logits, 0)
            peaks = _differentiate_block(run, part, block, weights[:, a:b], bound)
            _values(problem, part, stats, values[:, a:b])
            out.add_rows(run, logits[0], hidden[0], (a, b), peaks, bound)
    return values


def _differentiate_block(
    run: Pass, part: Part, block: RawBlock, weights: Tensor, bound: Tensor | None
) -> Tensor | None:
    """Statistics of a token block, and its gradient in the place of the student's logits."""
    problem, backend, out = run.problem, run.backend, block.logits[0]
    functionals = [problem.recipe.functionals[i] for i in part.functionals]
    if isinstance(backend, WalkingBackend) and not any(f.looks_back for f in functionals):
        wanted = problem.recipe.measured(part.functionals)
        if backend.walks([s for s in wanted if not isinstance(s, Picked)]):
            rest = run.pick(block, wanted)
            gradient = _gradient(problem, part, weights, block.stats)
            return backend.walk(block, rest, gradient, out, bound)
    for sweep in range(1, problem.recipe.sweeps + 1):
        run.measure(part, block, sweep)
        block = replace(block, stats=reduce_stats(block.stats))
    gradient = _settled_gradient(problem, part, weights, block.stats)
    return backend.gradient(block, gradient, out, bound)


def differentiate_vocabulary(
    run: Pass, grad: Tensor, stats: RowStats, kept: Tensor | None, out: GradientBuffers
) -> None:
    """Late and kept: gradients vocabulary chunk by chunk, all live rows at once.

    The weight gradient of a chunk is complete after one product, so it needs no accumulator.

    Args:
        grad: gradient of the values, [outputs, live rows].
        stats: the forward's statistics.
        kept: raw logits [streams, rows, V] of the first rows; the others are recomputed.
        out: receives the gradients.
    """
    problem, plan, gemm = run.problem, run.plan, run.problem.recipe.gemm
    total = problem.rows
    if total == 0:
        return
    grad = out.operand(grad)
    # Ids are places in the problem's own order.
    stats = RowStats(stats, problem.inputs)
    held = 0 if kept is None else min(kept.shape[1], total)
    student = run.hidden(Part(0, total, (0,), ()), 0, total, total)[0]
    pieces = []
    for part in problem.parts:
        hidden = run.hidden(part, part.start, part.stop, total, inside=True)
        hidden[0] = student[part.start : part.stop]
        inner = min(max(held, part.start), part.stop)
        for a, b in ((part.start, inner), (inner, part.stop)):
            if a < b:
                of_rows = {j: h[a - part.start : b - part.start] for j, h in hidden.items()}
                rows = HiddenRows(problem, stats.rows(a, b), of_rows)
                gradient = _settled_gradient(problem, part, grad[:, a:b], rows.stats)
                fused = None if b <= held else run.fused(part, rows)
                pieces.append(_Piece(a, b, rows, gradient, fused))
    room = run.logit_room(total, plan.vocab_block)
    bound = filter_bound(plan, grad)
    read = {j for piece in pieces if piece.fused is not None for j in piece.rows.hidden}
    for a, b in blocks(problem.recipe.vocab, plan.vocab_block):
        chunk = run.logits_in(room, range(len(problem.streams)), total, b - a)
        weights = {j: problem.streams[j].weights(a, b, gemm, run.copies[j]) for j in read}
        peaks = []
        for piece in pieces:
            rows, dz = piece.rows, chunk[0][piece.start : piece.stop]
            if piece.fused is not None:
                found = piece.fused.differentiate_products(
                    rows, weights, a, piece.gradient, dz, bound
                )
            else:
                if piece.stop <= held and kept is not None:
                    logits = {j: kept[j, piece.start : piece.stop, a:b] for j in rows.hidden}
                else:
                    logits = {j: chunk[j][piece.start : piece.stop] for j in rows.hidden}
                    run.logits(rows.hidden, a, b, logits)
                block = RawBlock(problem, rows.stats, logits, a)
                found = run.backend.gradient(block, piece.gradient, dz, bound)
            peaks.append((slice(piece.start, piece.stop), found))
        out.add_columns(run, chunk[0], student, (a, b), peaks, bound)


@dataclass
class _Piece:
    """Rows of one part, all of them kept or none, on their way through the vocabulary."""

    start: int
    stop: int
    rows: HiddenRows
    gradient: LogitGradient
    fused: FusedBackend | None  # makes their gradient without logits


def saved_statistics(problem: Problem) -> tuple[Statistic, ...]:
    """What the backward needs of the forward, in the order it is stored."""
    return problem.recipe.statistics


def pack_stats(problem: Problem, stats: RowStats) -> Tensor:
    """Statistics of the live rows as one tensor [numbers, N]; left-out rows hold 0."""
    found = torch.cat([stats[s] for s in saved_statistics(problem)], 0)
    return problem.scatter(found)


def unpack_stats(problem: Problem, packed: Tensor) -> RowStats:
    """The inverse of :func:`pack_stats`."""
    rows = problem.gather(packed)
    stats, done = RowStats({}, problem.inputs), 0
    for statistic in saved_statistics(problem):
        width = statistic.width(problem.inputs)
        stats[statistic] = rows[done : done + width]
        done += width
    return stats
