"""Liger's chunked preference losses: values, gradients and metrics against dense formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compat_cases import Fresh, check
from oracles import Dense
from torch import Tensor

import pad_kernels as pk
from pad_kernels.compat.liger import chunked_loss as liger
from pad_kernels.compat.liger.chunked_loss import _sequences, functional

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS, T, H, V, BETA = 3, 5, 8, 37, 0.3
DTYPES = [torch.float32, torch.bfloat16]


def batch(dtype: torch.dtype, bias: bool = True, ignore_index: int = -100) -> dict[str, Any]:
    """Hidden states, weights, bias and labels of student and reference; some labels ignored."""
    target = torch.randint(V, (2 * PAIRS, T))
    target[torch.rand(target.shape) < 0.3] = ignore_index
    target[:, 1] = 3  # no response is empty
    return {
        "hidden": torch.randn(2 * PAIRS, T, H).to(dtype),
        "weight": torch.randn(V, H).to(dtype),
        "bias": torch.randn(V).to(dtype) if bias else None,
        "target": target,
        "ref_input": torch.randn(2 * PAIRS, T, H + 2).to(dtype),
        "ref_weight": torch.randn(V, H + 2).to(dtype).requires_grad_(),
        "ref_bias": torch.randn(V).to(dtype) if bias else None,
        "ignore_index": ignore_index,
    }


def token_logprobs(
    how: Dense, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each label [B, T] (0 where ignored), the mask, and logits [B, T, V]."""
    z = how.logits(hidden, weight, bias).reshape(*target.shape, V)
    on = target != ignored
    logprob = F.log_softmax(z, -1).gather(-1, target.where(on, 0)[..., None])[..., 0]
    return logprob.where(on, 0.0), on, z


def sequences(how: Dense, x: dict[str, Any], leaves: dict[str, Any], average: bool) -> Any:
    """(log-probs [B], the reference's, NLL of the chosen half, mean logits of either half)."""
    head = (leaves["hidden"], leaves["weight"], leaves.get("bias"))
    logprob, on, z = token_logprobs(how, *head, x["target"], x["ignore_index"])
    reference = [how.leaf(x[name], False) for name in ("ref_input", "ref_weight", "ref_bias")]
    ref, _, _ = token_logprobs(how, *reference, x["target"], x["ignore_index"])
    length = on.sum(-1) if average else 1
    nll = -logprob[:PAIRS].sum() / on[:PAIRS].sum()
    logits = (z[:PAIRS].mean(), z[PAIRS:].mean())
    return logprob.sum(-1) / length, ref.sum(-1) / length, nll, logits


def metrics(
    logprob: Tensor, logits: Any, nll: Tensor, beta: float, against: Tensor | float = 0.0
) -> tuple[Tensor, ...]:
    rewards = beta * (logprob - against)
    return (logprob[:PAIRS], logprob[PAIRS:], *logits, nll, rewards[:PAIRS], rewards[PAIRS:])


def logistic(m: Tensor, smoothing: float = 0.0) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(m) - smoothing * F.logsigmoid(-m)


def exo(m: Tensor, epsilon: float) -> Tensor:
    win, lose = torch.sigmoid(m), torch.sigmoid(-m)
    return win * (win.log() - math.log(1 - epsilon)) + lose * (lose.log() - math.log(epsilon))


def robust(m: Tensor, epsilon: float) -> Tensor:
    loss = -(1 - epsilon) * F.logsigmoid(m) + epsilon * F.logsigmoid(-m)
    return loss / (1 - 2 * epsilon)


def discopop(m: Tensor, tau: float) -> Tensor:
    gate = torch.sigmoid(m / tau)
    return -F.logsigmoid(m) * (1 - gate) + torch.exp(-m) * gate


def nca(c: Tensor, r: Tensor) -> Tensor:
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


