"""Argument checks. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Of token ids, and of boundaries between sequences of them.
IDS = (torch.int64, torch.int32)


def fail_value(name: str, expected: str, got: object) -> NoReturn:
    """Raise a ValueError that names the argument, what was expected and what came."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def fail_type(name: str, expected: str, got: object) -> NoReturn:
    """Raise a TypeError that names the argument, what was expected and the type that came."""
    kind = got if isinstance(got, str | torch.dtype) else type(got).__name__
    raise TypeError(f"{name}: expected {expected}, got {kind}")


def _plain(value: Tensor) -> bool:
    """Whether it is a Tensor or a Parameter, or stands for one while torch traces."""
    kind = type(value)
    traced = kind.__module__.startswith("torch._subclasses.")
    return kind is Tensor or issubclass(kind, Parameter) or traced


def check_tensor(
    name: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    ndim: int | None = None,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Check that ``value`` is a plain dense tensor of the given dtypes, rank, shape and device."""
    if not isinstance(value, Tensor):
        fail_type(name, "a torch.Tensor", value)
    if not _plain(value):
        fail_type(
            name,
            "a plain tensor (gather a DTensor with .full_tensor(), dequantise a quantised tensor, "
            "take another subclass with .as_subclass(torch.Tensor))",
            value,
        )
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        fail_type(name, "a dense strided tensor", f"{kind}, dtype {value.dtype}")
    if dtypes is not None and value.dtype not in dtypes:
        fail_type(name, "dtype " + " or ".join(str(d) for d in dtypes), value.dtype)
    if ndim is not None and value.dim() != ndim:
        fail_value(name, f"{ndim} dimension(s)", f"shape {tuple(value.shape)}")
    if shape is not None and tuple(value.shape) != tuple(shape):
        fail_value(name, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        fail_value(name, f"a tensor on {device}", f"one on {value.device}")
    return value


def check_constant(name: str, value: Tensor) -> None:
    """Check that nobody waits for a gradient that the tensor would not get."""
    if value.requires_grad and torch.is_grad_enabled():
        expected = "a tensor that does not require grad (detach it: it gets no gradient)"
        fail_value(name, expected, "one that does")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Check that ``value`` is a finite real number (no bool) within the bounds; return a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail_type(name, "a number", value)
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    if not math.isfinite(number):
        fail_value(name, "a finite number", value)
    bounds = (
        (above, lambda b: number > b, ">"),
        (at_least, lambda b: number >= b, ">="),
        (below, lambda b: number < b, "<"),
        (at_most, lambda b: number <= b, "<="),
    )
    wanted = [f"{sign} {bound:g}" for bound, _, sign in bounds if bound is not None]
    if any(bound is not None and not holds(bound) for bound, holds, _ in bounds):
        fail_value(name, "a number " + " and ".join(wanted), value)
    return number


def check_integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """Check that ``value`` is an integer (no bool) of 64 bits, at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        fail_type(name, "an integer", value)
    if at_least is not None and value < at_least:
        fail_value(name, f"an integer >= {at_least}", value)
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        fail_value(name, "an integer of 64 bits", value)
    return number


def check_flag(name: str, value: Any) -> bool:
    """Check that ``value`` is a bool."""
    if not isinstance(value, bool):
        fail_type(name, "a bool", value)
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Check that ``value`` is one of the named choices."""
    if not isinstance(value, str):
        fail_type(name, "a string, one of " + ", ".join(choices), value)
    if value not in choices:
        fail_value(name, "one of " + ", ".join(choices), repr(value))
    return value


def check_reduction(value: Any) -> str:
    """Check what losses call ``reduction``."""
    return check_choice("reduction", value, ("mean", "sum", "none"))
