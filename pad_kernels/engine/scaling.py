"""Ops that multiply gradients which were made early by the upstream gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels.engine.feed import pieces


@torch.library.custom_op("pad_kernels::scale_gradients_", mutates_args={"hidden", "weight", "bias"})
def scale_gradients_(
    hidden: Tensor, weight: Tensor, bias: Tensor, factors: Tensor, scale: Tensor
) -> None:
    """Multiply early gradients by the upstream gradient, in place.

    Not at all if that is 1; on a GPU nobody waits to find out.
    """
    products = factors * scale
    numbers = products.unbind() if scale.is_cuda else products.tolist()
    for gradient, product in zip((hidden, weight, bias), numbers, strict=True):
        if gradient.numel() and (scale.is_cuda or product != 1.0):
            _scale_exactly(gradient, product)


def _scale_exactly(gradient: Tensor, product: float | Tensor) -> None:
    """One rounding: a float16 factor of its own could overflow where the product does not."""
    if gradient.dtype != torch.float16:
        gradient.mul_(product)
        return
    for start, stop in pieces(gradient):
        block = gradient[start:stop]
        block.copy_(block.float() * product)


@scale_gradients_.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, factors: Tensor, scale: Tensor) -> None:
    return None


@torch.library.custom_op("pad_kernels::scaled_gradients", mutates_args=())
def scaled_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, factors: Tensor, scale: Tensor, anchor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``scale_gradients_``, on copies: for graphs that are traced, and for ``create_graph``.

    ``anchor`` is an input of the forward: the result depends on it in a way nobody can
    differentiate, so that a second derivative raises and does not take it for a constant.
    """
    copies = hidden.clone(), weight.clone(), bias.clone()
    scale_gradients_(*copies, factors, scale)
    return copies


@scaled_gradients.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor, factors: Tensor, scale: Tensor, anchor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(bias)
