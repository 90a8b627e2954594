"""Logits of a few given tokens a row: a gather of weight rows, not a product with all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype, without_autocast
from pad_kernels.backends.base import GivenTokens
from pad_kernels.backends.choice import gathering_backend
from pad_kernels.engine.inputs import bad_rows, check_inputs
from pad_kernels.engine.rows import capturing
from pad_kernels.engine.workspace import Workspace


def _checked(teacher: Mapping[str, Tensor], counted: Tensor, vocab: int) -> Tensor | None:
    """Raise if a counted row is not what it should be; under graph capture say if one is not."""
    bad = bad_rows(vocab, teacher)
    assert bad is not None
    bad = bad & counted
    if capturing(counted):
        return bad.any()
    if bad.any():
        check_inputs(vocab, {name: x[bad] for name, x in teacher.items()})
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
    broken = _checked({"teacher_ids": ids, "teacher_logprobs": logprobs}, counted, vocab)
    out = hidden.new_zeros(ids.shape, dtype=accumulate_dtype(hidden.dtype))
    given = GivenTokens(hidden, weight[:vocab], ids.contiguous(), counted)
    with without_autocast(hidden.device):
        gathering_backend(backend, hidden).gather_logits(given, out)
    return out if broken is None else out.masked_fill(broken, torch.nan)


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
    d_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight) if needs_weight else hidden.new_empty(0)
    given = GivenTokens(hidden, weight, ids.contiguous(), counted)
    grad = grad.to(accumulate_dtype(hidden.dtype))
    with Workspace(hidden.device) as workspace, without_autocast(hidden.device):
        gatherer = gathering_backend(backend, hidden)
        gatherer.gather_gradients(given, grad, d_hidden, d_weight, workspace)
    return d_hidden, d_weight


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
