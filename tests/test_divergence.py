"""Divergences by their public function: numerics, heads, memory."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from cpu_backends import BACKENDS, every_backend
from engine_probe import Probe, Watch
from random_heads import gradients, head, logits, trainable
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine.workspace import account
from pad_kernels.functionals.divergence import KINDS

pytestmark = pytest.mark.usefixtures("poisoned")

every_kind = pytest.mark.parametrize("kind", KINDS)


# --- nearly equal models ---


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_models_at_a_large_vocabulary(kind: str, dtype: torch.dtype) -> None:
    same = head(3, 16, 128256, dtype)
    for plan in ("early", "late"):
        student = trainable(same)
        values = pk.linear_divergence(student, same, kind=kind, reduction="sum", plan=plan)
        assert abs(float(values.detach())) <= 3e-6
        for gradient in gradients(values, student):
            assert float(gradient.abs().max()) < 1e-5


@every_kind
@every_backend
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_tiny_divergences_are_right_to_a_tenth(kind: str, backend: str, spread: float) -> None:
    """True values near 1e-6 from float32 inputs, flat to peaked."""
    torch.manual_seed(4)
    rows, width, vocab = 24, 32, 32000
    # bfloat16 numbers, so that both precisions see the same models.
    hidden = (torch.randn(rows, width) * spread).bfloat16().float()
    weight = (torch.randn(vocab, width) / width**0.5).bfloat16().float()
    bias = torch.randn(vocab) * 1.5e-3
    student, teacher = pk.Head(hidden, weight, bias), pk.Head(hidden, weight)
    alpha = 0.5 if kind in ("jsd", "skew_forward_kl", "skew_reverse_kl") else None
    exact = oracles.between(kind, 0.5, logits(student), logits(teacher))
    if kind != "tvd":
        assert 1e-8 < float(exact.median()) < 5e-6
    for schedule in ("late", "kept"):
        found = pk.linear_divergence(
            student, teacher, kind=kind, alpha=alpha, reduction="none", plan=f"{schedule}:{backend}"
        )
        assert float(found.min()) >= -1e-7
        worst = (found.double() - exact).abs() / exact.clamp(min=1e-6)
        assert float(worst.max()) < 0.1, f"{kind}: off by {float(worst.max()):.3g}"


@every_backend
def test_tiny_divergences_in_bfloat16(backend: str) -> None:
    """The same logits to bfloat16's rounding: what is left is far below that of the logits."""
    torch.manual_seed(5)
    hidden = torch.randn(16, 64).bfloat16()
    weight = (torch.randn(4096, 64) / 8).bfloat16()
    bias = (torch.randn(4096) * 2e-3).bfloat16()
    student, teacher = pk.Head(hidden, weight, bias), pk.Head(hidden, weight)
    for kind in KINDS:
        found = pk.linear_divergence(
            student, teacher, kind=kind, reduction="none", plan=f"late:{backend}"
        )
        raw = (hidden @ weight.T).double()  # the rounded logits that the op sees
        alpha = {"jsd": 0.5}.get(kind, 0.1)
        exact = oracles.between(kind, alpha, raw + bias.double(), raw)
        assert float(found.min()) >= -1e-7
        torch.testing.assert_close(found.double(), exact, rtol=0.1, atol=1e-7)


# --- heads ---


@every_kind
def test_padded_vocabularies_are_slices(kind: str) -> None:
    """Vocabularies of different padded size agree exactly with slicing."""
    student, teacher = head(9, 8, 130, vocab_size=101), head(9, 12, 117, vocab_size=101)
    results = []
    for s, t in (
        (student, teacher),
        (
            pk.Head(student.hidden, student.weight[:101]),
            pk.Head(teacher.hidden, teacher.weight[:101]),
        ),
    ):
        s = trainable(s)
        value = pk.linear_divergence(s, t, kind=kind)
        results.append((value, *gradients(value, s)))
    (a, ah, aw), (b, bh, bw) = results
    assert torch.equal(a, b) and torch.equal(ah, bh) and torch.equal(aw[:101], bw)
    assert not aw[101:].any()


