"""Liger's two JSD classes: values and gradients against a dense formula, end points included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compat_cases import Fresh, check
from oracles import Dense, between
from torch import Tensor

import pad_kernels as pk
from pad_kernels.compat.liger.chunked_loss import LigerFusedLinearJSDLoss
from pad_kernels.compat.liger.chunked_loss.functional import liger_fused_linear_jsd as chunked
from pad_kernels.compat.liger.transformers import LigerFusedLinearJSD
from pad_kernels.compat.liger.transformers.functional import liger_fused_linear_jsd as fused

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 12, 8, 37
DTYPES = [torch.float32, torch.bfloat16]


def heads(dtype: torch.dtype, extra: int = 0, bias: bool = True) -> dict[str, Any]:
    """Student and teacher over the same rows; the teacher may have padded entries."""
    labels = torch.randint(V, (N,))
    labels[::4] = -100
    entries = V + extra
    return {
        "hidden": torch.randn(N, H).to(dtype),
        "weight": torch.randn(V, H).to(dtype),
        "bias": torch.randn(V).to(dtype) if bias else None,
        # A teacher is a model like any other: its parameters ask for gradients.
        "teacher": (
            torch.randn(N, H + 3).to(dtype).requires_grad_(),
            torch.randn(entries, H + 3).to(dtype).requires_grad_(),
            torch.randn(entries).to(dtype).requires_grad_() if bias else None,
        ),
        "labels": labels,
    }


def divergence(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Per row, from logits."""
    p, q = F.log_softmax(t, -1), F.log_softmax(s, -1)
    if beta == 0:
        return (p.exp() * (p - q)).sum(-1)
    if beta == 1:
        return (q.exp() * (q - p)).sum(-1)
    return between("jsd", beta, s, t)


