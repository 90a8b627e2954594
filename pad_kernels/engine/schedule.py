"""The block loops: statistics and gradients over token blocks or vocabulary chunks.

These functions are ordinary code over tensors, without autograd; the ops wrap them. Nothing here
holds N x V numbers: a token block holds rows x V, a vocabulary chunk N x cols, and kept logits are
as many rows as the plan says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.backends.base import Backend, get_backend
from pad_kernels.engine.gradients import GradientBuffers, column_runs
from pad_kernels.engine.plan import Plan
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import Picked, RowStats, Statistic, empty_stats


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks."""
    for start in range(0, total, max(size, 1)):
        yield start, min(start + max(size, 1), total)


@dataclass
class Pass:
    """One walk over the rows: the problem, its plan, the backend and the buffers."""

    problem: Problem
    plan: Plan
    backend: Backend
    workspace: Workspace
    copies: list[Tensor | None]

    @staticmethod
    def start(problem: Problem, plan: Plan, workspace: Workspace) -> Pass:
        """Take the buffers that every pass needs."""
        copies = problem.copied_weight_buffers(workspace, plan.vocab_block)
        return Pass(problem, plan, get_backend(plan.backend), workspace, copies)

    def hidden_buffers(self, rows: int) -> list[Tensor]:
        """Room for some rows' hidden states of every stream."""
        gemm = self.problem.recipe.gemm
        streams = self.problem.streams
        return [self.workspace.empty(rows, s.hidden.shape[1], dtype=gemm) for s in streams]

    def hidden(self, start: int, stop: int, buffers: list[Tensor]) -> list[Tensor]:
        """Hidden states of the live rows start to stop, every stream."""
        live, gemm = self.problem.live, self.problem.recipe.gemm
        pairs = zip(self.problem.streams, buffers, strict=True)
        return [s.rows(live, start, stop, gemm, buffer) for s, buffer in pairs]

    def logits(self, hidden: list[Tensor], start: int, stop: int, out: list[Tensor]) -> None:
        """Raw products of some rows with the vocabulary entries start to stop."""
        gemm = self.problem.recipe.gemm
        for stream, h, z, copy in zip(self.problem.streams, hidden, out, self.copies, strict=True):
            step = stop - start if copy is None else copy.shape[0]
            for a, b in blocks(stop - start, step):
                weight = stream.weights(start + a, start + b, gemm, copy)
                torch.mm(h, weight.t(), out=z[:, a:b])

    def measure(self, stats: RowStats, logits: list[Tensor], offset: int, sweep: int) -> None:
        """Merge a block of raw logits into running statistics."""
        picked = [s for s in stats if s.sweep == sweep and isinstance(s, Picked)]
        for statistic in picked:
            stats[statistic] += self._picked(statistic, stats, logits[0], offset)
        rest = [s for s in stats if s.sweep == sweep and not isinstance(s, Picked)]
        if rest:
            self.backend.measure(self.problem, stats, rest, logits, offset)

    def _picked(self, statistic: Picked, stats: RowStats, raw: Tensor, offset: int) -> Tensor:
        """Logits at given ids: a gather, the same on every backend."""
        student = self.problem.streams[0]
        ids = stats.inputs[statistic.ids]
        local = ids - offset
        inside = (local >= 0) & (local < raw.shape[1])
        found = raw.gather(1, local.clamp(0, raw.shape[1] - 1)).to(self.problem.accumulate)
        if student.bias is not None:
            found = found + student.bias[ids]
        logits = self.backend.transform(student.head, found)
        return torch.where(inside, logits, 0.0).t()

    def empty_stats(self, rows: int, inputs: dict[str, Tensor]) -> RowStats:
        """Running statistics before the first block."""
        like = torch.empty(0, dtype=self.problem.accumulate, device=self.problem.device)
        return empty_stats(self.problem.recipe.measured(), rows, inputs, like)


def reduce_stats(stats: RowStats) -> RowStats:
    """Between sweeps and before values: the place for an all-reduce over vocabulary shards."""
    return stats


def measure_rows(run: Pass, kept: Tensor | None) -> RowStats:
    """Statistics of every live row; the first rows' raw logits go to ``kept``, if there is room."""
    problem, plan = run.problem, run.plan
    stats = run.empty_stats(problem.rows, problem.inputs)
    held = 0 if kept is None else min(kept.shape[1], problem.rows)
    if kept is not None:
        _over_tokens(run, stats, 0, held, kept)
    if problem.recipe.sweeps == 2:
        _over_tokens(run, stats, held, problem.rows, None)
    elif held < problem.rows:
        _over_vocabulary(run, stats, held, plan.vocab_block)
    return reduce_stats(stats)


def _over_tokens(run: Pass, stats: RowStats, start: int, stop: int, kept: Tensor | None) -> None:
    """Statistics token block by token block, both sweeps while the block's logits are at hand."""
    vocab = run.problem.recipe.vocab
    step = min(run.plan.token_block, stop - start)
    if stop <= start:
        return
    hidden_buffers = run.hidden_buffers(step)
    block = kept
    if block is None:
        shape = (len(run.problem.streams), step, vocab)
        block = run.workspace.empty(*shape, dtype=run.problem.recipe.gemm)
    for a, b in blocks(stop - start, step):
        rows = slice(a, b) if kept is not None else slice(0, b - a)
        logits = [z[rows] for z in block]
        run.logits(run.hidden(start + a, start + b, hidden_buffers), 0, vocab, logits)
        part = stats.rows(start + a, start + b)
        run.measure(part, logits, 0, sweep=1)
        if run.problem.recipe.sweeps == 2:
            run.measure(reduce_stats(part), logits, 0, sweep=2)


