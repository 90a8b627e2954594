"""Every functional of the registry, through the engine: values, gradients, mixtures, sweeps."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from functional_cases import (
    DTYPES,
    EXAMPLES,
    MIXTURES,
    TOKENS,
    VOCAB,
    Setup,
    check_tokens,
    check_total,
    refused,
    setup,
    upstream,
)
from oracles import FORMULAS, GRADIENTS, ORACLE, assert_accurate, dense
from torch import Tensor

import pad_kernels as pk
from pad_kernels.backends.reference import ORACLES
from pad_kernels.functionals import (
    REGISTRY,
    Divergence,
    ForwardKL,
    Functional,
    ReverseKL,
    TopKDivergence,
)
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import RowStats

pytestmark = pytest.mark.usefixtures("poisoned")

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
    if refused([functional], pk.PlanRequest(*plan.split(":"))):
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
    if refused([functional], pk.PlanRequest("late", backend)):
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
    functionals, grad = [TopKDivergence()], upstream(1)
    references = [sure.compute(how, functionals, grad) for how in (ORACLE, dense(torch.float32))]
    leaves, call = sure.call(functionals, "late")
    values, _ = call.tokens(functionals)
    found = [values.detach(), *torch.autograd.grad((values * grad).sum(), leaves)]
    for ours, oracle, careful in zip(found, *references, strict=True):
        assert_accurate(ours, oracle, careful, k=GRADIENTS, dtype=torch.float32)
