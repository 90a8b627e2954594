"""The implementations that are compared: how each is built and how one step of it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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


def call_ours(op: str, plan: Any, x: Inputs) -> Tensor:
    """The public function of an operation on the tensors of a case; ``plan`` as it takes it."""
    import pad_kernels as pk

    settings: dict[str, Any] = {"ignore_index": IGNORE, "plan": plan}
    if op == "cross_entropy":
        return pk.linear_cross_entropy(x.hidden, x.weight, x.labels, **settings)
    if op in ("logprob", "score"):
        return pk.linear_logprob(x.hidden, x.weight, x.labels, **settings)
    student, heads = pk.Head(x.hidden, x.weight), [pk.Head(h, w) for h, w in x.teachers]
    if op == "advantage":
        return pk.linear_expected_advantage(student, *heads, labels=x.labels, **settings)
    if op != "distill":
        return pk.linear_divergence(student, heads[0], kind=op, labels=x.labels, **settings)
    settings |= {"teacher": heads[0], "ce_weight": 1.0, "divergence_weight": 1.0}
    out = pk.linear_distill(student, x.labels, **settings)
    assert out.loss is not None
    return out.loss


@dataclass(frozen=True)
class Ours:
    """This library on one plan: "auto" or "schedule:backend", and MiB of workspace if limited."""

    plan: str
    limit: int | None = None

    @property
    def name(self) -> str:
        """In tables."""
        limit = "" if self.limit is None else f" in {self.limit} MiB"
        return f"pad_kernels {self.plan}{limit}"

    def build(self, case: Case) -> Function:
        """The function for a case, or ``Unavailable``."""
        import pad_kernels as pk

        if self.plan == "auto":
            request = pk.PlanRequest()
        else:
            schedule, backend = self.plan.split(":")
            _named(backend)
            request = pk.PlanRequest(schedule, backend)
        if self.limit is not None:
            request = replace(request, budget=self.limit << 20)
        return lambda x: call_ours(case.op, request, x)


#: What is measured on a CPU, by operation.
CPU_PLANS = {
    "cross_entropy": [Ours("early:cpp"), Ours("early:torch_blocked"), Ours("late:cpp")],
    "logprob": [Ours("kept:cpp"), Ours("late:cpp"), Ours("late:torch_blocked")],
    "score": [Ours("late:cpp")],
    "forward_kl": [Ours("early:cpp"), Ours("early:torch_blocked"), Ours("late:cpp")],
    "jsd": [Ours("early:cpp"), Ours("late:cpp")],
    "advantage": [Ours("early:cpp"), Ours("late:cpp")],
    "distill": [Ours("early:cpp"), Ours("late:cpp")],
}
_AUTO, _EARLY = Ours("auto"), [Ours("early:triton"), Ours("early:cuda")]
_AGAINST_TEACHERS = [_AUTO, *_EARLY, Ours("late:triton")]
#: On a GPU. The limits are those under which the library promises its speed there.
GPU_PLANS = {
    "cross_entropy": [
        _AUTO,
        Ours("early:triton", 1024),
        Ours("early:cuda", 1024),
        *_EARLY,
        Ours("early:torch_blocked"),
        Ours("late:triton"),
    ],
    "logprob": [
        _AUTO,
        Ours("late:triton"),
        Ours("late:cuda"),
        Ours("kept:triton"),
        Ours("late:torch_blocked"),
    ],
    "score": [_AUTO, Ours("late:triton", 64), Ours("late:cuda", 64), Ours("late:triton")],
    "forward_kl": _AGAINST_TEACHERS,
    "jsd": _AGAINST_TEACHERS,
    "advantage": _AGAINST_TEACHERS,
    "distill": _AGAINST_TEACHERS,
}


def ours(device: str = "cpu") -> list[Implementation]:
    """This library, by schedule and backend; "late" computes all logits twice."""
    found = []
    for name, plans in (GPU_PLANS if device == "cuda" else CPU_PLANS).items():
        op = OPS[name]
        for own in plans:
            again = 2 * (1 + op.teachers) if op.backward and own.plan.startswith("late") else 0
            gemms = op.gemms + again
            found.append(Implementation(own.name, name, own.build, ours=True, gemms=gemms))
    return found


def all_implementations(device: str = "cpu") -> list[Implementation]:
    """Ours first, then the peers, as they are set up for a type of device."""
    from pad_kernels.bench.peers import peers
    from pad_kernels.bench.teacher_peers import peers as teacher_peers

    return ours(device) + peers(device) + teacher_peers()
