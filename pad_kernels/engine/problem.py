"""An op's tensors, put together with its recipe: the rows that count, the streams, the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels._checks import fail_value
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.engine.plan import Plan, Shape
from pad_kernels.engine.planner import default_budget, make_plan
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.workspace import Workspace
from pad_kernels.heads import HeadOptions


def enters_product(weight: Tensor, gemm: torch.dtype) -> bool:
    """Whether a matrix product takes the weight [V, H] as it lies, without a copy."""
    if weight.dtype != gemm:
        return False
    rows, cols = weight.shape
    by_rows = weight.stride(1) == 1 and weight.stride(0) >= cols
    by_cols = weight.stride(0) == 1 and weight.stride(1) >= rows
    return by_rows or by_cols


@dataclass
class Stream:
    """One model's hidden states and head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), cut to the real vocabulary
    bias: Tensor | None  # (V,), accumulation dtype
    head: HeadOptions

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
        index = live[start:stop]
        if hidden.dtype == gemm:
            return torch.index_select(hidden, 0, index, out=buffer[: stop - start])
        return buffer[: stop - start].copy_(hidden.index_select(0, index))

    def weights(self, start: int, stop: int, gemm: torch.dtype, buffer: Tensor | None) -> Tensor:
        """Weight rows start to stop [cols, H] as an operand; copied to ``buffer`` if need be."""
        chunk = self.weight[start:stop]
        return chunk if buffer is None else buffer[: stop - start].copy_(chunk)


@dataclass
class Problem:
    """Everything a schedule needs to know."""

    recipe: Recipe
    streams: list[Stream]
    tokens: int  # N, before rows are left out
    live: Tensor | None  # indices of the rows that count; None: all of them
    rows: int  # how many rows count
    inputs: dict[str, Tensor]  # per-row inputs of the live rows
    weight: Tensor  # the student's whole weight, for its gradient's shape
    bias_dtype: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.weight.device

    def workspace(self, plan: Plan) -> Workspace:
        """The workspace of one pass of the plan; kept logits are not part of it."""
        kept = len(self.streams) * plan.kept_rows * self.recipe.vocab * self.recipe.gemm.itemsize
        return Workspace(self.device, plan.workspace_bytes - kept, self.limit)

    @property
    def limit(self) -> int:
        """Bytes of workspace that the op may use."""
        default = default_budget(self.device.type, _device_bytes(self.device))
        return self.recipe.request.budget or default

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of statistics and accumulators."""
        return accumulate_dtype(self.streams[0].hidden.dtype)

    def copied_weight_buffers(self, workspace: Workspace, cols: int) -> list[Tensor | None]:
        """A buffer for each stream whose weight cannot enter a product as it lies.

        The streams run one after the other, so one buffer serves all.
        """
        gemm = self.recipe.gemm
        copied = [not enters_product(s.weight, gemm) for s in self.streams]
        if not any(copied):
            return [None] * len(self.streams)
        widest = max(s.weight.shape[1] for s in self.streams)
        flat = workspace.empty(cols * widest, dtype=gemm)
        return [
            flat[: cols * s.weight.shape[1]].view(cols, -1) if copy else None
            for s, copy in zip(self.streams, copied, strict=True)
        ]


def _device_bytes(device: torch.device) -> int:
    """Total memory of a GPU; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory


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
        device=device.type,
        device_bytes=_device_bytes(device),
        copied_weights=not all(enters_product(w[: recipe.vocab], recipe.gemm) for w in weights),
    )


def split_teachers(
    recipe: Recipe, teachers: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """The flat list of teacher tensors as hidden states, weights and biases."""
    hidden, weights, biases = [], [], []
    rest = list(teachers)
    for biased in recipe.biased[1:]:
        hidden.append(rest.pop(0))
        weights.append(rest.pop(0))
        biases.append(rest.pop(0) if biased else None)
    return hidden, weights, biases


def op_plan(
    recipe: Recipe, hidden: Tensor, weight: Tensor, teachers: Sequence[Tensor], *, reduced: bool
) -> Plan:
    """The plan of an op from the tensors it was called with."""
    more_hidden, more_weights, _ = split_teachers(recipe, teachers)
    shape = plan_shape(recipe, [hidden, *more_hidden], [weight, *more_weights], reduced=reduced)
    return make_plan(shape, recipe.request)


def build_problem(
    recipe: Recipe,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    used: Tensor | None = None,
) -> Problem:
    """Check values, leave out the rows that do not count, and put the streams together.

    Args:
        used: bool [N], rows that have a weight; None when all have.

    Raises:
        ValueError: a label or candidate id is outside the vocabulary.
    """
    inputs = dict(zip(recipe.input_names, row_inputs, strict=True))
    live = _live_rows(recipe, inputs, used)
    if live is not None:
        inputs = {name: x.index_select(0, live) for name, x in inputs.items()}
    check_ids(recipe, inputs)
    more_hidden, more_weights, more_biases = split_teachers(recipe, teachers)
    accumulate = accumulate_dtype(hidden.dtype)
    streams = [
        Stream(h, w[: recipe.vocab], _row_vector(b, recipe.vocab, accumulate), head)
        for h, w, b, head in zip(
            [hidden, *more_hidden],
            [weight, *more_weights],
            [bias, *more_biases],
            recipe.heads,
            strict=True,
        )
    ]
    rows = hidden.shape[0] if live is None else live.shape[0]
    bias_dtype = None if bias is None else bias.dtype
    return Problem(recipe, streams, hidden.shape[0], live, rows, inputs, weight, bias_dtype)


def _row_vector(bias: Tensor | None, vocab: int, dtype: torch.dtype) -> Tensor | None:
    """The bias of the real entries as row passes read it: contiguous, in their dtype."""
    return None if bias is None else bias[:vocab].to(dtype).contiguous()


def _live_rows(recipe: Recipe, inputs: Mapping[str, Tensor], used: Tensor | None) -> Tensor | None:
    mask = used
    if recipe.ignore_index is not None and "labels" in inputs:
        kept = inputs["labels"][:, 0] != recipe.ignore_index
        mask = kept if mask is None else mask & kept
    if mask is None or bool(mask.all()):
        return None
    return mask.nonzero().squeeze(1)


def check_ids(recipe: Recipe, inputs: Mapping[str, Tensor]) -> None:
    """Raise if a live row's label or candidate id is outside the vocabulary."""
    for name, ids in inputs.items():
        if ids.dtype == torch.int64 and ids.numel():
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= recipe.vocab:
                bad = low if low < 0 else high
                expected = f"token ids in [0, {recipe.vocab})"
                if name == "labels" and recipe.ignore_index is not None:
                    expected += f" or ignore_index {recipe.ignore_index}"
                fail_value(name, expected, bad)
