"""Logits of a few given tokens a row: a gather of weight rows, not a product with all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.backends.registry import interpreting, triton_error
from pad_kernels.engine.problem import bad_rows, capturing, check_inputs_of
from pad_kernels.engine.workspace import Workspace

#: Bytes of gathered weight rows at a time.
_BLOCK = 8 << 20


def _blocks(hidden: Tensor, ids: Tensor, live: Tensor) -> Iterator[Tensor]:
    """Indices of rows whose weight rows are gathered together."""
    row = ids.shape[1] * hidden.shape[1] * accumulate_dtype(hidden.dtype).itemsize
    yield from live.split(max(_BLOCK // max(row, 1), 1)) if live.numel() else ()


def _kernels(hidden: Tensor, backend: str) -> ModuleType | None:
    """Kernels that read the weight rows where they are, if there are any for such inputs."""
    there = hidden.is_cuda or interpreting()
    if backend not in ("", "triton") or not there:
        return None
    if hidden.dtype == torch.float64 or triton_error():
        return None
    from pad_kernels.backends.triton import gather

    return gather


def _checked(teacher: Mapping[str, Tensor], counted: Tensor, vocab: int) -> Tensor | None:
    """Raise if a counted row is not what it should be; under graph capture say if one is not."""
    bad = bad_rows(vocab, teacher)
    assert bad is not None
    bad = bad & counted
    if capturing({"counted": counted}, None):
        return bad.any()
    if bad.any():
        check_inputs_of(vocab, {name: x[bad] for name, x in teacher.items()})
    return None


@torch.library.custom_op("pad_kernels::candidate_logits", mutates_args=())
def candidate_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    counted: Tensor,
    vocab: int,
    backend: str,
) -> Tensor:
    """Raw products [N, k] of hidden [N, H] with the rows ``ids`` [N, k] of weight [V, H].

    Only rows that are ``counted`` [N] are computed and checked, with the teacher's ``logprobs``;
    the others are 0.
    """
    dtype = accumulate_dtype(hidden.dtype)
    broken = _checked({"teacher_ids": ids, "teacher_logprobs": logprobs}, counted, vocab)
    ids = ids.contiguous()
    out = hidden.new_zeros(ids.shape, dtype=dtype)
    if (kernels := _kernels(hidden, backend)) is not None:
        if out.numel():
            kernels.run(out, kernels.gather_logits(hidden, weight, ids, counted, out, vocab))
        return out if broken is None else out.masked_fill(broken, torch.nan)
    live = counted.nonzero().squeeze(1)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _blocks(hidden, ids, live):
            gathered = weight[ids[rows]].to(dtype)
            out[rows] = torch.bmm(gathered, hidden[rows].to(dtype).unsqueeze(2)).squeeze(2)
    return out


@candidate_logits.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    counted: Tensor,
    vocab: int,
    backend: str,
) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=accumulate_dtype(hidden.dtype))


@torch.library.custom_op("pad_kernels::candidate_logits_backward", mutates_args=())
def candidate_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    counted: Tensor,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; nothing for one that does not want any."""
    dtype = accumulate_dtype(hidden.dtype)
    d_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    if (kernels := _kernels(hidden, backend)) is not None:
        d_weight = torch.zeros_like(weight) if needs_weight else hidden.new_empty(0)
        if ids.numel():
            _gather_gradients(kernels, grad, hidden, weight, ids, counted, d_hidden, d_weight)
        return d_hidden, d_weight
    live = counted.nonzero().squeeze(1)
    off = torch.autocast(hidden.device.type, enabled=False)
    with Workspace(hidden.device) as workspace, off:
        total = None
        if needs_weight:
            # A half-precision sum over rows would lose the small ones; others are the gradient.
            own = weight.dtype == dtype
            shape = tuple(weight.shape)
            total = weight.new_empty(shape) if own else workspace.empty(*shape, dtype=dtype)
            total.zero_()
        for rows in _blocks(hidden, ids, live):
            g = grad[rows].to(dtype)
            if needs_hidden:
                gathered = weight[ids[rows]].to(dtype)
                d_hidden[rows] = torch.bmm(g.unsqueeze(1), gathered).squeeze(1).to(hidden.dtype)
            if total is not None:
                outer = g.unsqueeze(2) * hidden[rows].to(dtype).unsqueeze(1)
                total.index_add_(0, ids[rows].reshape(-1), outer.flatten(0, 1))
        d_weight = hidden.new_empty(0) if total is None else total.to(weight.dtype)
    return d_hidden, d_weight


def _gather_gradients(
    kernels: ModuleType,
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    counted: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
) -> None:
    """Fill the gradients that are not empty; they are zeros so far."""
    grad, ids = grad.contiguous(), ids.contiguous()
    if d_hidden.numel():
        kernels.run(grad, kernels.gather_hidden(grad, weight, ids, counted, d_hidden))
    if d_weight.numel():
        with Workspace(hidden.device) as workspace:
            # The pairs of an id side by side: one program adds them up, no float32 sum of [V, H].
            keys, found, order = workspace.empty(3, ids.numel(), dtype=torch.int64)
            keys.view(ids.shape).copy_(ids).masked_fill_(~counted.unsqueeze(1), weight.shape[0])
            torch.sort(keys, stable=True, out=(found, order))
            kernels.run(grad, kernels.scatter_weight(grad, hidden, found, order, d_weight))


@candidate_logits_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    counted: Tensor,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    d_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight) if needs_weight else hidden.new_empty(0)
    return d_hidden, d_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, ids, _, counted, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, ids, counted)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    d_hidden, d_weight = candidate_logits_backward(grad, *ctx.saved_tensors, ctx.backend, *needs)
    wanted = d_hidden if needs[0] else None, d_weight if needs[1] else None
    return *wanted, None, None, None, None, None


candidate_logits.register_autograd(_backward, setup_context=_save)
