"""Cross-entropy under the signatures of Liger, Cut Cross-Entropy and torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compat_cases import Fresh, check
from oracles import Dense
from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels.compat import cut_cross_entropy as cce
from pad_kernels.compat import torch_nn
from pad_kernels.compat.liger.ops import LigerFusedLinearCrossEntropyFunction
from pad_kernels.compat.liger.transformers import LigerFusedLinearCrossEntropyLoss
from pad_kernels.compat.liger.transformers.functional import (
    CrossEntropyOutput,
    liger_fused_linear_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 12, 8, 37
DTYPES = [torch.float32, torch.bfloat16]


def case(dtype: torch.dtype, ignored: int = -100, bias: bool = True, *lead: int) -> Any:
    """Hidden states, weight, bias and labels; a quarter of the labels ignored."""
    lead = lead or (N,)
    labels = torch.randint(V, lead)
    labels.view(-1)[::4] = ignored
    return SimpleNamespace(
        hidden=torch.randn(*lead, H).to(dtype),
        weight=torch.randn(V, H).to(dtype),
        bias=torch.randn(V).to(dtype) if bias else None,
        labels=labels,
    )


def reduce(values: Tensor, reduction: str, divisor: Tensor | float) -> Tensor:
    return {"none": values, "sum": values.sum(), "mean": values.sum() / divisor}[reduction]


# --- Liger ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("smoothing", "z_weight", "softcap"), [(0, 0.0, None), (0.1, 1e-2, 5.0), (0.2, 0.0, None)]
)
def test_liger(
    dtype: torch.dtype,
    reduction: str,
    class_weights: bool,
    scaled: bool,
    smoothing: float,
    z_weight: float,
    softcap: float | None,
) -> None:
    x = case(dtype, ignored=42, bias=softcap is not None)
    classes = torch.rand(V) if class_weights else None
    module = LigerFusedLinearCrossEntropyLoss(
        ce_weight=classes,
        ignore_index=42,
        lse_square_scale=z_weight,
        label_smoothing=smoothing,
        reduction=reduction,
        softcap=softcap,
        return_z_loss=True,
        accum_dtype=torch.float32,
        use_token_scaling=scaled,
        return_token_accuracy=True,
        return_predicted_tokens=True,
    )

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        out = module(weight, hidden, x.labels, bias)
        assert isinstance(out, CrossEntropyOutput)
        assert out.predicted_tokens.dtype == torch.int64
        return out.loss, (out.z_loss, out.token_accuracy, out.predicted_tokens)

    def formula(how: Dense, **leaves: Tensor) -> Any:
        z = how.logits(leaves["hidden"], leaves["weight"], leaves.get("bias"), softcap)
        on = x.labels != 42
        safe = x.labels.where(on, 0)
        logprob = F.log_softmax(z, -1)
        c = torch.ones(V) if classes is None else classes
        c = c.to(z)
        of_label = logprob.gather(1, safe[:, None])[:, 0]
        ce = -(1 - smoothing) * c[safe] * of_label - smoothing / V * (c * logprob).sum(-1)
        z_loss = z_weight * torch.logsumexp(z, -1) ** 2
        factor = of_label.detach().exp() if scaled else torch.ones_like(of_label)
        ce, z_loss = ((y * factor).where(on, 0.0) for y in (ce, z_loss))
        loss = reduce(ce, reduction, c[x.labels[on]].sum())
        loss = loss + reduce(z_loss, reduction, on.sum())
        greedy = z.argmax(-1).where(on, -1)
        hits = (greedy == x.labels).to(z)
        accuracy = hits if reduction == "none" else hits.sum() / on.sum()
        return loss, (reduce(z_loss, reduction, on.sum()).detach(), accuracy, greedy)

    check(ours, formula, hidden=x.hidden, weight=x.weight, bias=x.bias)


def test_liger_returns_the_loss_alone_unless_asked() -> None:
    x = case(torch.float32)
    loss = LigerFusedLinearCrossEntropyLoss()(x.weight, x.hidden, x.labels, x.bias)
    assert torch.equal(loss, pk.linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias))
    out = liger_fused_linear_cross_entropy(
        x.hidden, x.weight, x.labels, x.bias, None, -100, 0.0, 0.0, "mean", None, False, None, False
    )
    assert torch.equal(out, loss)
    out = liger_fused_linear_cross_entropy(
        x.hidden, x.weight, x.labels, x.bias, return_token_accuracy=True
    )
    assert isinstance(out, CrossEntropyOutput)
    assert (out.z_loss, out.predicted_tokens) == (None, None)
    four = LigerFusedLinearCrossEntropyFunction.apply(x.hidden, x.weight, x.labels, x.bias)
    assert torch.equal(four[0], loss)
    assert four[1:] == (None, None, None)


@pytest.mark.parametrize("class_weights", [False, True])
def test_liger_without_labels(class_weights: bool) -> None:
    x = case(torch.float32)
    hidden = x.hidden.requires_grad_()
    module = LigerFusedLinearCrossEntropyLoss(
        torch.rand(V) if class_weights else None, label_smoothing=0.1, return_token_accuracy=True
    )
    out = module(x.weight, hidden, torch.full((N,), -100))
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.item() == out.token_accuracy.item() == 0
    assert not gradient.any()


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor, classes: Tensor) -> Any:
    return LigerFusedLinearCrossEntropyLoss(classes, label_smoothing=0.1)(weight, hidden, labels)


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    return torch_nn.linear_cross_entropy(
        hidden, weight, labels, weight=classes, label_smoothing=0.1
    )


@pytest.mark.parametrize("call", [liger_loss, torch_loss])
def test_mean_over_labels_without_weight(call: Callable[..., Tensor]) -> None:
    """Smoothing has other classes count, but there is nothing to divide by."""
    x = case(torch.float32)
    hidden, classes = x.hidden.requires_grad_(), torch.ones(V)
    classes[3] = 0
    loss = call(hidden, x.weight, torch.full((N,), 3), classes)
    assert loss == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_liger_under_autocast() -> None:
    x = case(torch.float32)
    plain = LigerFusedLinearCrossEntropyLoss(torch.rand(V), label_smoothing=0.1, softcap=9.0)
    expected = plain(x.weight, x.hidden, x.labels, x.bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = plain(x.weight, x.hidden, x.labels, x.bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert found != expected


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ce_weight": torch.ones(V + 1)}, ValueError, "ce_weight"),
        ({"ce_weight": torch.ones(V, dtype=torch.int64)}, TypeError, "ce_weight"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing"),
        ({"reduction": "batchmean"}, ValueError, "reduction"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"lse_square_scale": -1.0}, ValueError, "lse_square_scale"),
        ({"accum_dtype": torch.bfloat16}, ValueError, "accum_dtype"),
        ({"use_token_scaling": 1}, TypeError, "use_token_scaling"),
        ({"return_z_loss": None}, TypeError, "return_z_loss"),
        ({"return_token_accuracy": "no"}, TypeError, "return_token_accuracy"),
        ({"return_predicted_tokens": 0}, TypeError, "return_predicted_tokens"),
        ({"ignore_index": "pad"}, TypeError, "ignore_index"),
    ],
)
def test_bad_input_of_liger(change: dict[str, Any], error: type, words: str) -> None:
    x = case(torch.float32)
    with pytest.raises(error, match=words):
        LigerFusedLinearCrossEntropyLoss(**change)(x.weight, x.hidden, x.labels)


# --- Cut Cross-Entropy ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("shift", "softcap"), [(0, None), (True, 5.0), (2, None)])
def test_cce(
    dtype: torch.dtype, reduction: str, return_lse: bool, shift: int, softcap: float | None
) -> None:
    x = case(dtype, 7, softcap is not None, 3, 6)
    module = cce.LinearCrossEntropy(7, softcap, reduction, shift, return_lse=return_lse)
    steps = int(shift)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        out = module(hidden, weight, x.labels, bias)
        # The normalisers are differentiable: put them into the loss to see their gradients.
        return (out[0] + 0.1 * reduce(out[1], reduction, 7)) if return_lse else out

    def formula(how: Dense, **leaves: Tensor) -> Any:
        hidden, labels = leaves["hidden"][:, : 6 - steps], x.labels[:, steps:]
        z = how.logits(hidden, leaves["weight"], leaves.get("bias"), softcap)
        z = z.reshape(*labels.shape, V)
        on = labels != 7
        nll = F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none")
        loss = reduce(nll.reshape(labels.shape).where(on, 0.0), reduction, on.sum())
        lse = torch.logsumexp(z, -1).where(on, 0.0)
        return loss + (0.1 * reduce(lse, reduction, 7) if return_lse else 0.0), ()

    check(ours, formula, hidden=x.hidden, weight=x.weight, bias=x.bias)


def test_cce_lse_and_positions() -> None:
    x = case(torch.float32, -100, True, 2, 5)
    loss, lse = cce.linear_cross_entropy(
        x.hidden, x.weight, x.labels, x.bias, -100, None, "mean", 1, True
    )
    assert lse.shape == (2, 4)
    assert loss == cce.linear_cross_entropy(
        x.hidden, x.weight, x.labels, x.bias, shift=True, impl="torch_compile"
    )
    exact = torch.logsumexp(x.hidden @ x.weight.T + x.bias, -1)[:, :-1]
    torch.testing.assert_close(lse, exact.where(x.labels[:, 1:] != -100, 0.0))
    flat = cce.linear_cross_entropy(x.hidden[0, 0], x.weight, x.labels[0, 1], reduction="none")
    assert flat.dim() == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shift": 4}, ValueError, "shift"),
        ({"shift": -1}, ValueError, "shift"),
        ({"shift": 0.5}, TypeError, "shift"),
        ({"filter_eps": -1.0}, ValueError, "filter_eps"),
        ({"filter_eps": "high"}, ValueError, "filter_eps"),
        ({"accum_e_fp32": 1}, TypeError, "accum_e_fp32"),
        ({"filter_c_grad": None}, TypeError, "filter_c_grad"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"vocab_parallel_options": object()}, ValueError, "vocab_parallel_options"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"return_lse": 1}, TypeError, "return_lse"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"e": torch.zeros(2, 5, H)}, ValueError, "targets"),
        ({"c": torch.zeros(V, H + 1)}, ValueError, "c: "),
        ({"c": torch.zeros(V, H).double()}, TypeError, "c: expected e's dtype"),
        ({"bias": torch.zeros(V + 1)}, ValueError, "bias"),
        ({"bias": torch.zeros(V).half()}, TypeError, "bias: expected e's dtype"),
    ],
)
def test_bad_input_of_cce(change: dict[str, Any], error: type, words: str) -> None:
    good: dict[str, Any] = {
        "e": torch.zeros(2, 4, H),
        "c": torch.zeros(V, H),
        "targets": torch.zeros(2, 4, dtype=torch.int64),
    }
    cce.linear_cross_entropy(**good, filter_eps=None, impl=cce.LinearCrossEntropyImpl.CCE_EXACT)
    with pytest.raises(error, match=words):
        cce.linear_cross_entropy(**{**good, **change})


# --- torch ---


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_torch(dtype: torch.dtype, reduction: str, class_weights: bool, smoothing: float) -> None:
    x = case(dtype, 5, smoothing > 0)
    classes = torch.rand(V).to(dtype) if class_weights else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": 5}

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch_nn.linear_cross_entropy(
            hidden, weight, x.labels, linear_bias=bias, weight=classes, **options
        )

    def formula(how: Dense, **leaves: Tensor) -> Any:
        z = how.logits(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        c = None if classes is None else classes.to(z)
        return F.cross_entropy(z, x.labels, weight=c, **options), ()

    check(ours, formula, hidden=x.hidden, weight=x.weight, bias=x.bias)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 or later")
def test_same_as_torch() -> None:
    x = case(torch.float64, 5)
    for options in ({"ignore_index": 5}, {"weight": torch.rand(V).double(), "reduction": "sum"}):
        given = (x.hidden, x.weight, x.labels.where(x.labels != 5, 6))
        expected = F.linear_cross_entropy(*given, linear_bias=x.bias, **options)
        found = torch_nn.linear_cross_entropy(*given, linear_bias=x.bias, **options)
        torch.testing.assert_close(found, expected)
    one = torch_nn.linear_cross_entropy(x.hidden[0], x.weight, torch.tensor(3), reduction="none")
    torch.testing.assert_close(
        one, F.linear_cross_entropy(x.hidden[0], x.weight, torch.tensor(3), reduction="none")
    )


def options(**fields: Any) -> Any:
    """Torch's options where there are any, else something with the same fields."""
    kind = getattr(nn, "LinearCrossEntropyOptions", SimpleNamespace)
    names = ("batch_chunk_size", "chunking_method", "acc_policy", "acc_dtype")
    defaults = dict.fromkeys(names) if kind is SimpleNamespace else {}
    return kind(**{"allow_retain_graph": False, **defaults, **fields})


