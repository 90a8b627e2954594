"""An op's tensors, put together with its recipe: the rows that count, the streams, the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.backends.traits import traits
from pad_kernels.engine.arguments import Arguments
from pad_kernels.engine.devices import generation, total_memory
from pad_kernels.engine.feed import copy_rows, elsewhere, enters_product, pieces
from pad_kernels.engine.inputs import muted_input
from pad_kernels.engine.plan import ALIGNED, Plan, Shape
from pad_kernels.engine.planner import default_budget, make_plan
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.rows import Part, choose_rows
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.statistics import Largest
from pad_kernels.heads import HeadOptions


@dataclass
class Stream:
    """One model's hidden states and head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), cut to the real vocabulary
    bias: Tensor | None  # (V,), accumulation dtype
    head: HeadOptions
    order: Tensor | None = None  # (V,) weight rows by vocabulary entry; None: as they lie

    def rows(
        self, live: Tensor | None, start: int, stop: int, gemm: torch.dtype, buffer: Tensor
    ) -> Tensor:
        """Hidden states of the live rows start to stop [rows, H], gathered only if need be."""
        hidden = self.hidden
        if live is None:
            block = hidden[start:stop]
            if block.dtype == gemm and block.stride(-1) == 1 and block.stride(0) >= block.shape[1]:
                return block
            return buffer[: stop - start].copy_(block)
        index, target = live[start:stop], buffer[: stop - start]
        if hidden.dtype == gemm:
            return torch.index_select(hidden, 0, index, out=target)
        for a, b in pieces(target):
            target[a:b].copy_(hidden.index_select(0, index[a:b]))
        return target

    def weights(self, start: int, stop: int, gemm: torch.dtype, buffer: Tensor | None) -> Tensor:
        """Weight rows start to stop [cols, H] as an operand; copied to ``buffer`` if need be."""
        if buffer is None:
            return self.weight[start:stop]
        return copy_rows(self.weight, start, stop, buffer, self.order)


@dataclass
class Problem:
    """Everything a schedule needs to know."""

    recipe: Recipe
    streams: list[Stream]
    tokens: int  # N, before rows are left out
    live: Tensor | None  # indices of the rows that count; None: all of them, in order
    rows: int  # how many rows count
    parts: list[Part]  # of the live rows
    inputs: dict[str, Tensor]  # per-row inputs of the live rows
    weight: Tensor  # the student's whole weight, for its gradient's shape
    bias_dtype: torch.dtype | None
    muted: Tensor | None = None  # (rows,) bool, live rows that count nothing; None: there are none
    broken: Tensor | None = None  # bool, whether an input is wrong; None: they have been checked

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.weight.device

    @property
    def order(self) -> Tensor | None:
        """Which weight row each vocabulary entry is, [V]; None: as they lie."""
        return self.streams[0].order

    def gather(self, x: Tensor) -> Tensor:
        """Numbers [k, N] of the live rows."""
        return x if self.live is None else x.index_select(1, self.live)

    def scatter(self, x: Tensor, missing: int = 0) -> Tensor:
        """Numbers [k, live rows] as [k, N], ``missing`` elsewhere."""
        if self.live is None:
            return x
        return x.new_full((x.shape[0], self.tokens), missing).index_copy_(1, self.live, x)

    def factors(self, x: Tensor) -> Tensor:
        """Factors [k, N] as those of the live rows' values, 0 where a row counts nothing."""
        x = self.gather(x)
        return x if self.muted is None else x.masked_fill(self.muted, 0)

    def outputs(self, x: Tensor, missing: int = 0) -> Tensor:
        """Values [k, live rows] as [k, N], ``missing`` for rows that do not count.

        All of them are NaN if an input could not be checked in time and is wrong.
        """
        if self.muted is not None:
            x = x.masked_fill(self.muted, missing)
        if self.broken is not None and x.is_floating_point():
            x = x.masked_fill(self.broken, torch.nan)
        return self.scatter(x, missing)

    def workspace(self, plan: Plan) -> Workspace:
        """The workspace of one pass of the plan; kept logits are not part of it."""
        kept = len(self.streams) * plan.kept_rows * self.recipe.vocab * self.recipe.gemm.itemsize
        return Workspace(self.device, plan.workspace_bytes - kept, self.limit)

    @property
    def limit(self) -> int:
        """Bytes of workspace that the op may use."""
        return self.recipe.request.budget or default_budget(total_memory(self.device))

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of statistics and accumulators."""
        return accumulate_dtype(self.streams[0].hidden.dtype)

    def copied_weight_buffers(self, workspace: Workspace, cols: int) -> list[Tensor | None]:
        """A buffer for each stream whose weight has to be copied on its way into a product.

        The streams run one after the other, so one piece of memory serves all; those of an order
        are in use together.
        """
        gemm = self.recipe.gemm
        if self.streams[0].order is not None:
            return [workspace.empty(cols, s.weight.shape[1], dtype=gemm) for s in self.streams]
        copied = [
            not enters_product(s.weight, gemm) or elsewhere(s.weight, self.device)
            for s in self.streams
        ]
        if not any(copied):
            return [None] * len(self.streams)
        widest = max(s.weight.shape[1] for s in self.streams)
        flat = workspace.empty(cols * widest, dtype=gemm)
        return [
            flat[: cols * s.weight.shape[1]].view(cols, -1) if copy else None
            for s, copy in zip(self.streams, copied, strict=True)
        ]


def planned_device(tensor: Tensor) -> torch.device:
    """The device to plan for: a tensor without storage stands for one on the CPU."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def plan_shape(
    recipe: Recipe, hidden: Sequence[Tensor], weights: Sequence[Tensor], *, reduced: bool
) -> Shape:
    """What the planner needs to know; real and fake tensors give the same answer."""
    student = hidden[0]
    device = planned_device(student)
    backend = recipe.request.backend
    assert backend is not None, "resolve_backend comes first"
    copied = any(
        not enters_product(w[: recipe.vocab], recipe.gemm) or elsewhere(w, student.device)
        for w in weights
    )
    return Shape(
        tokens=int(student.shape[0]),
        vocab=recipe.vocab,
        hidden=tuple(int(h.shape[1]) for h in hidden),
        input=student.dtype,
        weight=weights[0].dtype,
        gemm=recipe.gemm,
        needs=recipe.needs,
        reduced=reduced,
        sweeps=recipe.sweeps,
        backend=backend,
        device=generation(device),
        device_bytes=total_memory(device),
        copied_weights=copied,
        fused=len(hidden) <= traits(backend).fuses and not copied and _fuses(recipe, hidden),
    )


