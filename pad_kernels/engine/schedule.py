"""The block loops: statistics and gradients over token blocks or vocabulary chunks.

These functions are ordinary code over tensors, without autograd; the ops wrap them. Nothing here
holds N x V numbers: a token block holds rows x V, a vocabulary chunk N x cols, and kept logits are
as many rows as the plan says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pad_kernels.backends.base import FusedBackend, HiddenRows, RawBlock, WalkingBackend
from pad_kernels.engine.feed import blocks
from pad_kernels.engine.filter import filter_bound
from pad_kernels.engine.gradients import GradientBuffers
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.rows import Part
from pad_kernels.engine.run import Run
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import Picked, RowStats


def reduce_stats(stats: RowStats) -> RowStats:
    """Between sweeps and before values: the place for an all-reduce over vocabulary shards."""
    return stats


def measure_rows(run: Run, kept: Tensor | None) -> RowStats:
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
    run: Run, part: Part, stats: RowStats, span: tuple[int, int], kept: Tensor | None, room: int
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
    run: Run, part: Part, stats: RowStats, span: tuple[int, int], most: int, room: int
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


def differentiate_tokens(run: Run, weights: Tensor, out: GradientBuffers) -> Tensor:
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
            out.add_rows(logits[0], hidden[0], (a, b), peaks, bound)
    return values


def _differentiate_block(
    run: Run, part: Part, block: RawBlock, weights: Tensor, bound: Tensor | None
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


@dataclass
class _Piece:
    """Rows of one part on their way through the vocabulary, all of them kept or none."""

    span: slice  # of the live rows
    rows: HiddenRows
    gradient: LogitGradient
    kept: dict[int, Tensor] | None  # their raw logits [rows, V]
    fused: FusedBackend | None  # makes their gradient without logits

    def differentiate(
        self,
        run: Run,
        chunk: dict[int, Tensor],
        weights: dict[int, Tensor],
        span: tuple[int, int],
        bound: Tensor | None,
    ) -> Tensor | None:
        """Write dL/dz of the vocabulary entries of ``span`` to the student's part of a chunk.

        Args:
            chunk: room for logits [live rows, cols] of every stream.
            weights: their weight rows, for what is fused.

        Returns:
            What the filter looks at.
        """
        rows, out, (a, b) = self.rows, chunk[0][self.span], span
        if self.fused is not None:
            return self.fused.differentiate_products(rows, weights, a, self.gradient, out, bound)
        if self.kept is not None:
            logits = {j: z[:, a:b] for j, z in self.kept.items()}
        else:
            logits = {j: chunk[j][self.span] for j in rows.hidden}
            run.logits(rows.hidden, a, b, logits)
        block = RawBlock(run.problem, rows.stats, logits, a)
        return run.backend.gradient(block, self.gradient, out, bound)


def differentiate_vocabulary(
    run: Run, grad: Tensor, stats: RowStats, kept: Tensor | None, out: GradientBuffers
) -> None:
    """Late and kept: gradients vocabulary chunk by chunk, all live rows at once.

    The weight gradient of a chunk is complete after one product, so it needs no accumulator.

    Args:
        grad: gradient of the values, [outputs, live rows].
        stats: the forward's statistics.
        kept: raw logits [streams, rows, V] of the first rows; the others are recomputed.
        out: receives the gradients.
    """
    problem, plan, total = run.problem, run.plan, run.problem.rows
    if total == 0:
        return
    grad = out.operand(grad)
    student = run.hidden(Part(0, total, (0,), ()), 0, total, total)[0]
    # Ids are places in the problem's own order.
    pieces = _pieces(run, student, grad, RowStats(stats, problem.inputs), kept)
    room = run.logit_room(total, plan.vocab_block)
    bound = filter_bound(plan, grad)
    read = {j for piece in pieces if piece.fused is not None for j in piece.rows.hidden}
    for a, b in blocks(problem.recipe.vocab, plan.vocab_block):
        chunk = run.logits_in(room, range(len(problem.streams)), total, b - a)
        weights = run.weights(read, a, b)
        peaks = [
            (piece.span, piece.differentiate(run, chunk, weights, (a, b), bound))
            for piece in pieces
        ]
        out.add_columns(chunk[0], student, (a, b), peaks, bound)


def _pieces(
    run: Run, student: Tensor, grad: Tensor, stats: RowStats, kept: Tensor | None
) -> list[_Piece]:
    """The live rows by part, those that are kept apart from those that are not.

    Args:
        student: the student's hidden states [live rows, H].
    """
    problem, found = run.problem, []
    held = 0 if kept is None else min(kept.shape[1], problem.rows)
    for part in problem.parts:
        hidden = run.hidden(part, part.start, part.stop, problem.rows, inside=True)
        hidden[0] = student[part.start : part.stop]
        inner = min(max(held, part.start), part.stop)
        for a, b in ((part.start, inner), (inner, part.stop)):
            if a == b:
                continue
            of_rows = {j: h[a - part.start : b - part.start] for j, h in hidden.items()}
            rows = HiddenRows(problem, stats.rows(a, b), of_rows)
            gradient = _settled_gradient(problem, part, grad[:, a:b], rows.stats)
            logits, fused = None, None
            if kept is not None and b <= held:
                logits = {j: kept[j, a:b] for j in of_rows}
            else:
                fused = run.fused(part, rows)
            found.append(_Piece(slice(a, b), rows, gradient, logits, fused))
    return found


def pack_stats(problem: Problem, stats: RowStats) -> Tensor:
    """What the backward needs of the forward as one tensor [numbers, N]; left-out rows hold 0."""
    found = torch.cat([stats[s] for s in problem.recipe.statistics], 0)
    return problem.scatter(found)


def unpack_stats(problem: Problem, packed: Tensor) -> RowStats:
    """The inverse of :func:`pack_stats`."""
    rows = problem.gather(packed)
    stats, done = RowStats({}, problem.inputs), 0
    for statistic in problem.recipe.statistics:
        width = statistic.width(problem.inputs)
        stats[statistic] = rows[done : done + width]
        done += width
    return stats
