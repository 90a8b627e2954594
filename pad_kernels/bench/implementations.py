"""The implementations that are compared: how each is built and how one step of it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.bench.cases import IGNORE, OPS, Case, Inputs

Function = Callable[[Inputs], Tensor]


class Unavailable(Exception):
    """An implementation cannot run here; the message says why and goes into the table."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: shown in tables, filtered by ``--impl``.
        op: name of the operation it computes.
        build: makes the function for a case, or raises ``Unavailable``.
        ours: whether it is this library's.
        compiled: compiles at its first call, which memory measurements must not count.
        gemms: the least matrix-product work of its schedule, in units of N·H·V flops.
        largest: N·H·V above which it takes minutes and is skipped unless asked for.
        note: what a reader has to know about how it was set up.
    """

    name: str
    op: str
    build: Callable[[Case], Function]
    ours: bool = False
    compiled: bool = False
    gemms: int = 6
    largest: float = math.inf
    note: str = ""


def step(function: Function, case: Case, inputs: Inputs) -> Tensor:
    """Run one step, with the backward pass where the operation has one; returns the value."""
    if not OPS[case.op].backward:
        with torch.no_grad():
            return function(inputs)
    value = function(inputs)
    value.backward(inputs.upstream.to(value.dtype))
    return value.detach()


def _named(backend: str) -> None:
    """Raise ``Unavailable`` with the library's own reason when a backend is missing."""
    import pad_kernels as pk

    state = pk.available_backends().get(backend, "no such backend")
    if state != "available":
        raise Unavailable(state)


def _cross_entropy(plan: str) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        import pad_kernels as pk

        _named(plan.split(":")[1])
        return lambda x: pk.linear_cross_entropy(
            x.hidden, x.weight, x.labels, ignore_index=IGNORE, plan=plan
        )

    return build


def _logprob(plan: str) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        import pad_kernels as pk

        _named(plan.split(":")[1])
        return lambda x: pk.linear_logprob(
            x.hidden, x.weight, x.labels, ignore_index=IGNORE, plan=plan
        )

    return build


def ours() -> list[Implementation]:
    """This library, by schedule and backend."""
    table = [
        ("cross_entropy", "early:cpp", _cross_entropy, 6),
        ("cross_entropy", "early:torch_blocked", _cross_entropy, 6),
        ("cross_entropy", "late:cpp", _cross_entropy, 8),
        ("logprob", "kept:cpp", _logprob, 6),
        ("logprob", "late:cpp", _logprob, 8),
        ("logprob", "late:torch_blocked", _logprob, 8),
        ("score", "late:cpp", _logprob, 2),
    ]
    return [
        Implementation(f"pad_kernels {plan}", op, make(plan), ours=True, gemms=gemms)
        for op, plan, make, gemms in table
    ]


def all_implementations() -> list[Implementation]:
    """Ours first, then the peers."""
    from pad_kernels.bench.peers import peers

    return ours() + peers()
