"""Functionals through the engine: examples and mixtures, inputs, and checks by the rule."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracles import FORMULAS, GRADIENTS, ORACLE, VALUES, Dense, assert_accurate, dense
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine.call import Call
from pad_kernels.functionals import (
    Advantage,
    Divergence,
    Entropy,
    ForwardKL,
    Functional,
    LogitSum,
    LogProb,
    LogSumExp,
    ReverseKL,
    SquaredLogSumExp,
    TopKAdvantage,
    TopKDivergence,
)
from pad_kernels.functionals.divergence import KINDS, ONE_SWEEP

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 17, 333, 24, 31

#: One example of each functional at least; the registry decides whether that is all of them.
EXAMPLES: list[Functional] = [
    LogProb(),
    LogProb("candidates"),
    Entropy(),
    LogSumExp(),
    SquaredLogSumExp(),
    LogitSum(),
    ForwardKL(),
    ReverseKL(2),
    *(Divergence(kind, alpha) for kind in KINDS if kind not in ONE_SWEEP for alpha in (0.5, 0.1)),
    Advantage(),
    Advantage(2, 1),
    *(TopKDivergence(kind, 0.3) for kind in KINDS),
    TopKAdvantage(),
]

#: Label smoothing (a global V, the chain factor of a soft cap), and one of everything.
SMOOTHING = (LogSumExp(), LogitSum(), LogProb())
MIXTURES = {
    "smoothing": SMOOTHING,
    "one_stream": (*SMOOTHING, Entropy(), SquaredLogSumExp(), LogProb("candidates")),
    "distill": (LogProb(), Entropy(), ForwardKL(), Advantage(1, 2), TopKAdvantage()),
    "two_sweeps": (LogProb(), Divergence("skew_reverse_kl", 0.2), ReverseKL(2), TopKDivergence()),
    "everything": tuple(EXAMPLES),
}


def silenced(inputs: dict[str, Tensor], ignored: Tensor) -> dict[str, Tensor]:
    """Harmless numbers in ignored rows: what is infinite there would make NaN of its gradient."""
    fill = {"teacher_logprobs": -5.0}
    return {n: x.masked_fill(ignored[:, None], fill.get(n, 0)) for n, x in inputs.items()}


@dataclass(frozen=True)
class Setup:
    """A student, a teacher and per-row inputs; a few rows are ignored."""

    student: pk.Head
    teachers: tuple[pk.Head, pk.Head]
    inputs: dict[str, Tensor]

    def call(self, functionals: Sequence[Functional], plan: Any) -> tuple[list[Tensor], Call]:
        """Fresh leaves (hidden, weight, bias) and the call that uses them."""
        s = self.student
        leaves = [x.detach().clone().requires_grad_() for x in (s.hidden, s.weight, s.bias)]
        student = replace(s, hidden=leaves[0], weight=leaves[1], bias=leaves[2])
        return leaves, self.of(student, functionals, plan)

    def of(self, student: pk.Head, functionals: Sequence[Functional], plan: Any) -> Call:
        """The call for a student, with as many teachers as the functionals read."""
        count = max((j for f in functionals for j in f.teachers), default=0)
        names = ("", "teacher.", "reference.")[: count + 1]
        return Call(student, self.teachers[:count], dict(self.inputs), -100, plan, names)

    def compute(self, how: Dense, functionals: Sequence[Functional], grad: Tensor) -> list[Tensor]:
        """[values, gradients...] of a dense computation."""
        s = self.student
        leaves = [how.leaf(x) for x in (s.hidden, s.weight, s.bias)]
        z = [how.logits(*leaves, s.softcap, s.logit_scale, s.temperature, s.vocab_size)]
        for t in self.teachers:
            tensors = [how.leaf(x, grad=False) for x in (t.hidden, t.weight, t.bias)]
            z.append(how.logits(*tensors, t.softcap, t.logit_scale, t.temperature, t.vocab_size))
        ignored = self.inputs["labels"][:, 0] == -100
        inputs = silenced(self.inputs, ignored)
        values = torch.cat([FORMULAS[type(f).__name__](f, z, inputs) for f in functionals])
        values = torch.where(ignored, 0.0, values)
        return [values.detach(), *torch.autograd.grad(values, leaves, grad.to(values.dtype))]


def refused(functionals: Sequence[Functional], plan: Any) -> bool:
    """Whether the named backend cannot do this, in which case it must say so."""
    if not isinstance(plan, pk.PlanRequest) or plan.backend != "cpp":
        return False
    if pk.available_backends()["cpp"] != "available":
        pytest.skip("the extension is not built")
    if len({s for f in functionals for s in f.statistics if s.sweep == 2}) <= 1:
        return False
    late = replace(plan, schedule="late", kept_rows=None)
    with pytest.raises(ValueError, match=r"plan: .* got 'cpp', which cannot"):
        setup(torch.float32).call(functionals, late)[1].tokens(functionals)
    return True


@functools.cache
def setup(dtype: torch.dtype, softcap: float | None = 5.0, alike: bool = False) -> Setup:
    """Inputs in ``dtype``; with ``alike`` the teacher is the student."""
    torch.manual_seed(11)

    def head(width: int, **options: Any) -> pk.Head:
        hidden = torch.randn(TOKENS, width, dtype=torch.float64) * 2
        weight = torch.randn(VOCAB + 9, width, dtype=torch.float64) / width**0.5
        bias = torch.randn(VOCAB + 9, dtype=torch.float64)
        return pk.Head(
            hidden.to(dtype), weight.to(dtype), bias.to(dtype), vocab_size=VOCAB, **options
        )

    student = head(HIDDEN, softcap=softcap, logit_scale=1.2, temperature=0.8)
    teacher = student if alike else head(TEACHER_HIDDEN, softcap=9.0, temperature=1.3)
    reference = student if alike else head(HIDDEN)
    labels = torch.randint(VOCAB, (TOKENS, 1))
    labels[::6] = -100
    ids = torch.stack([torch.randperm(VOCAB)[:7] for _ in range(TOKENS)])
    kept = (torch.randn(TOKENS, 7) * 2).log_softmax(-1) + torch.rand(TOKENS, 1).log()
    candidates = torch.randint(VOCAB, (TOKENS, 4))
    working = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "labels": labels,
        "candidates": candidates,
        "teacher_ids": ids,
        "teacher_logprobs": kept.to(working),
        "advantage_ids": ids.flip(1),
        "advantage_values": torch.randn(TOKENS, 7).to(working),
    }
    return Setup(student, (teacher, reference), inputs)


def _outputs(functionals: Sequence[Functional], inputs: dict[str, Tensor]) -> int:
    return sum(f.outputs(inputs) for f in functionals)


def upstream(outputs: int) -> Tensor:
    torch.manual_seed(outputs)
    return torch.randn(outputs, TOKENS, dtype=torch.float64)


@functools.cache
def _reference(
    functionals: tuple[Functional, ...], dtype: torch.dtype, softcap: float | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    case = setup(dtype, softcap)
    grad = upstream(_outputs(functionals, case.inputs))
    found = case.compute(ORACLE, functionals, grad)
    return grad, found, case.compute(dense(dtype), functionals, grad)


def _rule(ours: Tensor, oracle: Tensor, careful: Tensor, dtype: torch.dtype, k: int) -> None:
    if dtype == torch.float64:
        # Float64 cannot judge itself by the rule; a formula that is wrong is wrong by more.
        torch.testing.assert_close(ours, oracle, rtol=1e-11, atol=1e-12 * float(oracle.abs().max()))
    else:
        assert_accurate(ours, oracle, careful, k=k, dtype=dtype)


def check_tokens(
    functionals: tuple[Functional, ...], dtype: torch.dtype, plan: Any, softcap: float | None = 5.0
) -> None:
    if refused(functionals, plan):
        return
    case = setup(dtype, softcap)
    grad, oracle, careful = _reference(functionals, dtype, softcap)
    leaves, call = case.call(functionals, plan)
    values, _ = call.tokens(functionals)
    gradients = torch.autograd.grad((values * grad).sum(), leaves)
    _rule(values.detach(), oracle[0], careful[0], dtype, VALUES)
    for gradient, a, b in zip(gradients, oracle[1:], careful[1:], strict=True):
        _rule(gradient, a.to(gradient.dtype) if dtype == torch.float64 else a, b, dtype, GRADIENTS)


def check_total(
    functionals: tuple[Functional, ...], dtype: torch.dtype, plan: Any, softcap: float | None = 5.0
) -> None:
    if refused(functionals, plan):
        return
    case = setup(dtype, softcap)
    grad, oracle, careful = _reference(functionals, dtype, softcap)
    leaves, call = case.call(functionals, plan)
    total, summands = call.total(functionals, grad.to(call.accumulate))
    assert not summands.requires_grad and float(summands.sum()) == float(total.detach())
    gradients = torch.autograd.grad(total, leaves)
    # A sum of N numbers of both signs is off by eps times the sum of their sizes.
    terms, errors = oracle[0] * grad, (careful[0] - oracle[0]) * grad
    eps = 1e-12 if dtype == torch.float64 else torch.finfo(torch.float32).eps
    floor = eps * float(terms.abs().sum())
    assert abs(float(total.detach()) - float(terms.sum())) <= VALUES * max(
        float(errors.norm()), floor
    )
    for gradient, a, b in zip(gradients, oracle[1:], careful[1:], strict=True):
        _rule(gradient, a.to(gradient.dtype) if dtype == torch.float64 else a, b, dtype, GRADIENTS)