#: loss_type -> (options, loss of the rewards beta * log-ratio of a chosen and a rejected response)
DPO: dict[str, tuple[dict[str, float], Any]] = {
    "sigmoid": ({"label_smoothing": 0.1}, lambda c, r: logistic(c - r, 0.1)),
    "hinge": ({}, lambda c, r: (1 - c + r).relu()),
    "exo_pair": ({"label_smoothing": 0.01}, lambda c, r: exo(c - r, 0.01)),
    "nca_pair": ({}, nca),
    "robust": ({"label_smoothing": 0.2}, lambda c, r: robust(c - r, 0.2)),
    "bco_pair": ({}, lambda c, r: -F.logsigmoid(c) - F.logsigmoid(-r)),
    "sppo_hard": ({}, lambda c, r: ((c - 0.5) / BETA) ** 2 + ((r + 0.5) / BETA) ** 2),
    "apo_zero": ({}, lambda c, r: 1 - torch.sigmoid(c) + torch.sigmoid(r)),
    "apo_down": ({}, lambda c, r: torch.sigmoid(c) + 1 - torch.sigmoid(c - r)),
    "discopop": ({"discopop_tau": 0.5}, lambda c, r: discopop(c - r, 0.5)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_type", DPO)
def test_dpo(loss_type: str, dtype: torch.dtype) -> None:
    x = batch(dtype, bias=loss_type != "hinge", ignore_index=42 if loss_type == "robust" else -100)
    if dtype == torch.bfloat16:
        x["hidden"] = x["hidden"] * 0.25  # flat enough for exp(-m) and logs of probabilities
    options, loss_of = DPO[loss_type]
    average = loss_type in ("exo_pair", "discopop")
    module = liger.LigerFusedLinearDPOLoss(
        ignore_index=x["ignore_index"],
        beta=BETA,
        alpha=0.7,
        compute_nll_loss=True,
        average_log_prob=average,
        chunk_size=2,
        loss_type=loss_type,
        **options,
    )

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        reference = (x["ref_input"], x["ref_weight"], x["ref_bias"])
        return module(weight, hidden, x["target"], bias, *reference)

    def formula(how: Dense, **leaves: Tensor) -> Any:
        logprob, ref, nll, logits = sequences(how, x, leaves, average)
        rewards = BETA * (logprob - ref)
        loss = loss_of(rewards[:PAIRS], rewards[PAIRS:]).mean() + 0.7 * nll
        return loss, metrics(logprob, logits, nll, BETA, ref)

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])
    assert x["ref_weight"].grad is None


