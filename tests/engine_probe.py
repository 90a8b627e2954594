"""The engine's op bodies called as plain functions, so that dispatch modes see what happens inside.

A dispatch mode sees an op as one call. ``Probe`` replaces the forward ops that the public functions
call by their bodies, remembers what they were called with, and runs the backward's body on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pad_kernels as pk
from pad_kernels.engine import ops, problem

aten = torch.ops.aten
_PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2)}
_COPIES = (aten.index_select.default, aten._to_copy.default)


def body(op: Any) -> Callable[..., Any]:
    """The Python function that a ``torch.library.custom_op`` wraps."""
    return op._init_fn


class Watch(TorchDispatchMode):
    """Records the size of every tensor that an operation returns, and of every matrix product.

    Also the largest of what is gathered or cast into memory of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.copied = 0
        self.products: list[tuple[int, int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                if func in _COPIES:
                    self.copied = max(self.copied, x.numel())
        if func.overloadpacket in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[func.overloadpacket])
            rows, inner = left.shape[-2:]
            self.products.append((rows, inner, right.shape[-1]))
        return found

    @property
    def flops(self) -> int:
        """Of all matrix products."""
        return sum(2 * a * b * c for a, b, c in self.products)


@dataclass
class Probe:
    """What the public function called last."""

    plans: list[pk.Plan] = field(default_factory=list)
    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()

    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch) -> Probe:
        """Unwrap the forward ops, and remember every plan that is made."""
        probe = Probe()
        make_plan = problem.make_plan

        def remember(*args: Any) -> pk.Plan:
            probe.plans.append(make_plan(*args))
            return probe.plans[-1]

        monkeypatch.setattr(problem, "make_plan", remember)
        for name in ("token_outputs", "weighted_sum"):
            monkeypatch.setattr(ops, name, probe._unwrapped(name, body(getattr(ops, name))))
        return probe

    def _unwrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with torch.no_grad():
                self.outputs = function(*args)
            self.name, names = name, inspect.signature(function).parameters
            self.arguments = dict(zip(names, args, strict=True))
            return self.outputs

        return call

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Run the body of the backward: gradients of hidden, weight and bias."""
        given = self.arguments
        with torch.no_grad():
            if self.name == "weighted_sum" and self.outputs[5].numel():
                body(ops.scale_gradients_)(*self.outputs[2:6], grad)
                return self.outputs[2:5]
            stats, kept = self.outputs[-2:]
            return body(ops.token_outputs_backward)(
                grad,
                given.get("coefficients"),
                *(given[n] for n in ("hidden", "weight", "bias", "row_inputs", "teachers")),
                stats,
                kept,
                given["recipe"],
            )