def parts(
    how: Dense, x: dict[str, Any], leaves: dict[str, Any], beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, divergence), means over the labelled rows."""
    on = x["labels"] != -100
    z = how.logits(leaves["hidden"], leaves["weight"], leaves.get("bias"))[on]
    t = how.logits(*(how.leaf(y, False) for y in x["teacher"]))[on][:, :V]
    hard = F.cross_entropy(z, x["labels"][on])
    return hard, divergence(z / temperature, t / temperature, beta).mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("temperature", "hard", "soft"), [(1.0, 0.5, 0.5), (2.0, 0.3, 0.9), (0.5, 0.0, 1.0)]
)
def test_chunked(
    dtype: torch.dtype, beta: float, temperature: float, hard: float, soft: float
) -> None:
    x = heads(dtype, bias=temperature != 0.5)
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard,
        weight_soft_loss=soft,
        beta=beta,
        temperature=temperature,
        return_soft_hard_loss=True,
    )
    teacher = x["teacher"]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        loss, *rest = module(hidden, weight, *teacher[:2], x["labels"], bias, teacher[2])
        return loss, tuple(rest)

    def formula(how: Dense, **leaves: Tensor) -> Any:
        ce, d = parts(how, x, leaves, beta, temperature)
        return hard * ce + soft * d, (d, ce)

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])
    assert all(y is None or y.grad is None for y in teacher)


def test_chunked_without_a_divergence() -> None:
    """No teacher is computed for a weight of 0, unless its divergence is to be shown."""
    x = heads(torch.float32)
    teacher = [torch.full_like(y, torch.nan) for y in x["teacher"]]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=2.0, weight_soft_loss=0.0)(
        x["hidden"], x["weight"], *teacher[:2], x["labels"], x["bias"], teacher[2]
    )
    expected = 2 * pk.linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"])
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_fused(dtype: torch.dtype, beta: float, temperature: float, labelled: bool) -> None:
    x = heads(dtype, bias=False)
    if not labelled:
        x["labels"] = torch.zeros(N, dtype=torch.int64)
    module = LigerFusedLinearJSD(beta, temperature=temperature, accum_dtype=torch.float32)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return module(hidden, weight, *x["teacher"][:2], x["labels"] if labelled else None)

    def formula(how: Dense, **leaves: Tensor) -> Any:
        return parts(how, x, leaves, beta, temperature)[1], ()

    check(ours, formula, hidden=x["hidden"], weight=x["weight"])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padded_teacher(temperature: float) -> None:
    """What a teacher's vocabulary has beyond the student's gets no probability on either side."""
    x = heads(torch.float32, extra=5)
    module = LigerFusedLinearJSDLoss(temperature=temperature)
    teacher = x["teacher"]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return module(hidden, weight, *teacher[:2], x["labels"], bias, teacher[2])

    def formula(how: Dense, **leaves: Tensor) -> Any:
        ce, d = parts(how, x, leaves, 0.5, temperature)
        return 0.5 * ce + 0.5 * d, ()

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])


def test_functions_take_positions() -> None:
    x = heads(torch.float32)
    student, teacher, labels = (x["hidden"], x["weight"]), x["teacher"], x["labels"]
    biases = (x["bias"], teacher[2])
    module = LigerFusedLinearJSDLoss(0.2, 0.7, 0.3, 5, 2.0, True, 64, True)
    given = (*student, *teacher[:2], labels.where(labels >= 0, 5), *biases)
    expected = module(*given)
    found = chunked(*given, 0.2, 0.7, 0.3, 5, 2.0, True, 64, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not isinstance(chunked(*given), tuple)
    found = fused(*student, *teacher[:2], labels, 0.3, -100, 2.0, None)
    assert torch.equal(found, LigerFusedLinearJSD(0.3, -100, 2.0)(*student, *teacher[:2], labels))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_ignored_is_zero(temperature: float) -> None:
    x = heads(torch.float32)
    hidden = x["hidden"].requires_grad_()
    labels = torch.full((N,), -100)
    teacher = x["teacher"]
    for loss in (
        LigerFusedLinearJSDLoss(temperature=temperature)(
            hidden, x["weight"], *teacher[:2], labels, x["bias"], teacher[2]
        ),
        LigerFusedLinearJSD(temperature=temperature)(hidden, x["weight"], *teacher[:2], labels),
    ):
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_equal_models(dtype: torch.dtype) -> None:
    """A small divergence comes out right: nothing is rounded to bfloat16 on the way."""
    hidden, weight = torch.randn(32, 16).to(dtype), torch.randn(2000, 16).to(dtype)
    other = (weight.float() * 1.004).to(dtype)
    found = LigerFusedLinearJSD()(hidden, weight, hidden, other)
    # On a CPU a bfloat16 product has bfloat16 entries: the logits are those, the rest is exact.
    z, t = ((hidden @ w.T).double() for w in (weight, other))
    exact = float(between("jsd", 0.5, z, t).mean())
    assert 1e-7 < exact < 1e-3
    assert found.item() == pytest.approx(exact, rel=0.05)


def test_no_logits_and_no_copy_of_a_weight() -> None:
    n, h, v = 128, 16, 12_000
    student = [torch.randn(n, h, requires_grad=True), torch.randn(v, h)]
    teacher = [torch.randn(n, h), torch.randn(v, h)]
    labels = torch.randint(v, (n,))
    for temperature in (1.0, 2.0):
        with pk.workspace_limit(2 << 20), Fresh() as seen:
            module = LigerFusedLinearJSDLoss(temperature=temperature)
            module(*student, *teacher, labels).backward()
        assert seen.largest < v * h


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"beta": 1.5}, ValueError, "beta"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"beta": "half"}, TypeError, "beta"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"weight_hard_loss": "a"}, TypeError, "weight_hard_loss"),
        ({"weight_soft_loss": float("inf")}, ValueError, "weight_soft_loss"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"return_soft_hard_loss": 1}, TypeError, "return_soft_hard_loss"),
        ({"student_input": torch.zeros(2, N, H)}, ValueError, "student_input"),
        ({"teacher_input": torch.zeros(N + 1, H)}, ValueError, "teacher_input"),
        ({"teacher_weight": torch.zeros(V - 1, H)}, ValueError, "teacher_weight"),
        ({"student_bias": torch.zeros(V - 1)}, ValueError, "student_bias"),
        ({"teacher_bias": torch.zeros(V - 1)}, ValueError, "teacher_bias"),
        ({"true_labels": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, "true_labels"),
        ({"true_labels": None}, TypeError, "true_labels"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type, words: str) -> None:
    good: dict[str, Any] = {
        "student_input": torch.zeros(N, H),
        "student_weight": torch.zeros(V, H),
        "teacher_input": torch.zeros(N, H),
        "teacher_weight": torch.zeros(V, H),
        "true_labels": torch.zeros(N, dtype=torch.int64),
    }
    chunked(**good)
    with pytest.raises(error, match=words):
        chunked(**{**good, **change})


def test_bad_input_of_fused() -> None:
    hidden, weight = torch.zeros(N, H), torch.zeros(V, H)
    for change, words in (
        ({"jsd_beta": 2.0}, "jsd_beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"accum_dtype": torch.bfloat16}, "accum_dtype"),
        ({"shift_labels": torch.zeros(1, dtype=torch.int64)}, "shift_labels"),
    ):
        with pytest.raises(ValueError, match=words):
            fused(hidden, weight, hidden, weight, **change)
