"""The implementations that are compared: how each is built and how one step of it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        gemms: the least matrix-product work of its schedule, in units of N·H·V flops, where that
            is more than the operation's.
        largest: N·H·V above which it takes minutes and is skipped unless asked for.
        note: what a reader has to know about how it was set up.
    """

    name: str
    op: str
    build: Callable[[Case], Function]
    ours: bool = False
    compiled: bool = False
    gemms: int = 0
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


def _teacher_op(plan: str) -> Callable[[Case], Function]:
    """Forward KL, JSD, advantage or cross-entropy + forward KL, by the operation of the case."""

    def build(case: Case) -> Function:
        import pad_kernels as pk

        _named(plan.split(":")[1])

        def function(x: Inputs) -> Tensor:
            settings: dict[str, Any] = {"ignore_index": IGNORE, "plan": plan}
            student, heads = pk.Head(x.hidden, x.weight), [pk.Head(h, w) for h, w in x.teachers]
            if case.op == "advantage":
                return pk.linear_expected_advantage(student, *heads, labels=x.labels, **settings)
            if case.op != "distill":
                return pk.linear_divergence(
                    student, heads[0], kind=case.op, labels=x.labels, **settings
                )
            settings |= {"teacher": heads[0], "ce_weight": 1.0, "divergence_weight": 1.0}
            out = pk.linear_distill(student, x.labels, **settings)
            assert out.loss is not None
            return out.loss

        return function

    return build


def ours() -> list[Implementation]:
    """This library, by schedule and backend; "late" computes all logits twice."""
    table = [
        ("cross_entropy", "early:cpp", _cross_entropy),
        ("cross_entropy", "early:torch_blocked", _cross_entropy),
        ("cross_entropy", "late:cpp", _cross_entropy),
        ("logprob", "kept:cpp", _logprob),
        ("logprob", "late:cpp", _logprob),
        ("logprob", "late:torch_blocked", _logprob),
        ("score", "late:cpp", _logprob),
        ("forward_kl", "early:cpp", _teacher_op),
        ("forward_kl", "early:torch_blocked", _teacher_op),
        ("forward_kl", "late:cpp", _teacher_op),
        ("jsd", "early:cpp", _teacher_op),
        ("jsd", "late:cpp", _teacher_op),
        ("advantage", "early:cpp", _teacher_op),
        ("advantage", "late:cpp", _teacher_op),
        ("distill", "early:cpp", _teacher_op),
        ("distill", "late:cpp", _teacher_op),
    ]
    found = []
    for name, plan, make in table:
        op = OPS[name]
        again = 2 * (1 + op.teachers) if op.backward and plan.startswith("late") else 0
        gemms = op.gemms + again
        found.append(
            Implementation(f"pad_kernels {plan}", name, make(plan), ours=True, gemms=gemms)
        )
    return found


def all_implementations() -> list[Implementation]:
    """Ours first, then the peers."""
    from pad_kernels.bench.peers import peers
    from pad_kernels.bench.teacher_peers import peers as teacher_peers

    return ours() + peers() + teacher_peers()