def test_torch_options() -> None:
    x = case(torch.float32)
    hidden = x.hidden.requires_grad_()
    given = (hidden, x.weight, x.labels)
    plain = torch_nn.linear_cross_entropy(*given)
    twice = torch_nn.linear_cross_entropy(*given, options=options(allow_retain_graph=True))
    once = torch_nn.linear_cross_entropy(*given, options=options())
    assert plain == once
    torch.testing.assert_close(plain, twice)
    (gradient,) = torch.autograd.grad(twice, hidden, retain_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(twice, hidden)[0])
    torch.autograd.grad(once, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="late"):
        torch.autograd.grad(once, hidden)
    torch_nn.linear_cross_entropy(
        *given, reduction="none", options=options(allow_retain_graph=True)
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"target": torch.rand(N, V)}, TypeError, "target: .*not probabilities"),
        ({"target": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, "target"),
        ({"linear_weight": torch.zeros(V, 2, H)}, ValueError, "linear_weight"),
        ({"linear_bias": torch.zeros(V, 2)}, ValueError, "linear_bias"),
        ({"weight": torch.ones(V - 1)}, ValueError, "weight"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ({"options": {"chunk": 1}}, TypeError, "options"),
        ({"options": options(acc_dtype=torch.bfloat16)}, ValueError, "acc_dtype"),
    ],
)
def test_bad_input_of_torch(change: dict[str, Any], error: type, words: str) -> None:
    good: dict[str, Any] = {
        "input": torch.zeros(N, H),
        "linear_weight": torch.zeros(V, H),
        "target": torch.zeros(N, dtype=torch.int64),
    }
    with pytest.raises(error, match=words):
        torch_nn.linear_cross_entropy(**{**good, **change})


# --- memory ---


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the size of the logits is made, class weights and smoothing included."""
    from pad_kernels.compat import _class_weights

    n, h, v = 128, 8, 6000
    monkeypatch.setattr(_class_weights, "_BLOCK", 1 << 16)
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    labels, classes = torch.randint(v, (n,)), torch.rand(v)
    calls = [
        lambda: cce.linear_cross_entropy(hidden, weight, labels, reduction=reduction),
        lambda: cce.linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, return_lse=True
        )[0],
        lambda: torch_nn.linear_cross_entropy(
            hidden, weight, labels, weight=classes, label_smoothing=0.1, reduction=reduction
        ),
        lambda: (
            LigerFusedLinearCrossEntropyLoss(
                classes, label_smoothing=0.1, softcap=9.0, return_z_loss=True, reduction=reduction
            )(weight, hidden, labels).loss
        ),
    ]
    for call in calls:
        with pk.workspace_limit(1 << 19), Fresh() as seen:
            call().sum().backward()
        assert v * h <= seen.largest < n * v / 4, "gradients of the weight, and nothing larger"
