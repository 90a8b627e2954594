"""Teachers that are a few log-probs of each token: divergences, advantages, candidates."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import oracles
import pytest
import torch
from cpu_backends import every_backend
from engine_probe import Probe
from oracles import ORACLE, Dense
from random_heads import gradients, head, logits, trainable
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine.candidates import candidate_logits
from pad_kernels.engine.workspace import account
from pad_kernels.functionals.divergence import KINDS

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_all_tokens_kept_is_the_full_teacher(kind: str) -> None:
    student, teacher = trainable(head(6, 8, 40)), head(6, 12, 40)
    kept = pk.linear_topk(teacher.hidden, teacher.weight, 40)
    whole = pk.linear_divergence(student, teacher, kind=kind)
    expected = gradients(whole, student)
    for tail in ("bucket", "renormalize"):
        value = pk.linear_divergence(student, pk.TopKTeacher(*kept, tail), kind=kind)
        torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-6)
        for a, b in zip(gradients(value, student), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def check_accuracy(kind: str, tail: str, likely: bool, dtype: torch.dtype, plan: str) -> None:
    """A teacher close to the student, whose k tokens are nearly all or next to nothing of it."""
    student = head(9, 16, 507, dtype, temperature=0.8, vocab_size=500)
    exact = logits(student).log_softmax(-1)
    ids = exact.argsort(1, descending=True)[:, slice(40) if likely else slice(20, 23)]
    mass = exact.gather(1, ids).exp().sum(1)
    assert (mass > 0.5).all() if likely else (mass < 0.5).all()
    logprobs = (exact.gather(1, ids) + 0.1 * torch.randn(ids.shape).clamp(max=1) - 0.1).float()

    def dense(how: Dense) -> list[Tensor]:
        leaves = [how.leaf(student.hidden), how.leaf(student.weight)]
        z = how.logits(*leaves, temperature=0.8, vocab_size=500)
        if tail == "bucket":
            value = oracles.topk_divergence(SimpleNamespace(kind=kind, alpha=0.3), z, ids, logprobs)
        else:
            value = oracles.between(kind, 0.3, z.gather(1, ids), logprobs.to(z.dtype))
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    ours = trainable(student)
    teacher = pk.TopKTeacher(ids, logprobs, tail)
    alpha = None if kind in ("forward_kl", "reverse_kl", "tvd") else 0.3
    value = pk.linear_divergence(ours, teacher, kind=kind, alpha=alpha, reduction="none", plan=plan)
    found = [value.detach(), *gradients(value.sum(), ours)]
    oracles.assert_all_accurate(found, dense(ORACLE), dense(oracles.dense(dtype)), dtype)


@every_kind
@every_backend
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("likely", [True, False], ids=["likely", "unlikely"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(kind: str, tail: str, likely: bool, dtype: torch.dtype, backend: str) -> None:
    check_accuracy(kind, tail, likely, dtype, f"late:{backend}")


@every_backend
def test_ids_of_any_layout(backend: str) -> None:
    student, teacher = trainable(head(9, 8, 60)), head(9, 8, 60)
    kept = pk.linear_topk(teacher.hidden, teacher.weight, 5)
    found = []
    for turned in (False, True):
        offline = pk.TopKTeacher(*(x.T.contiguous().T if turned else x for x in kept))
        value = pk.linear_divergence(student, offline, plan=f"late:{backend}")
        found.append([value, *gradients(value, student)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_kind
def test_renormalized_over_the_kept_tokens(kind: str) -> None:
    student = head(9, 8, 60, torch.float64, softcap=5.0, temperature=0.7, vocab_size=55)
    student = trainable(replace(student, bias=torch.randn(60).double()))
    ids = torch.stack([torch.randperm(55)[:5] for _ in range(9)])
    logprobs = torch.randn(9, 5, dtype=torch.float64).log_softmax(-1) - 0.3
    labels = torch.arange(9)
    labels[2] = -100
    teacher = pk.TopKTeacher(ids, logprobs, "renormalize")
    value = pk.linear_divergence(student, teacher, kind=kind, labels=labels, reduction="sum")
    found = gradients(value, student)
    leaves = [ORACLE.leaf(x) for x in (student.hidden, student.weight, student.bias)]
    z = ORACLE.logits(*leaves, 5.0, 1.0, 0.7, 55).gather(1, ids)
    alpha = {"jsd": 0.5}.get(kind, 0.1)
    per_row = oracles.between(kind, alpha, z, logprobs)
    exact = per_row[labels >= 0].sum()
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-9)
    for a, b in zip(found, torch.autograd.grad(exact, leaves), strict=True):
        assert a.dtype == torch.float64
        assert float((a - b).norm() / b.norm()) < 1e-9


def test_renormalized_where_the_student_has_no_mass() -> None:
    """A forward KL is infinite there, the others are not; and a weight of 0 silences any value."""
    bias = torch.zeros(60).index_fill(0, torch.tensor(3), -torch.inf)
    student = trainable(replace(head(4, 8, 60), bias=bias))
    ids = torch.tensor([[3, 7, 9]]).expand(4, 3)
    teacher = pk.TopKTeacher(ids, torch.randn(4, 3).log_softmax(-1), "renormalize")
    s = logits(student).gather(1, ids).log_softmax(-1).exp()
    t = teacher.logprobs.double().exp()
    for kind, expected in {
        "forward_kl": torch.full((4,), torch.inf),
        "reverse_kl": torch.special.entr(s).sum(-1).neg() - (s * t.log()).sum(-1),
        "tvd": (s - t).abs().sum(-1) / 2,
    }.items():
        value = pk.linear_divergence(student, teacher, kind=kind, reduction="none")
        torch.testing.assert_close(value.detach(), expected.float())
    weights = torch.zeros(4)
    for wanted in (weights, weights.clone().requires_grad_()):
        value = pk.linear_divergence(student, teacher, token_weights=wanted, reduction="sum")
        assert value == 0
        assert not any(g.any() for g in gradients(value, student))


def test_renormalized_needs_no_product_with_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = trainable(head(9, 8, 5000))
    kept = pk.TopKTeacher(torch.arange(27).reshape(9, 3), torch.full((9, 3), -1.2), "renormalize")
    probe = Probe.install(monkeypatch)
    pk.linear_divergence(student, kept).backward()
    assert not probe.plans
    touched = student.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().squeeze(1).tolist() == list(range(27))


def test_renormalized_adds_up_the_rows_that_it_meets() -> None:
    """In float32 where the weight is half precision, and no more than those."""
    student = trainable(head(9, 8, 5000, torch.bfloat16))
    ids = torch.arange(27).reshape(9, 3) % 7
    kept = pk.TopKTeacher(ids, torch.full((9, 3), -1.2), "renormalize")
    account.reset()
    pk.linear_divergence(student, kept).backward()
    assert account.high_water == 7 * 8 * 4


def test_offline_advantage() -> None:
    student, aligned, reference = (trainable(head(7, 8, 90)), head(7, 8, 90), head(7, 8, 90))
    ids = torch.arange(90).expand(7, 90)
    ratio = logits(aligned).log_softmax(-1) - logits(reference).log_softmax(-1)
    online = pk.linear_expected_advantage(student, aligned, reference, beta=0.3)
    offline = pk.linear_expected_advantage(student, pk.TopKAdvantage(ids, ratio.float()), beta=0.3)
    torch.testing.assert_close(online, offline, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients(online, student), gradients(offline, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_candidate_op_passes_opcheck() -> None:
    student = trainable(head(6, 8, 70))
    ids = torch.stack([torch.randperm(70)[:3] for _ in range(6)])
    counted = torch.tensor([True, False, True, True, True, False])
    arguments = (student.hidden, student.weight, ids, torch.full((6, 3), -2.0), counted, 70, "")
    torch.library.opcheck(candidate_logits, arguments)
