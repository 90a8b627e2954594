"""Logits of a few given tokens a row: a gather of weight rows, not a product with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.engine.problem import check_inputs_of
from pad_kernels.engine.workspace import Workspace

#: Bytes of gathered weight rows at a time.
_BLOCK = 8 << 20


def _blocks(hidden: Tensor, ids: Tensor, live: Tensor) -> Iterator[Tensor]:
    """Indices of rows whose weight rows are gathered together."""
    row = ids.shape[1] * hidden.shape[1] * accumulate_dtype(hidden.dtype).itemsize
    yield from live.split(max(_BLOCK // max(row, 1), 1)) if live.numel() else ()


@torch.library.custom_op("pad_kernels::candidate_logits", mutates_args=())
def candidate_logits(
    hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, counted: Tensor, vocab: int
) -> Tensor:
    """Raw products [N, k] of hidden [N, H] with the rows ``ids`` [N, k] of weight [V, H].

    Only rows that are ``counted`` [N] are computed and checked, with the teacher's ``logprobs``;
    the others are 0.
    """
    dtype = accumulate_dtype(hidden.dtype)
    live = counted.nonzero().squeeze(1)
    teacher = {"teacher_ids": ids, "teacher_logprobs": logprobs}
    check_inputs_of(vocab, {name: x.index_select(0, live) for name, x in teacher.items()})
    out = hidden.new_zeros(ids.shape, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _blocks(hidden, ids, live):
            gathered = weight[ids[rows]].to(dtype)
            out[rows] = torch.bmm(gathered, hidden[rows].to(dtype).unsqueeze(2)).squeeze(2)
    return out


@candidate_logits.register_fake
def _(
    hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, counted: Tensor, vocab: int
) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=accumulate_dtype(hidden.dtype))


@torch.library.custom_op("pad_kernels::candidate_logits_backward", mutates_args=())
def candidate_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    counted: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; nothing for one that does not want any."""
    dtype = accumulate_dtype(hidden.dtype)
    d_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
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


@candidate_logits_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    counted: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    d_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight) if needs_weight else hidden.new_empty(0)
    return d_hidden, d_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, ids, _, counted, _ = inputs
    ctx.save_for_backward(hidden, weight, ids, counted)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    d_hidden, d_weight = candidate_logits_backward(grad, *ctx.saved_tensors, *needs)
    wanted = d_hidden if needs[0] else None, d_weight if needs[1] else None
    return *wanted, None, None, None, None


candidate_logits.register_autograd(_backward, setup_context=_save)