def _over_vocabulary(run: Pass, stats: RowStats, start: int, cols: int) -> None:
    """One-sweep statistics of the rows from ``start`` on, vocabulary chunk by chunk."""
    problem = run.problem
    rows = problem.rows - start
    hidden = run.hidden(start, problem.rows, run.hidden_buffers(rows))
    buffer = run.workspace.empty(len(problem.streams), rows * cols, dtype=problem.recipe.gemm)
    part = stats.rows(start, problem.rows)
    for a, b in blocks(problem.recipe.vocab, cols):
        logits = [z[: rows * (b - a)].view(rows, b - a) for z in buffer]
        run.logits(hidden, a, b, logits)
        run.measure(part, logits, a, sweep=1)


def values_of(problem: Problem, stats: RowStats) -> Tensor:
    """Values [outputs, live rows] of every functional."""
    found = [f.value(stats) for f in problem.recipe.functionals]
    return torch.cat(found, 0) if found else torch.empty(0, problem.rows)


def gradient_of(problem: Problem, grad: Tensor, stats: RowStats) -> LogitGradient:
    """Gradient with respect to the logits, given that of the values [outputs, rows]."""
    total, done = LogitGradient(), 0
    for functional in problem.recipe.functionals:
        count = functional.outputs(problem.inputs)
        total = total + functional.gradient(grad[done : done + count], stats)
        done += count
    return total


def differentiate_tokens(run: Pass, weights: Tensor, out: GradientBuffers) -> Tensor:
    """Early: values and gradients of sum(weights * values), token block by token block.

    Args:
        weights: [outputs, live rows].
        out: receives the gradients.

    Returns:
        The values, [outputs, live rows].
    """
    problem, plan = run.problem, run.plan
    vocab, gemm = problem.recipe.vocab, problem.recipe.gemm
    values = torch.empty(weights.shape, dtype=problem.accumulate, device=problem.device)
    if problem.rows == 0:
        return values
    step = min(plan.token_block, problem.rows)
    hidden_buffers = run.hidden_buffers(step)
    buffer = run.workspace.empty(len(problem.streams), step, vocab, dtype=gemm)
    bound = plan.filter * float(weights.abs().max()) if plan.filter else 0.0
    for a, b in blocks(problem.rows, step):
        hidden = run.hidden(a, b, hidden_buffers)
        logits = [z[: b - a] for z in buffer]
        run.logits(hidden, 0, vocab, logits)
        stats = run.empty_stats(b - a, {name: x[a:b] for name, x in problem.inputs.items()})
        for sweep in range(1, problem.recipe.sweeps + 1):
            run.measure(stats, logits, 0, sweep)
            stats = reduce_stats(stats)
        values[:, a:b] = values_of(problem, stats)
        gradient = gradient_of(problem, weights[:, a:b], stats)
        peaks = run.backend.gradient(problem, logits[0], logits, 0, stats, gradient, bound)
        runs = column_runs(peaks, bound, vocab)
        out.add_rows(run, logits[0], hidden[0], (a, b), runs)
    return values


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
    problem, plan = run.problem, run.plan
    rows, gemm = problem.rows, problem.recipe.gemm
    if rows == 0:
        return
    held = 0 if kept is None else min(kept.shape[1], rows)
    hidden = run.hidden(0, rows, run.hidden_buffers(rows))
    gradient = gradient_of(problem, grad, stats)
    buffer = run.workspace.empty(len(problem.streams), rows * plan.vocab_block, dtype=gemm)
    bound = plan.filter * float(grad.abs().max()) if plan.filter else 0.0
    parts = [(0, held), (held, rows)]
    for a, b in blocks(problem.recipe.vocab, plan.vocab_block):
        logits = [z[: rows * (b - a)].view(rows, b - a) for z in buffer]
        if held < rows:
            run.logits([h[held:] for h in hidden], a, b, [z[held:] for z in logits])
        peaks = None
        for start, stop in parts:
            if start == stop:
                continue
            source = [z[start:stop] for z in logits]
            if stop <= held and kept is not None:
                source = [z[start:stop, a:b] for z in kept]
            found = run.backend.gradient(
                problem,
                logits[0][start:stop],
                source,
                a,
                stats.rows(start, stop),
                gradient.rows(start, stop),
                bound,
            )
            if found is not None:
                peaks = found if peaks is None else torch.maximum(peaks, found)
        runs = column_runs(peaks, bound, b - a)
        out.add_columns(run, logits[0], hidden[0], (a, b), runs)


def saved_statistics(problem: Problem) -> tuple[Statistic, ...]:
    """What the backward needs of the forward, in the order it is stored."""
    return problem.recipe.statistics


def pack_stats(problem: Problem, stats: RowStats) -> Tensor:
    """Statistics of the live rows as one tensor [numbers, N]; left-out rows hold 0."""
    found = torch.cat([stats[s] for s in saved_statistics(problem)], 0)
    return scatter_rows(problem, found)


def unpack_stats(problem: Problem, packed: Tensor) -> RowStats:
    """The inverse of :func:`pack_stats`."""
    rows = packed if problem.live is None else packed.index_select(1, problem.live)
    stats, done = RowStats({}, problem.inputs), 0
    for statistic in saved_statistics(problem):
        width = statistic.width(problem.inputs)
        stats[statistic] = rows[done : done + width]
        done += width
    return stats


def scatter_rows(problem: Problem, live: Tensor) -> Tensor:
    """[k, live rows] to [k, N], 0 elsewhere."""
    if problem.live is None:
        return live
    full = live.new_zeros(live.shape[0], problem.tokens)
    return full.index_copy_(1, problem.live, live)
