"""Differentiation that the library's ops do not have raises before it can be silently wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def reject_transforms(op: str, *tensors: Tensor) -> None:
    """Raise if a tensor carries a ``torch.func`` transform or a forward-mode tangent.

    An op without a formula for them would drop the tangent, or be looped over by ``vmap``.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(
                f"{op}: torch.func transforms (grad, vmap, jvp, ...) are not supported; "
                "use reverse mode, tensor.backward() or torch.autograd.grad"
            )
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{op}: forward-mode differentiation is not supported")
