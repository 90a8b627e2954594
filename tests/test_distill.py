"""Mixtures of losses over one student: sums of their parts, at the price of what is used."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from cpu_backends import every_backend
from engine_probe import Probe, Watch
from oracles import assert_accurate
from random_heads import gradients, head, logits, trainable
from torch import Tensor

import pad_kernels as pk

pytestmark = pytest.mark.usefixtures("poisoned")


def _everything(dtype: torch.dtype = torch.float32) -> tuple[pk.Head, dict[str, Any], Tensor]:
    student = head(20, 16, 211, dtype, softcap=9.0)
    teachers = {
        "teacher": head(20, 24, 211, dtype),
        "aligned": head(20, 24, 211, dtype, temperature=1.5),
        "reference": head(20, 12, 211, dtype),
    }
    labels = torch.randint(211, (20,))
    labels[::5] = -100
    return student, teachers, labels


@every_backend
@pytest.mark.parametrize("schedule", ["early", "late", "kept"])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_mixture_is_the_sum_of_its_parts(kind: str, schedule: str, backend: str) -> None:
    student, teachers, labels = _everything()
    plan = f"{schedule}:{backend}"
    weights = {
        "ce_weight": torch.rand(20) * (torch.rand(20) < 0.5),
        "divergence_weight": torch.rand(20) * (torch.rand(20) < 0.5),
        "advantage_weight": torch.rand(20) * (torch.rand(20) < 0.5),
        "entropy_weight": 0.3,
    }
    one = trainable(student)
    out = pk.linear_distill(
        one, labels, **teachers, **weights, kind=kind, beta=0.7, normalizer=11.0, plan=plan
    )
    found = gradients(out.loss, one)
    assert float(out.loss.detach()) == pytest.approx(
        float(out.cross_entropy + out.divergence - out.advantage - out.entropy), abs=1e-6
    )
    other = trainable(student)
    common = {"labels": labels, "normalizer": 11.0, "plan": plan}
    parts = {
        "cross_entropy": pk.linear_cross_entropy(
            other.hidden,
            other.weight,
            labels,
            softcap=9.0,
            token_weights=weights["ce_weight"],
            normalizer=11.0,
            plan=plan,
        ),
        "divergence": pk.linear_divergence(
            other,
            teachers["teacher"],
            kind=kind,
            token_weights=weights["divergence_weight"],
            **common,
        ),
        "advantage": pk.linear_expected_advantage(
            other,
            teachers["aligned"],
            teachers["reference"],
            beta=0.7,
            token_weights=weights["advantage_weight"],
            **common,
        ),
        "entropy": 0.3
        * pk.linear_token_stats(
            other.hidden, other.weight, labels, softcap=9.0, plan=f"late:{backend}"
        ).entropy.sum()
        / 11.0,
    }
    for name, value in parts.items():
        assert float(getattr(out, name)) == pytest.approx(float(value.detach()), rel=1e-5)
    total = parts["cross_entropy"] + parts["divergence"] - parts["advantage"] - parts["entropy"]
    for a, b in zip(found, gradients(total, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_none_gives_every_part_differentiable_from_one_pass() -> None:
    student, teachers, labels = _everything()
    student = trainable(student)
    out = pk.linear_distill(student, labels, **teachers, reduction="none")
    assert out.loss is None
    live = labels >= 0
    z = {n: logits(h) for n, h in {"student": student, **teachers}.items()}
    expected = {
        "cross_entropy": oracles.cross_entropy(z["student"], labels.clamp(min=0)),
        "divergence": oracles.between("forward_kl", 0.0, z["student"], z["teacher"]),
        "advantage": oracles.advantage(z["student"], z["aligned"], z["reference"]),
        "entropy": oracles.entropy(z["student"]),
    }
    for name, value in expected.items():
        found = getattr(out, name)
        assert found.shape == labels.shape and found.requires_grad
        assert not found[~live].any()
        torch.testing.assert_close(found[live].double(), value[live], rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), student.hidden, retain_graph=True)
        assert gradient[live].abs().sum() > 0 and not gradient[~live].any()


@pytest.mark.parametrize("plan", ["early", "late", "kept"])
def test_a_teacher_is_computed_for_rows_that_use_it(
    monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """ADPA: chosen tokens have cross-entropy alone, responses the advantage alone."""
    rows, vocab = 64, 503
    student, aligned, reference = (trainable(head(rows, 8, vocab)), *(head(rows, 12, vocab),) * 2)
    reference = head(rows, 10, vocab)
    labels = torch.randint(vocab, (rows,))
    chosen = torch.arange(rows) % 4 > 0
    probe = Probe.install(monkeypatch)
    with Watch() as watch:
        pk.linear_distill(
            student,
            labels,
            aligned=aligned,
            reference=reference,
            ce_weight=pk.token_mean_weights(chosen),
            advantage_weight=pk.token_mean_weights(~chosen),
            reduction="sum",
            plan=plan,
        )
        probe.backward(torch.tensor(1.0))
    of_aligned = sum(a * b * c for a, b, c in watch.products if b == 12)
    once = 16 * 12 * vocab
    assert of_aligned == once * (1 if plan != "late" else 2)
    of_reference = sum(a * b * c for a, b, c in watch.products if b == 10)
    assert of_reference == of_aligned // 12 * 10


def test_without_any_weight_the_loss_is_zero_and_so_are_its_gradients() -> None:
    student, teacher = trainable(head(6, 8, 70)), head(6, 12, 70)
    out = pk.linear_distill(student, torch.arange(6), teacher=teacher)
    assert not any(x for x in out if x is not None)
    assert not any(g.any() for g in gradients(out.loss, student))


def test_weights_that_require_grad_get_one() -> None:
    student, teacher = trainable(head(6, 8, 70)), head(6, 12, 70)
    weights = torch.rand(6, requires_grad=True)
    per_token = pk.linear_divergence(student, teacher, reduction="none")
    value = pk.linear_divergence(student, teacher, token_weights=weights)
    (found,) = torch.autograd.grad(value, weights)
    assert_accurate(found, per_token.double() / 6, per_token / 6, k=2, dtype=torch.float32)
    out = pk.linear_distill(
        student, torch.arange(6), teacher=teacher, ce_weight=1.0, divergence_weight=weights
    )
    (again,) = torch.autograd.grad(out.loss, weights)
    torch.testing.assert_close(again, found)
