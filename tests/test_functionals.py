"""Every functional of the registry, through the engine: values, gradients, mixtures, sweeps."""

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
from pad_kernels.backends.reference import ORACLES
from pad_kernels.engine.call import Call
from pad_kernels.functionals import (
    REGISTRY,
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
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import KINDS, ONE_SWEEP
from pad_kernels.functionals.statistics import RowStats

pytestmark = pytest.mark.usefixtures("poisoned")

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
every_functional = pytest.mark.parametrize("functional", EXAMPLES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

ROUTES = [
    pk.PlanRequest(schedule, backend, token_block=5, vocab_block=71, kept_rows=kept)
    for backend in ("torch_blocked", "cpp")
    for schedule, kept in (("early", None), ("late", None), ("kept", TOKENS), ("kept", 6))
]
ROUTES += [pk.PlanRequest(None, "torch_blocked"), pk.PlanRequest(None, "reference")]


def _name(plan: pk.PlanRequest) -> str:
    return f"{plan.backend}-{plan.schedule}{plan.kept_rows or ''}"


every_route = pytest.mark.parametrize("plan", ROUTES, ids=_name)


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


def _refused(functionals: Sequence[Functional], plan: Any) -> bool:
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


def _upstream(outputs: int) -> Tensor:
    torch.manual_seed(outputs)
    return torch.randn(outputs, TOKENS, dtype=torch.float64)


@functools.cache
def _reference(
    functionals: tuple[Functional, ...], dtype: torch.dtype, softcap: float | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    case = setup(dtype, softcap)
    grad = _upstream(_outputs(functionals, case.inputs))
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
    if _refused(functionals, plan):
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
    if _refused(functionals, plan):
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


def test_every_functional_has_an_oracle_and_an_example() -> None:
    assert set(ORACLES) == set(REGISTRY) == set(FORMULAS)
    assert {type(f).__name__ for f in EXAMPLES} == set(REGISTRY)


@pytest.mark.parametrize("functional", [f for f in EXAMPLES if not f.looks_back], ids=str)
def test_coefficients_that_need_no_statistics(functional: Functional) -> None:
    inputs = {name: torch.zeros(3, 1, dtype=torch.long) for name in ("labels", "candidates")}
    nothing = RowStats({}, inputs)  # reading a statistic is a KeyError
    assert functional.gradient(torch.ones(1, 3), nothing) != LogitGradient()


#: Two threads spend their time on waking each other; test_distill.py runs mixtures on both.
alone = pytest.mark.usefixtures("one_thread")


def turns(odd: bool) -> pytest.MarkDecorator:
    """Every other of the product of functionals, dtypes and routes, and of the early ones all."""
    found = [
        pytest.param(functional, dtype, plan, id=f"{functional}-{str(dtype)[6:]}-{_name(plan)}")
        for i, functional in enumerate(EXAMPLES)
        for j, dtype in enumerate(DTYPES)
        for k, plan in enumerate(ROUTES)
        if (odd if plan.schedule == "early" else (i + j + k) % 2 == odd)
    ]
    return pytest.mark.parametrize(("functional", "dtype", "plan"), found)


@alone
@turns(odd=False)
def test_tokens(functional: Functional, dtype: torch.dtype, plan: pk.PlanRequest) -> None:
    check_tokens((functional,), dtype, plan)


@alone
@turns(odd=True)
def test_total(functional: Functional, dtype: torch.dtype, plan: pk.PlanRequest) -> None:
    check_total((functional,), dtype, plan)


#: Label smoothing (a global V, the chain factor of a soft cap), and one of everything.
SMOOTHING = (LogSumExp(), LogitSum(), LogProb())
MIXTURES = {
    "smoothing": SMOOTHING,
    "one_stream": (*SMOOTHING, Entropy(), SquaredLogSumExp(), LogProb("candidates")),
    "distill": (LogProb(), Entropy(), ForwardKL(), Advantage(1, 2), TopKAdvantage()),
    "two_sweeps": (LogProb(), Divergence("skew_reverse_kl", 0.2), ReverseKL(2), TopKDivergence()),
    "everything": tuple(EXAMPLES),
}


@alone
@pytest.mark.parametrize("mixture", MIXTURES)
@every_dtype
@every_route
def test_mixture(mixture: str, dtype: torch.dtype, plan: pk.PlanRequest) -> None:
    """Several functionals in one pass are the same as each by itself, whatever the soft cap."""
    functionals = MIXTURES[mixture]
    for softcap in (5.0, None):
        if plan.schedule != "early":
            check_tokens(functionals, dtype, plan, softcap)
        check_total(functionals, dtype, plan, softcap)


@alone
@every_functional
@pytest.mark.parametrize("backend", ["torch_blocked", "cpp"])
def test_gradcheck(functional: Functional, backend: str) -> None:
    """Late and kept take turns; that they agree is what the product above is about."""
    plan = f"{('late', 'kept')[EXAMPLES.index(functional) % 2]}:{backend}"
    if _refused([functional], pk.PlanRequest(*plan.split(":"))):
        return
    case = _small()

    def values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = replace(case.student, hidden=hidden, weight=weight, bias=bias)
        return case.of(student, [functional], plan).tokens([functional])[0]

    s = case.student
    leaves = [x.detach().clone().requires_grad_() for x in (s.hidden, s.weight, s.bias)]
    assert torch.autograd.gradcheck(values, leaves, fast_mode=False)


@functools.cache
def _small() -> Setup:
    torch.manual_seed(3)
    double = torch.float64

    def head(width: int) -> pk.Head:
        return pk.Head(
            torch.randn(3, width, dtype=double),
            torch.randn(11, width, dtype=double),
            torch.randn(11, dtype=double),
            softcap=3.0,
            logit_scale=-0.7,
            temperature=0.9,
            vocab_size=9,
        )

    labels = torch.tensor([[4], [-100], [8]])
    inputs = {
        "labels": labels,
        "candidates": torch.tensor([[1, 1], [0, 3], [5, 8]]),
        "teacher_ids": torch.tensor([[0, 5], [1, 2], [8, 3]]),
        "teacher_logprobs": torch.tensor([[0.5, 0.2], [0.1, 0.1], [0.6, 0.3]], dtype=double).log(),
        "advantage_ids": torch.tensor([[0, 5], [1, 2], [8, 3]]),
        "advantage_values": torch.randn(3, 2, dtype=double),
    }
    return Setup(head(4), (head(5), head(3)), inputs)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("schedule", ["early", "late"])
@pytest.mark.parametrize("backend", ["torch_blocked", "cpp"])
def test_in_the_order_of_the_filter(mixture: str, schedule: str, backend: str) -> None:
    """A filter that leaves nothing out: the vocabulary is in order, and nothing else changes."""
    plan = pk.PlanRequest(schedule, backend, filter=1e-30, token_block=5, vocab_block=71)
    check_total(MIXTURES[mixture], torch.float32, plan)


ALIKE = [ForwardKL(), ReverseKL(), *(f for f in EXAMPLES if isinstance(f, Divergence))]


@pytest.mark.parametrize("functional", ALIKE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch_blocked", "cpp"])
def test_a_student_that_is_its_teacher_has_no_divergence(
    functional: Functional, dtype: torch.dtype, backend: str
) -> None:
    case = setup(dtype, alike=True)
    if _refused([functional], pk.PlanRequest("late", backend)):
        return
    for schedule in ("late", "kept"):
        leaves, call = case.call([functional], f"{schedule}:{backend}")
        values, _ = call.tokens([functional])
        assert float(values.detach().abs().max()) < 1e-6 and float(values.detach().min()) >= -1e-7
        for gradient in torch.autograd.grad(values.sum(), leaves):
            assert float(gradient.abs().max()) < 1e-5


def test_a_student_that_is_its_offline_teacher() -> None:
    case = setup(torch.float32)
    s = case.student
    z = ORACLE.logits(
        *[ORACLE.leaf(x, False) for x in (s.hidden, s.weight, s.bias)],
        *(s.softcap, s.logit_scale, s.temperature, s.vocab_size),
    )
    for seed in range(20):
        torch.manual_seed(seed)
        ids = torch.rand(TOKENS, VOCAB).argsort(-1)[:, : 1 + 3 * seed]
        logprobs = z.log_softmax(-1).gather(1, ids).float()
        alike = {**case.inputs, "teacher_ids": ids, "teacher_logprobs": logprobs}
        leaves, call = replace(case, inputs=alike).call([TopKDivergence()], "late")
        values, _ = call.tokens([TopKDivergence()])
        assert float(values.detach().min()) >= -1e-7 and float(values.detach().max()) < 2e-6
        for gradient in torch.autograd.grad(values.sum(), leaves):
            assert float(gradient.abs().max()) < 1e-5


def test_a_teacher_whose_mass_is_all_kept_has_an_empty_tail() -> None:
    case = setup(torch.float32)
    logprobs = case.inputs["teacher_logprobs"]
    full = logprobs.log_softmax(-1) + 1e-6  # rounding may push the sum above 1
    whole = replace(case, inputs={**case.inputs, "teacher_logprobs": full})
    leaves, call = whole.call([TopKDivergence()], "late")
    values, _ = call.tokens([TopKDivergence()])
    oracle = whole.compute(ORACLE, [TopKDivergence()], torch.ones(1, TOKENS, dtype=torch.float64))
    torch.testing.assert_close(values.detach().double(), oracle[0], rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(
        torch.autograd.grad(values.sum(), leaves), oracle[1:], strict=True
    ):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [10.0, 25.0, 60.0, 200.0])
def test_a_tail_that_the_student_hardly_has(lead: float) -> None:
    """The teacher's tail over the student's has no bound; the gradient has."""
    case = setup(torch.float32, softcap=None)
    bias = torch.zeros_like(case.student.bias)
    bias[:3] = lead
    logprobs = torch.tensor([0.3, 0.4, 0.1]).log().expand(TOKENS, 3)
    ids = torch.arange(3).expand(TOKENS, 3)
    sure = replace(
        case,
        student=replace(case.student, bias=bias),
        inputs={**case.inputs, "teacher_ids": ids, "teacher_logprobs": logprobs},
    )
    functionals, grad = [TopKDivergence()], _upstream(1)
    references = [sure.compute(how, functionals, grad) for how in (ORACLE, dense(torch.float32))]
    leaves, call = sure.call(functionals, "late")
    values, _ = call.tokens(functionals)
    found = [values.detach(), *torch.autograd.grad((values * grad).sum(), leaves)]
    for ours, oracle, careful in zip(found, *references, strict=True):
        assert_accurate(ours, oracle, careful, k=GRADIENTS, dtype=torch.float32)
