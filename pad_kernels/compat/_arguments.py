"""Checks that name arguments as the adapted function does, where ours has another name for them."""

from __future__ import annotations

from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    IDS,
    check_flag,
    check_integer,
    check_tensor,
    fail_type,
    fail_value,
)
from pad_kernels.engine.call import autocast_dtype


def check_head(*, ndim: int | None = None, **tensors: Tensor | None) -> None:
    """Check an LM head given as hidden states, weight and (if not None) bias, in that order.

    Args:
        ndim: number of dimensions of the hidden states; default any but 0.
        tensors: the three under the caller's names for them.
    """
    (hidden_name, hidden), (weight_name, weight), (bias_name, bias) = tensors.items()
    hidden = check_tensor(hidden_name, hidden, dtypes=FLOATS, ndim=ndim)
    if hidden.dim() == 0:
        fail_value(hidden_name, "shape [..., H]", "shape ()")
    weight = check_tensor(weight_name, weight, dtypes=FLOATS, ndim=2, device=hidden.device)
    if weight.shape[1] != hidden.shape[-1]:
        expected = f"shape [V, {hidden.shape[-1]}] to match {hidden_name}'s last dimension"
        fail_value(weight_name, expected, f"shape {tuple(weight.shape)}")
    if bias is not None:
        shape = (weight.shape[0],)
        check_tensor(bias_name, bias, dtypes=FLOATS, shape=shape, device=hidden.device)
    mixed = autocast_dtype(hidden.device) is not None
    for name, x in ((weight_name, weight), (bias_name, bias)):
        if x is not None and x.dtype != hidden.dtype and not mixed:
            fail_type(name, f"{hidden_name}'s dtype {hidden.dtype}", x.dtype)


def check_labels(name: str, labels: Tensor, hidden: Tensor) -> None:
    """Check labels that are to have the leading shape of ``hidden``."""
    check_tensor(name, labels, dtypes=IDS, shape=hidden.shape[:-1], device=hidden.device)


def check_shift(shift: bool | int, labels: Tensor) -> int:
    """Number of positions by which labels are ahead of the hidden states that predict them."""
    # Named bool or int in the signature: True is a shift by one.
    steps = int(shift) if isinstance(shift, bool) else check_integer("shift", shift, at_least=0)
    length = labels.shape[-1] if labels.dim() else 0
    if steps and steps >= length:
        fail_value("shift", f"a number of positions in [0, {length})", shift)
    return steps


def check_schedule(compiled: bool, chunk_size: int) -> None:
    """Check hints about another library's schedule; ours is planned, they change nothing."""
    check_flag("compiled", compiled)
    check_integer("chunk_size", chunk_size, at_least=1)


def detached(x: Tensor | None) -> Tensor | None:
    """The same tensor without gradient (no copy): a teacher's or a reference model's."""
    return None if x is None else x.detach()
