"""A plan at work: operands and logits in its buffers, and what the backend does with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pad_kernels.backends.base import (
    Backend,
    FilteringBackend,
    FusedBackend,
    HiddenRows,
    LiveTiles,
    RawBlock,
)
from pad_kernels.backends.choice import get_backend
from pad_kernels.engine.devices import total_memory
from pad_kernels.engine.feed import weight_chunks
from pad_kernels.engine.plan import Plan, row_pitch
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.rows import Part
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.statistics import Picked, RowStats, Statistic, empty_stats


@dataclass
class Run:
    """The problem, its plan, the backend and the buffers."""

    problem: Problem
    plan: Plan
    backend: Backend
    workspace: Workspace
    copies: list[Tensor | None]
    _rooms: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def start(problem: Problem, plan: Plan, workspace: Workspace) -> Run:
        """Take the buffers that every schedule needs."""
        copies = problem.copied_weight_buffers(workspace, plan.vocab_block)
        return Run(problem, plan, get_backend(plan.backend), workspace, copies)

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

    def weights(self, streams: Iterable[int], start: int, stop: int) -> dict[int, Tensor]:
        """Weight rows [cols, H] of some streams for the vocabulary entries start to stop."""
        problem = self.problem
        gemm = problem.recipe.gemm
        return {j: problem.streams[j].weights(start, stop, gemm, self.copies[j]) for j in streams}

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
