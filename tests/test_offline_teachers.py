"""Teachers that are a few log-probs of each token: divergences, advantages, candidates."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from engine_probe import Probe
from oracles import ORACLE
from random_heads import gradients, head, logits, trainable

import pad_kernels as pk
from pad_kernels.engine.candidates import candidate_logits
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


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_renormalized_over_the_kept_tokens(kind: str, dtype: torch.dtype) -> None:
    student = head(9, 8, 60, dtype, softcap=5.0, temperature=0.7, vocab_size=55)
    student = trainable(replace(student, bias=torch.randn(60).to(dtype)))
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
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=tolerance)
    for a, b in zip(found, torch.autograd.grad(exact, leaves), strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert a.dtype == dtype and error < tolerance


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
