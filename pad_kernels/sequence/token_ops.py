"""Ops from token log-probs on a GPU: rewards, and listwise losses of rewards in one launch.

``pad_kernels::token_rewards`` and its transpose are each other's derivative; a listwise loss can be
differentiated once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.sequence import gpu

# Ops have no defaults, so that a fake gets every argument by its place: it names what it looks at.


def _sequences(logprob: Tensor, offsets: Tensor | None) -> int:
    return logprob.shape[0] if offsets is None else offsets.shape[0] - 1


@torch.library.custom_op("pad_kernels::token_rewards", mutates_args=())
def token_rewards(
    logprob: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Rewards [sequences] of [sequences, T] or packed [total] log-probs, and inverse counts."""
    return gpu.rewards(gpu.Tokens(logprob, offsets, mask, labels, ignore_index, mean))


@token_rewards.register_fake
def _fake_rewards(logprob: Tensor, offsets: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    count = _sequences(logprob, offsets)
    out = logprob.new_empty(count, dtype=accumulate_dtype(logprob.dtype))
    return out, logprob.new_empty(count, dtype=torch.float64)


@torch.library.custom_op("pad_kernels::token_rewards_gradient", mutates_args=())
def token_rewards_gradient(
    upstream: Tensor,
    inverse: Tensor,
    logprob: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """The gradient by ``logprob``, whose values do not matter, from that of the rewards."""
    tokens = gpu.Tokens(logprob, offsets, mask, labels, ignore_index, mean)
    return gpu.rewards_gradient(tokens, upstream, 1, None, inverse)


@token_rewards_gradient.register_fake
def _fake_rewards_gradient(upstream: Tensor, inverse: Tensor, logprob: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logprob, memory_format=torch.contiguous_format)


def _save_rewards(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logprob, offsets, mask, labels, ctx.ignore_index, ctx.mean = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], logprob, offsets, mask, labels)


def _rewards_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    inverse, logprob, *rest = ctx.saved_tensors
    found = token_rewards_gradient(
        upstream, inverse, logprob.detach(), *rest, ctx.ignore_index, ctx.mean
    )
    return found, *([None] * 5)


token_rewards.register_autograd(_rewards_backward, setup_context=_save_rewards)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[3:6])
    ctx.ignore_index, ctx.mean = inputs[6:]


def _gradient_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    rewards, _ = token_rewards(upstream, *ctx.saved_tensors, ctx.ignore_index, ctx.mean)
    return rewards, *([None] * 7)


token_rewards_gradient.register_autograd(_gradient_backward, setup_context=_save_gradient)


@torch.library.custom_op("pad_kernels::token_listwise", mutates_args=())
def token_listwise(
    logprob: Tensor,
    teacher: Tensor,
    offsets: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    kind: str,
    beta: float,
    subset_size: int,
    ignore_index: int,
    mean: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [groups], its gradient by the rewards [groups, n], inverse counts [groups · n]."""
    tokens = gpu.Tokens(logprob, offsets, None, labels, ignore_index, mean)
    return gpu.listwise(kind, tokens, teacher, valid, beta, subset_size, with_gradient)


@token_listwise.register_fake
def _fake_listwise(logprob: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups, n = teacher.shape
    loss = logprob.new_empty(groups, dtype=accumulate_dtype(logprob.dtype))
    with_gradient = rest[-1]
    gradient = logprob.new_empty((groups if with_gradient else 0, n), dtype=loss.dtype)
    return loss, gradient, logprob.new_empty(groups * n, dtype=torch.float64)


@torch.library.custom_op("pad_kernels::token_listwise_gradient", mutates_args=())
def token_listwise_gradient(
    upstream: Tensor,
    gradient: Tensor,
    inverse: Tensor,
    logprob: Tensor,
    offsets: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """The gradient by ``logprob`` from that of the losses, an op without a derivative.

    Where someone asks for a second derivative, ``logprob`` makes the result require grad and raise.
    """
    tokens = gpu.Tokens(logprob, offsets, None, labels, ignore_index, mean)
    return gpu.rewards_gradient(tokens, upstream, gradient.shape[1], gradient, inverse)


@token_listwise_gradient.register_fake
def _fake_listwise_gradient(
    upstream: Tensor, gradient: Tensor, inverse: Tensor, logprob: Tensor, *_: Any
) -> Tensor:
    return torch.empty_like(logprob, memory_format=torch.contiguous_format)


def _save_listwise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gradient, inverse = output
    ctx.mark_non_differentiable(gradient, inverse)
    ctx.save_for_backward(gradient, inverse, inputs[0], inputs[2], inputs[3])
    ctx.ignore_index, ctx.mean = inputs[8:10]


def _listwise_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    found = token_listwise_gradient(upstream, *ctx.saved_tensors, ctx.ignore_index, ctx.mean)
    return found, *([None] * 10)


token_listwise.register_autograd(_listwise_backward, setup_context=_save_listwise)
