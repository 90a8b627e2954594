"""Divergences, the expected advantage and mixtures by their public functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from engine_probe import Probe, Watch
from oracles import ORACLE, assert_accurate
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine.workspace import account
from pad_kernels.functionals.divergence import KINDS

BACKENDS = ["torch_blocked"]
if pk.available_backends()["cpp"] == "available":
    BACKENDS.insert(0, "cpp")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "poison", True)


def head(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, **options: Any
) -> pk.Head:
    """Random, logits with a standard deviation of about 3."""
    hidden, weight = torch.randn(rows, width) * 3, torch.randn(vocab, width) / width**0.5
    return pk.Head(hidden.to(dtype), weight.to(dtype), **options)


def trainable(x: pk.Head) -> pk.Head:
    tensors = {n: getattr(x, n) for n in ("hidden", "weight", "bias")}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if t is not None}
    return replace(x, **leaves)


def gradients(value: Tensor, student: pk.Head) -> list[Tensor]:
    leaves = [x for x in (student.hidden, student.weight, student.bias) if x is not None]
    return list(torch.autograd.grad(value, leaves))


def logits(x: pk.Head) -> Tensor:
    options = (x.softcap, x.logit_scale, x.temperature, x.vocab_size)
    return ORACLE.logits(*(ORACLE.leaf(t, False) for t in (x.hidden, x.weight, x.bias)), *options)


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
@every_backend
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


# --- mixtures ---


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


def test_none_gives_every_part_differentiable_from_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


# --- offline teachers ---


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


# --- as PyTorch users expect ---


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


def test_candidate_op_passes_opcheck() -> None:
    from pad_kernels.engine.candidates import candidate_logits

    student = trainable(head(6, 8, 70))
    ids = torch.stack([torch.randperm(70)[:3] for _ in range(6)])
    counted = torch.tensor([True, False, True, True, True, False])
    arguments = (student.hidden, student.weight, ids, torch.full((6, 3), -2.0), counted, 70)
    torch.library.opcheck(candidate_logits, arguments)


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