def _fuses(recipe: Recipe, hidden: Sequence[Tensor]) -> bool:
    """Whether kernels take these statistics without logits in memory, as one can foretell."""
    known = not any(isinstance(s, Largest) for s in recipe.measured())
    wide = all(int(h.shape[1]) % ALIGNED == 0 for h in hidden)
    return known and wide and recipe.sweeps == 1 and recipe.gemm.itemsize == 2


def op_plan(recipe: Recipe, given: Arguments, *, reduced: bool) -> Plan:
    """The plan of an op from the tensors it was called with."""
    hidden, weights, _ = zip(*given.streams(recipe), strict=True)
    return make_plan(plan_shape(recipe, hidden, weights, reduced=reduced), recipe.request)


def build_problem(recipe: Recipe, given: Arguments, coefficients: Tensor | None = None) -> Problem:
    """Check values, leave out the rows that do not count, and put the streams together.

    Args:
        coefficients: [outputs, N], weights of the values. A row without any is left out, and a
            teacher is computed for the rows that use it.

    Raises:
        ValueError: a label or candidate id is outside the vocabulary.
    """
    inputs, tokens = given.inputs(recipe), given.hidden.shape[0]
    rows = choose_rows(recipe, inputs, tokens, coefficients)
    if rows.live is not None:
        inputs = {name: x.index_select(0, rows.live) for name, x in inputs.items()}
    if rows.muted is not None:
        inputs = {
            name: muted_input(name, x, rows.muted, recipe.vocab) for name, x in inputs.items()
        }
    accumulate = accumulate_dtype(given.hidden.dtype)
    streams = [
        Stream(h, w[: recipe.vocab], _row_vector(b, recipe.vocab, accumulate, h.device), head)
        for (h, w, b), head in zip(given.streams(recipe), recipe.heads, strict=True)
    ]
    return Problem(
        recipe=recipe,
        streams=streams,
        tokens=tokens,
        live=rows.live,
        rows=rows.parts[-1].stop if rows.parts else 0,
        parts=rows.parts,
        inputs=inputs,
        weight=given.weight,
        bias_dtype=None if given.bias is None else given.bias.dtype,
        muted=rows.muted,
        broken=rows.broken,
    )


def _row_vector(
    bias: Tensor | None, vocab: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The bias of the real entries as row passes read it: contiguous, in their dtype.

    One that lies on the CPU is on its way when the host goes on.
    """
    return None if bias is None else bias[:vocab].to(device, dtype, non_blocking=True).contiguous()