def test_dpo_without_a_reference_or_nll() -> None:
    x = batch(torch.float32)
    module = liger.LigerFusedLinearDPOLoss(use_ref_model=False)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return module(weight, hidden, x["target"], bias)

    def formula(how: Dense, **leaves: Tensor) -> Any:
        logprob, _, nll, logits = sequences(how, x, leaves, False)
        loss = logistic(0.1 * (logprob[:PAIRS] - logprob[PAIRS:])).mean()
        return loss, metrics(logprob, logits, 0 * nll, 0.1)

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("compute_nll", "average"), [(True, False), (False, True)])
def test_cpo(dtype: torch.dtype, smoothing: float, compute_nll: bool, average: bool) -> None:
    x = batch(dtype, bias=average)
    module = liger.LigerFusedLinearCPOLoss(
        beta=BETA,
        alpha=1.5,
        label_smoothing=smoothing,
        compute_nll_loss=compute_nll,
        average_log_prob=average,
    )

    def formula(how: Dense, **leaves: Tensor) -> Any:
        logprob, _, nll, logits = sequences(how, x, leaves, average)
        nll = nll if compute_nll else 0 * nll
        loss = logistic(BETA * (logprob[:PAIRS] - logprob[PAIRS:]), smoothing).mean()
        return loss + 1.5 * nll, metrics(logprob, logits, nll, BETA)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return module(weight, hidden, x["target"], bias)

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(dtype: torch.dtype, smoothing: float) -> None:
    x = batch(dtype, ignore_index=7)
    module = liger.LigerFusedLinearSimPOLoss(
        ignore_index=7, beta=2.0, alpha=0.5, label_smoothing=smoothing, gamma=0.8
    )

    def formula(how: Dense, **leaves: Tensor) -> Any:
        logprob, _, nll, logits = sequences(how, x, leaves, True)
        margin = 2.0 * (logprob[:PAIRS] - logprob[PAIRS:]) - 0.8
        loss = logistic(margin, smoothing).mean() + 0.5 * nll
        return loss, metrics(logprob, logits, nll, 2.0)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return module(weight, hidden, x["target"], bias)

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other_nll", [False, True])
def test_orpo(dtype: torch.dtype, other_nll: bool) -> None:
    x = batch(dtype)
    nll_target = torch.randint(V, (2 * PAIRS, T))
    nll_target[0, 2:] = -100
    module = liger.LigerFusedLinearORPOLoss(beta=BETA)

    def formula(how: Dense, **leaves: Tensor) -> Any:
        logprob, _, nll, logits = sequences(how, x, leaves, True)
        if other_nll:
            head = (leaves["hidden"], leaves["weight"], leaves.get("bias"))
            tokens, on, _ = token_logprobs(how, *head, nll_target, -100)
            nll = -tokens[:PAIRS].sum() / on[:PAIRS].sum()
        odds = logprob - torch.log1p(-logprob.exp())
        odds = odds[:PAIRS] - odds[PAIRS:]
        loss = nll - BETA * F.logsigmoid(odds).mean()
        means = (F.logsigmoid(odds).mean(), odds.mean())
        return loss, (*metrics(logprob, logits, nll, BETA), *means)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return module(weight, hidden, x["target"], bias, nll_target if other_nll else None)

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", [None, -0.7, "one", "each"])
@pytest.mark.parametrize("average", [False, True])
def test_kto(dtype: torch.dtype, kl: Any, average: bool) -> None:
    x = batch(dtype)
    good = torch.tensor([True, False, False, True, True, False])
    if isinstance(kl, str):
        kl = torch.randn(1 if kl == "one" else 2 * PAIRS).to(dtype)
    module = liger.LigerFusedLinearKTOLoss(
        beta=BETA, use_ref_model=True, average_log_prob=average, chunk_size=4
    )

    def formula(how: Dense, **leaves: Tensor) -> Any:
        logprob, ref, _, _ = sequences(how, x, leaves, average)
        z = how.logits(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        logits = z.reshape(2 * PAIRS, -1).sum(-1)
        point = 0.0 if kl is None else kl.to(logprob) if isinstance(kl, Tensor) else kl
        sign = torch.where(good, 1.0, -1.0).to(logprob)
        loss = (1 - torch.sigmoid(BETA * sign * (logprob - ref - point))).mean()
        columns = (logprob, logits, BETA * (logprob - ref))
        return loss, tuple(c[of].sum() for c in columns for of in (good, ~good))

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        reference = (x["ref_input"], x["ref_weight"], x["ref_bias"])
        return module(hidden, weight, x["target"], bias, good, *reference, kl)

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])


def test_kto_without_a_reference() -> None:
    x, good = batch(torch.float32), torch.tensor([True, False] * PAIRS)

    def formula(how: Dense, **leaves: Tensor) -> Any:
        logprob, _, _, _ = sequences(how, x, leaves, False)
        sign = torch.where(good, 1.0, -1.0).to(logprob)
        return (1 - torch.sigmoid(0.1 * sign * logprob)).mean(), ()

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        module = liger.LigerFusedLinearKTOLoss()
        return module(hidden, weight, x["target"], bias, preference_labels=good)[0]

    check(ours, formula, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])