@every_kind
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_minus_infinity(kind: str, backend: str, reduction: str) -> None:
    """Entries that one side, or both, cannot produce."""
    student, teacher = (
        replace(head(7, 8, 300), bias=torch.zeros(300)),
        replace(head(7, 8, 300), bias=torch.zeros(300)),
    )
    both, ours, theirs = slice(0, 40), slice(60, 90), slice(100, 140)
    student.bias[both] = teacher.bias[both] = -torch.inf
    if kind != "reverse_kl":
        teacher.bias[ours] = -torch.inf
    if kind != "forward_kl":
        student.bias[theirs] = -torch.inf
    student = trainable(student)
    given = {"kind": kind, "reduction": reduction, "plan": f"late:{backend}"}
    value = pk.linear_divergence(student, teacher, **given)
    alpha = {"jsd": 0.5}.get(kind, 0.1)
    exact = oracles.between(kind, alpha, logits(student), logits(teacher))
    exact = {"none": exact, "sum": exact.sum(), "mean": exact.mean()}[reduction]
    torch.testing.assert_close(value.detach().double(), exact, rtol=1e-5, atol=1e-6)
    for gradient in gradients(value.sum(), student):
        assert gradient.isfinite().all()


@every_backend
def test_products_that_overflow(backend: str) -> None:
    """Logits of -inf without a bias, and rows that a weight of 0 must keep them from."""
    student, aligned, reference = (head(6, 8, 300) for _ in range(3))
    for h in (student, aligned, reference):
        h.hidden.abs_()
    student.weight[:40] = aligned.weight[:40] = aligned.weight[90:120] = -3e38
    student = trainable(student)
    ce = torch.ones(6)
    advantage = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.0])
    found = []
    for used in (advantage, torch.zeros(6)):
        out = pk.linear_distill(
            student,
            torch.full((6,), 200),
            aligned=aligned,
            reference=reference,
            ce_weight=ce,
            advantage_weight=used,
            plan=f"early:{backend}",
        )
        found.append(gradients(out.loss, student)[0])
    without = advantage == 0
    torch.testing.assert_close(found[0][without], found[1][without])
    assert found[1].isfinite().all()


def test_mass_where_the_student_has_none_is_infinite() -> None:
    student = replace(head(4, 8, 50), bias=torch.zeros(50))
    student.bias[7] = -torch.inf
    teacher = head(4, 8, 50)
    for backend in BACKENDS:
        plan = f"late:{backend}"
        forward = pk.linear_divergence(student, teacher, reduction="none", plan=plan)
        assert torch.equal(forward, torch.full((4,), torch.inf))
        backward = pk.linear_divergence(teacher, student, kind="reverse_kl", plan=plan)
        assert float(backward) == torch.inf


def test_extreme_logits() -> None:
    for scale in (1e3, 1e4):
        student, teacher = head(5, 8, 200, logit_scale=scale), head(5, 8, 200, logit_scale=scale)
        for kind in KINDS:
            if kind == "tvd" or "skew" in kind or kind == "jsd":
                for backend in BACKENDS:
                    value = pk.linear_divergence(
                        student, teacher, kind=kind, reduction="none", plan=f"late:{backend}"
                    )
                    alpha = {"jsd": 0.5}.get(kind, 0.1)
                    exact = oracles.between(kind, alpha, logits(student), logits(teacher))
                    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("alpha", [0.1, 0.9, 0.99])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_any_mixture(scale: float, alpha: float, kind: str, backend: str) -> None:
    """Of logits as plain random weights give them, most rows nearly certain, and of milder ones."""
    hidden, weight, others, taught = (torch.randn(n, 123) for n in (37, 507, 37, 507))
    student = trainable(pk.Head(hidden, weight, logit_scale=scale))
    teacher = pk.Head(others, taught, logit_scale=scale)
    values = pk.linear_divergence(
        student, teacher, kind=kind, alpha=alpha, reduction="none", plan=f"late:{backend}"
    )

    def dense(dtype: torch.dtype) -> list[Tensor]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        z_s, z_t = h @ w.t() * scale, others.to(dtype) @ taught.to(dtype).t() * scale
        values = oracles.between(kind, alpha, z_s, z_t)
        return [values.detach(), *torch.autograd.grad(values.sum(), (h, w))]

    found = [values.detach(), *gradients(values.sum(), student)]
    exact, careful = dense(torch.float64), dense(torch.float32)
    for k, *parts in zip((2, 3, 3), found, exact, careful, strict=True):
        oracles.assert_accurate(*parts, k=k, dtype=torch.float32)


