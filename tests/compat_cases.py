"""What the tests of the adapters share: an adapter against a dense computation, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracles import GRADIENTS, ORACLE, Dense, assert_accurate, dense
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Relative tolerance of a value against float64 arithmetic on the same inputs.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}

#: (loss, what comes beside it) from a dense computation and its leaves by name.
Dense2 = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def assert_near(found: Tensor, reference: Tensor, dtype: torch.dtype, what: str) -> None:
    """Equal to within the rounding that inputs of ``dtype`` allow."""
    tolerance = TOLERANCE[dtype]
    scale = max(1.0, float(reference.detach().abs().max())) if reference.numel() else 1.0
    assert found.shape == reference.shape, f"{what}: shape {found.shape}, not {reference.shape}"
    torch.testing.assert_close(
        found.detach().double(),
        reference.detach().double(),
        rtol=tolerance,
        atol=tolerance * scale,
        msg=lambda text: f"{what}: {text}",
    )


def check(ours: Callable[..., Any], formula: Dense2, **tensors: Tensor | None) -> None:
    """Loss, what comes beside it and the gradients of every tensor, against the formula.

    ``ours`` gets leaves by name and returns the loss, or a tuple of it and a tuple of the rest;
    ``formula`` gets a ``Dense`` and the same leaves in its dtype.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    missing = {name: None for name in tensors if name not in given}
    dtype = next(iter(given.values())).dtype

    def run(call: Callable[..., Any], leaves: dict[str, Tensor]) -> list[Tensor]:
        out = call(**leaves, **missing)
        loss, rest = out if isinstance(out, tuple) else (out, ())
        assert not any(x.requires_grad for x in rest) or call is not ours
        upstream = torch.linspace(0.3, 1.7, loss.numel()).reshape(loss.shape).to(loss)
        gradients = torch.autograd.grad((loss * upstream).sum(), list(leaves.values()))
        return [loss.detach(), *gradients, *rest]

    found = run(ours, {name: x.detach().clone().requires_grad_() for name, x in given.items()})
    results = []
    for how in (ORACLE, dense(dtype)):

        def call(how: Dense = how, **leaves: Any) -> Any:
            return formula(how, **leaves)

        results.append(run(call, {name: how.leaf(x) for name, x in given.items()}))
    oracle, careful = results
    assert len(found) == len(oracle)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(found[0], oracle[0], dtype, "loss")
    for i, name in enumerate(given, start=1):
        assert found[i].dtype == dtype
        what = f"gradient of {name}"
        assert_accurate(found[i], oracle[i], careful[i], k=GRADIENTS, dtype=dtype, what=what)
    for i in range(1 + len(given), len(found)):
        assert_near(found[i], oracle[i], dtype, f"output {i - len(given)} beside the loss")


class Fresh(TorchDispatchMode):
    """Records the largest tensor that an operation makes, views of its arguments left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.numel())
        return found
