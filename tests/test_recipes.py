"""The recipes of docs/recipes.md run as they stand and are the formulas that they say they are.

The formulas are written out here over dense float64 probabilities.
"""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from doc_pages import Page
from torch import Tensor

import pad_kernels as pk

PAGE = Page("docs/recipes.md")
V = 13


@pytest.fixture(scope="module")
def recipes() -> dict:
    namespace = PAGE.run()
    assert namespace["hidden"].grad.abs().sum() > 0 and namespace["weight"].grad.abs().sum() > 0
    return namespace


class Case:
    """Four sequences of seven tokens, two of them chosen: 8 chosen tokens and 4 others.

    Counts and factors are powers of two: per-token weights are then exact in float32.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.hidden = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
        self.weight = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)
        self.student = pk.Head(self.hidden, self.weight)
        self.teacher, self.reference = self.head(6), self.head(3)
        self.labels = torch.randint(V, (4, 7))
        for row, count in enumerate((5, 3, 1, 3)):
            self.labels[row, torch.randperm(7)[count:]] = -100
        self.counted = self.labels != -100
        self.is_chosen = torch.tensor([True, True, False, False])
        self.chosen = self.counted & self.is_chosen[:, None]
        self.other = self.counted & ~self.is_chosen[:, None]
        assert (self.chosen.sum(), self.other.sum()) == (8, 4)
        # The oracle's view: dense log-softmaxes.
        self.s = (self.hidden @ self.weight.T).log_softmax(-1)
        self.t, self.r = self.dense(self.teacher), self.dense(self.reference)

    @staticmethod
    def head(width: int) -> pk.Head:
        shape = (4, 7, width)
        dtype = torch.float64
        return pk.Head(
            torch.randn(shape, dtype=dtype),
            torch.randn(V, width, dtype=dtype),
            torch.randn(V, dtype=dtype),
        )

    @staticmethod
    def dense(head: pk.Head) -> Tensor:
        return (head.hidden @ head.weight.T + head.bias).log_softmax(-1)

    @property
    def ce(self) -> Tensor:
        return -self.s.gather(-1, self.labels.clamp(min=0)[..., None])[..., 0]

    @property
    def kl(self) -> Tensor:
        return (self.t.exp() * (self.t - self.s)).sum(-1)

    @property
    def reverse_kl(self) -> Tensor:
        return (self.s.exp() * (self.s - self.r)).sum(-1)

    @property
    def advantage(self) -> Tensor:
        return (self.s.exp() * (self.t - self.r)).sum(-1)

    def check(self, found: Tensor, expected: Tensor) -> None:
        """Value and gradients of a recipe against the formula's."""
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        inputs = (self.hidden, self.weight)
        ours = torch.autograd.grad(found, inputs)
        for a, b in zip(ours, torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
            assert b.abs().sum() > 0


@pytest.fixture(params=[0, 1])
def case(request) -> Case:
    return Case(request.param)


def test_dckd(recipes, case) -> None:
    found = recipes["dckd_loss"](
        case.student, case.teacher, case.labels, case.is_chosen, alpha=0.25
    )
    sft = case.ce[case.chosen].mean()
    case.check(found, sft + 0.25 * (case.kl[case.chosen].mean() + case.kl[case.other].mean()))


def test_adpa(recipes, case) -> None:
    heads = (case.student, case.teacher, case.reference)
    found = recipes["adpa_loss"](*heads, case.labels, case.is_chosen, gamma=2.0, beta=0.25)
    advantage = 0.25 * case.advantage[case.other].mean()
    case.check(found, case.ce[case.chosen].mean() - 2.0 * advantage)


def test_adpa_with_importance(recipes, case) -> None:
    old = torch.where(case.is_chosen, 0.0, -6 * torch.rand(4, dtype=torch.float64))
    arguments = (case.student, case.teacher, case.reference, case.labels, case.is_chosen, old)
    found = recipes["adpa_importance_loss"](*arguments, gamma=2.0, beta=0.25)
    total = torch.zeros((), dtype=torch.float64)
    for row in (2, 3):
        mask = case.counted[row]
        ratio = torch.exp(-case.ce[row][mask].sum() - old[row])
        total = total + ratio * 0.25 * case.advantage[row][mask].sum()
    case.check(found, case.ce[case.chosen].mean() - 2.0 * total / 4)


def test_adpa_with_importance_is_adpa_on_policy(recipes, case) -> None:
    """Where the old policy is the student, the ratio is 1; its gradient is not 0."""
    old = -(case.ce * case.other).sum(-1).detach()
    heads = (case.student, case.teacher, case.reference)
    one = recipes["adpa_importance_loss"](*heads, case.labels, case.is_chosen, old)
    two = recipes["adpa_loss"](*heads, case.labels, case.is_chosen)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_clipped_kl(recipes, case) -> None:
    kl = case.kl[case.counted]
    bound = kl.detach().median().item() + 1e-3
    found = recipes["clipped_kl_loss"](case.student, case.teacher, case.labels, bound=bound)
    low = kl[kl < bound]
    assert 0 < len(low) < len(kl)
    case.check(found, (low.sum() + bound * (len(kl) - len(low))) / len(kl))


def test_grpo(recipes, case) -> None:
    torch.manual_seed(9)
    old = -case.ce.detach() + 0.3 * torch.randn(4, 7, dtype=torch.float64)
    old = torch.where(case.counted, old, 0.0)
    gains = torch.tensor([1.3, -0.7, 0.4, -1.0], dtype=torch.float64)
    arguments = (case.student, case.reference, case.labels, old, gains)
    found = recipes["grpo_loss"](*arguments, clip=0.2, kl_weight=0.04)
    rows, clipped = [], 0
    for row in range(4):
        losses = []
        for t in case.counted[row].nonzero()[:, 0]:
            ratio, gain = torch.exp(-case.ce[row, t] - old[row, t]), gains[row]
            bounded = ratio.clamp(0.8, 1.2)
            clipped += int(bounded * gain < ratio * gain)
            losses.append(-torch.min(ratio * gain, bounded * gain) + 0.04 * case.reverse_kl[row, t])
        rows.append(torch.stack(losses).mean())
    assert clipped > 0
    case.check(found, torch.stack(rows).mean())


def test_offline_teacher(recipes, case) -> None:
    kept = recipes["offline_teacher"](case.teacher, k=3)
    found = recipes["offline_kd_loss"](case.student, kept, case.labels)
    t, ids = case.t.topk(3, -1)
    s = case.s.gather(-1, ids)
    assert torch.equal(kept.ids, ids)
    outside = torch.ones_like(case.s, dtype=torch.bool).scatter(-1, ids, False)
    tail_t = torch.where(outside, case.t.exp(), 0.0).sum(-1)
    tail_s = torch.where(outside, case.s.exp(), 0.0).sum(-1)
    kl = (t.exp() * (t - s)).sum(-1) + tail_t * (tail_t.log() - tail_s.log())
    case.check(found, kl[case.counted].mean())


def test_an_offline_teacher_of_all_tokens_is_the_teacher(recipes, case) -> None:
    kept = recipes["offline_teacher"](case.teacher, k=V)
    found = recipes["offline_kd_loss"](case.student, kept, case.labels)
    case.check(found, case.kl[case.counted].mean())


@pytest.mark.parametrize("k", [3, V])
def test_offline_advantage(recipes, case, k) -> None:
    kept = recipes["offline_advantage"](case.teacher, case.reference, k=k)
    found = recipes["offline_adpa_loss"](case.student, kept, case.labels, beta=0.25)
    t, ids = case.t.topk(k, -1)
    value = (case.s.gather(-1, ids).exp() * (t - case.r.gather(-1, ids))).sum(-1)
    case.check(found, -0.25 * value[case.counted].mean())
    if k == V:
        torch.testing.assert_close(found, -0.25 * case.advantage[case.counted].mean())


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_micro_batches_add_up_to_the_batch(recipes, case, kind) -> None:
    items = kind(int(case.counted.sum()))
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4)):
        student = pk.Head(case.hidden[rows], case.weight)
        teacher = pk.Head(case.teacher.hidden[rows], case.teacher.weight, case.teacher.bias)
        total = total + recipes["accumulated_loss"](
            student, teacher, case.labels[rows], items, kl_weight=0.25
        )
    expected = 0.75 * case.ce[case.counted].mean() + 0.25 * case.kl[case.counted].mean()
    case.check(total, expected)


def test_recipes_compile_in_one_graph(recipes) -> None:
    case = Case(0)
    calls = {
        "dckd_loss": (case.student, case.teacher, case.labels, case.is_chosen),
        "adpa_loss": (case.student, case.teacher, case.reference, case.labels, case.is_chosen),
        "grpo_loss": (case.student, case.reference, case.labels, case.ce.detach(), torch.ones(4)),
    }
    for name, arguments in calls.items():
        compiled = torch.compile(recipes[name], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), recipes[name](*arguments))


def test_every_recipe_is_short() -> None:
    functions = [
        part for block in PAGE.python for part in re.split(r"^(?=def )", block, flags=re.M)[1:]
    ]
    assert len(functions) >= 9
    for function in functions:
        body = [line for line in function.splitlines() if line.startswith(" ")]
        assert len(body) <= 12, function


def test_every_recipe_is_tested() -> None:
    ours = pathlib.Path(__file__).read_text()
    for name in re.findall(r"^def (\w+)", "".join(PAGE.python), re.M):
        assert f'recipes["{name}"]' in ours, name


def test_links_lead_somewhere() -> None:
    assert PAGE.links and not PAGE.broken_links()