@every_backend
@pytest.mark.parametrize("plan", ["early", "late"])
def test_certain_students_have_no_gradient(plan: str, backend: str) -> None:
    """What is less its mean is exactly 0, whatever the teachers' logits round to."""
    student, one, two = (head(37, 8, 200, logit_scale=scale) for scale in (1e6, 1e3, 1e3))
    student = trainable(student)
    plan = f"{plan}:{backend}"
    for kind in KINDS:
        if kind != "forward_kl":  # its gradient is s - t
            value = pk.linear_divergence(student, one, kind=kind, plan=plan)
            assert not any(g.any() for g in gradients(value, student)), kind
    value = pk.linear_expected_advantage(student, one, two, plan=plan)
    assert not any(g.any() for g in gradients(value, student))


# --- what is held, and as PyTorch users expect ---


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("plan", [None, "late", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_as_large_as_the_logits(
    monkeypatch: pytest.MonkeyPatch, kind: str, plan: str | None, dtype: torch.dtype
) -> None:
    n, vocab = 2048, 65536
    student, teacher = (head(n, 8, vocab, dtype) for _ in range(2))
    student = trainable(student)
    probe = Probe.install(monkeypatch)
    account.reset()
    with Watch() as watch:
        value = pk.linear_divergence(student, teacher, kind=kind, plan=plan)
        probe.backward(torch.ones_like(value))
    assert n < watch.largest < n * vocab
    assert account.high_water <= probe.plans[0].workspace_bytes <= 240 << 20
    # Weights enter the products as they lie.
    assert all(b == 8 or a == 8 or c == 8 for a, b, c in watch.products)


def test_a_head_that_is_frozen_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab = 32, 211
    student, teacher = head(rows, 8, vocab), head(rows, 12, vocab)
    hidden = student.hidden.requires_grad_()
    probe = Probe.install(monkeypatch)
    with Watch() as watch:
        pk.linear_divergence(replace(student, hidden=hidden), teacher, plan="early")
    # Student forward and the gradient of hidden; teacher forward.
    assert watch.flops == 2 * rows * vocab * (8 + 8 + 12)
    assert probe.outputs[3].numel() == 0


@every_kind
def test_compiles_in_one_graph(kind: str) -> None:
    student, teacher = trainable(head(6, 8, 70)), head(6, 12, 70)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return pk.linear_divergence(pk.Head(hidden, weight), teacher, kind=kind)

    plain = loss(student.hidden, student.weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(
        student.hidden, student.weight
    )
    torch.testing.assert_close(plain, compiled)
    for a, b in zip(gradients(plain, student), gradients(compiled, student), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("plan", ["early", "late"])
def test_autocast_and_mixed_dtypes(plan: str) -> None:
    student, teacher = trainable(head(12, 16, 200)), head(12, 16, 200, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = pk.linear_divergence(student, teacher, plan=plan)
    assert value.dtype == torch.float32
    found = gradients(value, student)
    exact = oracles.between("forward_kl", 0.0, logits(student), logits(teacher)).mean()
    assert float(value.detach()) == pytest.approx(float(exact), rel=2e-2)
    assert all(g.dtype == torch.float32 for g in found)