def test_functions_take_positions() -> None:
    """The order of an autograd function's arguments is part of the signature."""
    x = batch(torch.float32)
    head = (x["hidden"], x["weight"], x["target"], x["bias"])
    reference = (x["ref_input"], x["ref_weight"], x["ref_bias"])
    swapped = (head[1], head[0], *head[2:])
    good = torch.tensor([True, False] * PAIRS)
    dpo = functional.liger_fused_linear_dpo(
        *head, *reference, -100, BETA, True, False, True, True, 1, "robust", 0.1, 0.05, 0.7
    )
    module = liger.LigerFusedLinearDPOLoss(
        -100, BETA, 0.7, True, False, True, True, 1, "robust", 0.1, 0.05
    )
    cpo = functional.liger_fused_linear_cpo(*head, -100, BETA, 0.7, 0.1, False, True, True, 1)
    simpo = functional.liger_fused_linear_simpo(*head, -100, BETA, 0.7, 0.1, True, True, 0.2, 1)
    orpo = functional.liger_fused_linear_orpo(*head, -100, BETA, False, None, True, 1)
    kto = functional.liger_fused_linear_kto(
        *head[:3], good, head[3], *reference, None, -100, BETA, True, True, True, 1
    )
    pairs = [
        (dpo, module(*swapped, *reference)),
        (cpo, liger.LigerFusedLinearCPOLoss(-100, BETA, 0.7, 0.1, False, True, True)(*swapped)),
        (
            simpo,
            liger.LigerFusedLinearSimPOLoss(-100, BETA, 0.7, 0.1, True, True, 0.2)(*swapped),
        ),
        (orpo, liger.LigerFusedLinearORPOLoss(-100, BETA, False)(*swapped)),
        (
            kto,
            liger.LigerFusedLinearKTOLoss(-100, BETA, True, True, True)(
                *head, good, *reference, None
            ),
        ),
    ]
    for (loss, rest), (again, others) in pairs:
        torch.testing.assert_close((loss, *rest), (again, *others), rtol=0, atol=0)
    # Defaults that differ between a function and its module.
    plain = functional.liger_fused_linear_simpo(*head)[0]
    assert plain == liger.LigerFusedLinearSimPOLoss(compute_nll_loss=False)(*swapped)[0]
    assert plain != liger.LigerFusedLinearSimPOLoss()(*swapped)[0]


def test_responses_without_tokens_are_worth_nothing() -> None:
    """Where a mean over no tokens is NaN in Liger it is 0 here, and so is an NLL over none."""
    x = batch(torch.float32)
    target = torch.full_like(x["target"], -100)
    loss, aux = liger.LigerFusedLinearCPOLoss(average_log_prob=True)(
        x["weight"], x["hidden"], target, x["bias"]
    )
    assert round(float(loss), 6) == round(math.log(2), 6)
    assert all(float(aux[i].abs().sum()) == 0 for i in (0, 1, 4))


def test_summed_logits_of_a_wide_vocabulary() -> None:
    """More rows than are cast at a time, and bfloat16 rows that a bfloat16 sum would lose."""
    v = 2 * _sequences._WEIGHT_ROWS + 3
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    weight, bias = torch.randn(v, 4, dtype=torch.bfloat16), torch.ones(v, dtype=torch.bfloat16)
    found = _sequences.summed_logits(hidden, weight, bias)
    exact = (hidden.double() @ weight.double().T + 1).sum((1, 2))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0.5)


def test_a_backward_twice_is_allowed() -> None:
    x = batch(torch.float32)
    hidden = x["hidden"].requires_grad_()
    loss, _ = liger.LigerFusedLinearCPOLoss()(x["weight"], hidden, x["target"])
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_no_logits_and_no_copy_of_the_weight() -> None:
    """Nothing of the size of the logits or of a weight is made around the ops."""
    n, h, v = 2 * 64, 16, 3 * _sequences._WEIGHT_ROWS
    hidden = torch.randn(2, 64, h, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, h, dtype=torch.bfloat16)
    target = torch.randint(v, (2, 64))
    with pk.workspace_limit(2 << 20), Fresh() as seen:
        module = liger.LigerFusedLinearDPOLoss(compute_nll_loss=True)
        module(weight, hidden, target, None, hidden.detach(), weight)[0].backward()
    assert seen.largest < min(n * v, weight.numel())
