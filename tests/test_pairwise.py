"""Pairwise, unpaired and reference-free preference losses against numbers worked out by hand.

The log-ratios are logarithms of small integers, so that every sigmoid is a simple fraction:
σ(ln k) = k / (k + 1).
"""

from __future__ import annotations

import math

import pytest
import torch

from pad_kernels.sequence import cpo_loss, kto_loss, orpo_loss, pairwise_preference_loss
from pad_kernels.sequence.pairwise import KINDS

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def column(*values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def one_pair():
    """c = ln 2 and r = −ln 2: with β = 1, σ(c) = 2/3, σ(r) = 1/3, σ(m) = σ(ln 4) = 4/5."""
    return column(-1.0), column(-2.0), column(-1.0 - LN2), column(-2.0 + LN2)


@pytest.mark.parametrize(
    ("kind", "options", "value"),
    [
        ("dpo", {}, 0.2231435513),  # −ln 4/5
        ("sigmoid", {}, 0.2231435513),
        ("sigmoid_norm", {}, 0.2231435513),
        ("dpo", {"label_smoothing": 0.25}, 0.5697171416),  # ¾·0.22314 − ¼·ln 1/5
        ("hinge", {"beta": 0.5}, 0.3068528194),  # 1 − ln 2
        ("hinge", {"beta": 1.0}, 0.0),  # 1 − ln 4 < 0
        ("ipo", {}, 0.7855176945),  # (ln 4 − 1/2)²
        ("ipo", {"beta": 0.5}, 0.1492233334),  # (ln 4 − 1)²
        ("robust", {}, 0.2231435513),
        ("robust", {"label_smoothing": 0.25}, -0.4700036292),  # (¾·0.22314 − ¼·1.60944) / ½
        ("exo_pair", {"label_smoothing": 0.2}, 0.0),  # (4/5, 1/5) is what is wanted
        ("exo_pair", {"label_smoothing": 0.1}, 0.0444030076),  # 4/5 ln 8/9 + 1/5 ln 2
        ("exo_pair", {}, 0.8819490325),  # 4/5 ln (0.8/0.999) + 1/5 ln 200
        ("nca_pair", {}, 1.1575038065),  # −ln 2/3 − ½ ln 1/3 − ½ ln 2/3
        ("bco_pair", {}, 0.8109302162),  # −2 ln 2/3
        ("bco_pair", {"reward_shift": LN2}, 0.9162907319),  # −ln 1/2 − ln 4/5
        ("sppo_hard", {}, 0.0746116667),  # 2 (ln 2 − 1/2)²
        ("apo_zero", {}, 0.6666666667),  # 1/3 + 1/3
        ("apo_down", {}, 0.8666666667),  # 2/3 + 1/5
        ("discopop", {"discopop_tau": 1.0}, 0.2446287103),  # 0.22314/5 + 1/4·4/5
        ("discopop", {"discopop_tau": 0.5}, 0.2484202089),  # 0.22314/17 + 1/4·16/17
        ("discopop", {}, 0.25),  # σ(20 ln 4) is 1 to 1e-12
        ("aot", {}, 0.2231435513),  # a batch of one is sorted already
        ("aot_unpaired", {}, 0.2231435513),
    ],
)
def test_one_pair(kind, options, value):
    out = pairwise_preference_loss(*one_pair(), kind=kind, **{"beta": 1.0, **options})
    assert out.loss.item() == pytest.approx(value, abs=5e-10)
    beta = options.get("beta", 1.0)
    assert out.chosen_rewards.tolist() == pytest.approx([beta * LN2])
    assert out.rejected_rewards.tolist() == pytest.approx([-beta * LN2])


def test_simpo():
    chosen, rejected = column(-1.0), column(-1.0 - LN3)
    out = pairwise_preference_loss(chosen, rejected, kind="simpo", beta=2.0, gamma=LN3)
    assert out.loss.item() == pytest.approx(0.2876820724)  # −ln σ(2 ln 3 − ln 3) = −ln 3/4
    assert out.chosen_rewards.item() == -2.0
    default = pairwise_preference_loss(chosen, chosen, kind="simpo", beta=2.0)
    assert default.loss.item() == pytest.approx(0.9740769842)  # ln(1 + e^½)
    smooth = pairwise_preference_loss(
        chosen, rejected, kind="simpo", beta=2.0, gamma=LN3, label_smoothing=0.25
    )
    assert smooth.loss.item() == pytest.approx(0.75 * 0.2876820724 + 0.25 * 1.3862943611)


def two_pairs():
    """Policy gaps 0 and ln 4, reference gaps ln 2 and 0; c = ln 2, 0 and r = ln 4, −ln 4."""
    return (
        column(-1.0, -1.0),
        column(-1.0, -1.0 - LN4),
        column(-1.0 - LN2, -1.0),
        column(-1.0 - LN4, -1.0),
    )


def test_aot_compares_quantiles():
    # Sorted gaps (0, ln 4) against (0, ln 2): −ln 1/2 and −ln 2/3. Unsorted they are −ln 2, ln 4.
    for name in ("aot", "aot_pair"):
        out = pairwise_preference_loss(*two_pairs(), kind=name, beta=1.0, reduction="none")
        assert out.loss.tolist() == pytest.approx([0.6931471806, 0.4054651081])
    # Sorted (0, ln 2) against (−ln 4, ln 4): −ln 4/5 and −ln 1/3.
    out = pairwise_preference_loss(*two_pairs(), kind="aot_unpaired", beta=1.0, reduction="none")
    assert out.loss.tolist() == pytest.approx([0.2231435513, 1.0986122887])
    smooth = pairwise_preference_loss(*two_pairs(), kind="aot", beta=1.0, label_smoothing=0.1)
    # 0.9·(ln 2 + ln 3/2)/2 + 0.1·(ln 2 + ln 3)/2
    assert smooth.loss.item() == pytest.approx(0.9 * 0.5493061443 + 0.1 * 0.8958797347)


def test_reductions():
    each = pairwise_preference_loss(*two_pairs(), beta=1.0, reduction="none").loss
    # m = −ln 2 and ln 4
    assert each.tolist() == pytest.approx([1.0986122887, 0.2231435513])
    for name, value in (("mean", 0.66087792), ("sum", 1.32175584)):
        out = pairwise_preference_loss(*two_pairs(), beta=1.0, reduction=name)
        assert out.loss.item() == pytest.approx(value)
    nothing = torch.zeros(0, requires_grad=True)
    empty = pairwise_preference_loss(nothing, torch.zeros(0), torch.zeros(0), torch.zeros(0))
    empty.loss.backward()
    assert empty.loss.item() == 0


def reference(kind, pairs=4):
    if kind == "simpo":
        return ()
    return tuple(torch.randn(pairs, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ref = reference(kind)
    assert torch.autograd.gradcheck(
        lambda a, b: pairwise_preference_loss(a, b, *ref, kind=kind, beta=0.7).loss,
        (chosen, rejected),
    )
    out = pairwise_preference_loss(chosen, rejected, *ref, kind=kind)
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_margins_stay_finite(kind, sign):
    chosen = torch.full((2,), 1e4 * sign, requires_grad=True)
    rejected = torch.full((2,), -1e4 * sign, requires_grad=True)
    ref = () if kind == "simpo" else (torch.zeros(2), torch.zeros(2))
    loss = pairwise_preference_loss(chosen, rejected, *ref, kind=kind, beta=0.5).loss
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    if kind in ("dpo", "sigmoid", "hinge", "simpo", "robust"):
        # All of these are the margin itself on the wrong side, and nothing on the right one.
        assert loss.item() == pytest.approx(0.0 if sign > 0 else 1e4, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(dtype):
    tensors = [(-10 * torch.rand(8)).to(dtype) for _ in range(4)]
    out = pairwise_preference_loss(*tensors)
    assert {x.dtype for x in out} == {torch.float32}
    exact = pairwise_preference_loss(*(x.double() for x in tensors))
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)
    tensors[0].requires_grad_()
    pairwise_preference_loss(*tensors).loss.backward()
    assert tensors[0].grad.dtype == dtype


@pytest.mark.parametrize("function", ["pairwise", "kto", "orpo", "cpo"])
def test_compiled(function):
    a, b = -torch.rand(4), -torch.rand(4)
    call = {
        "pairwise": lambda x: pairwise_preference_loss(x, b, b, b).loss,
        "kto": lambda x: kto_loss(x, b, b > -0.5, kl_logprob=b, kl_ref_logprob=b).loss,
        "orpo": lambda x: orpo_loss(x, b).loss,
        "cpo": lambda x: cpo_loss(x, b, -x.mean()).loss,
    }[function]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(a), call(a))


# --- KTO ------------------------------------------------------------------------------------------


def test_kto():
    # z0 = mean(ln 4, 0) = ln 2. Desirable: σ(−(ln 6 − ln 2)) = 1/4; undesirable: σ(−(ln 2 + ln 2)).
    tensors = column(math.log(6), -LN2), column(0.0, 0.0), torch.tensor([True, False])
    kl = {"kl_logprob": column(LN4, 1.0), "kl_ref_logprob": column(0.0, 1.0)}
    out = kto_loss(*tensors, **kl, beta=1.0, reduction="none")
    assert out.loss.tolist() == pytest.approx([0.25, 0.2])
    assert out.kl.item() == pytest.approx(LN2)
    assert out.rewards.tolist() == pytest.approx([math.log(6), -LN2])
    weighted = kto_loss(*tensors, **kl, beta=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    assert weighted.loss.item() == pytest.approx(0.55)
    for given in (LN2, torch.tensor(LN2, dtype=torch.float64)):
        same = kto_loss(*tensors, kl=given, beta=1.0, reduction="sum")
        assert same.loss.item() == pytest.approx(0.45)


def test_kto_reference_point_is_never_negative_and_has_no_gradient():
    tensors = column(LN2), column(0.0), torch.tensor([True])
    low = kto_loss(*tensors, kl_logprob=column(-5.0), kl_ref_logprob=column(0.0), beta=1.0)
    assert low.kl.item() == 0 and low.loss.item() == pytest.approx(1 / 3)
    assert kto_loss(*tensors, kl=torch.tensor(-1.0), beta=1.0).kl.item() == 0
    kl = column(1.0, requires_grad=True)
    logprob = column(LN2, requires_grad=True)
    kto_loss(logprob, *tensors[1:], kl_logprob=kl, kl_ref_logprob=column(0.0)).loss.backward()
    assert kl.grad is None and logprob.grad is not None


def test_kto_without_reference_point():
    tensors = column(LN2, LN3), column(0.0, 0.0), torch.tensor([True, False])
    out = kto_loss(*tensors, kind="apo_zero_unpaired", beta=1.0, reduction="none")
    assert out.loss.tolist() == pytest.approx([1 / 3, 3 / 4]) and out.kl.item() == 0


def test_kto_gradient():
    logprob = torch.randn(5, dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, False, True, True])
    ref = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: kto_loss(x, ref, desirable, kl=0.3, beta=0.7, undesirable_weight=2.0).loss,
        (logprob,),
    )


# --- ORPO -----------------------------------------------------------------------------------------


def test_orpo():
    # p = 1/2 has odds 1, p = 1/4 has odds 1/3: σ(ln 3) = 3/4.
    chosen, rejected = column(-LN2), column(-LN4)
    out = orpo_loss(chosen, rejected)
    assert out.loss.item() == pytest.approx(0.7219153878)  # ln 2 − 0.1 ln 3/4
    assert out.log_odds.item() == pytest.approx(LN3)
    assert out.chosen_rewards.item() == pytest.approx(-0.1 * LN2)
    given = orpo_loss(chosen, rejected, torch.tensor(2.0), beta=1.0)
    assert given.loss.item() == pytest.approx(2.2876820724)
    pairs = orpo_loss(
        column(-LN2, -LN4), column(-LN4, -LN2), column(1.0, 2.0), beta=1.0, reduction="none"
    )
    assert pairs.loss.tolist() == pytest.approx([1.2876820724, 3.3862943611])  # −ln 3/4, −ln 1/4


def test_orpo_gradient_and_extremes():
    chosen, rejected = (-torch.rand(4, dtype=torch.float64) - 0.01 for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda a, b: orpo_loss(a, b, beta=0.7).loss,
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )
    for a, b in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-30, -1e4), (-1e4, -1e-30)):
        x, y = torch.tensor([a], requires_grad=True), torch.tensor([b], requires_grad=True)
        loss = orpo_loss(x, y).loss
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and y.grad.isfinite().all(), (a, b)


def test_orpo_near_certainty_does_not_cancel():
    # 1 − exp(−1e-6) is 1e-6 − 5e-13: in float32, 1 − exp would be off by 5 %.
    out = orpo_loss(torch.tensor([-1e-6]), torch.tensor([-LN2]))
    assert out.log_odds.item() == pytest.approx(-1e-6 - math.log(1e-6 - 5e-13), rel=1e-6)


# --- CPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, 3.4054651081),  # −ln σ(ln 2) + 2 · 1.5
        ({"label_smoothing": 0.25}, 3.5787519033),  # ¾·ln 3/2 + ¼·ln 3 + 3
        ({"kind": "hinge"}, 3.3068528194),  # 1 − ln 2 + 3
        ({"kind": "ipo"}, 3.1492233334),  # (ln 4 − 1)² + 3
        ({"kind": "simpo", "gamma": LN2}, 3.6931471806),  # −ln σ(0) + 3
        ({"kind": "simpo"}, 3.6012295889),  # ln(1 + e^(½ − ln 2)) + 3
    ],
)
def test_cpo(options, value):
    chosen, rejected = column(-2.0), column(-2.0 - LN4)
    nll = torch.tensor(1.5)
    out = cpo_loss(chosen, rejected, nll, beta=0.5, nll_weight=2.0, **options)
    assert out.loss.item() == pytest.approx(value, abs=5e-10)
    assert out.chosen_rewards.item() == -1.0
    alone = cpo_loss(chosen, rejected, beta=0.5, nll_weight=0.0, **options)
    assert alone.loss.item() == pytest.approx(value - 3.0, abs=5e-10)


def test_cpo_of_an_impossible_response_is_that_of_dpo():
    impossible, zero = column(-math.inf), column(0.0)
    assert pairwise_preference_loss(column(-2.0), impossible, zero, zero).loss == 0
    assert cpo_loss(column(-2.0), impossible, nll_weight=0.0).loss == 0


def test_cpo_gradient():
    tensors = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for kind in ("sigmoid", "hinge", "ipo", "simpo"):
        assert torch.autograd.gradcheck(
            lambda a, b, c, k=kind: cpo_loss(a, b, c, kind=k, beta=0.7).loss, tensors
        )


# --- what is refused ------------------------------------------------------------------------------


def vector(**options):
    return -torch.ones(3, **options)


GOOD = {
    pairwise_preference_loss: {
        name: vector() for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")
    },
    kto_loss: {
        "logprob": vector(),
        "ref_logprob": vector(),
        "desirable": torch.ones(3, dtype=torch.bool),
        "kl": 0.0,
    },
    orpo_loss: {"chosen": vector(), "rejected": vector()},
    cpo_loss: {"chosen": vector(), "rejected": vector(), "chosen_nll": torch.tensor(1.0)},
}
TENSORS = [(f, name) for f, given in GOOD.items() for name, x in given.items() if name != "kl"]
NUMBERS = [
    (f, name)
    for f, names in {
        pairwise_preference_loss: ("beta",),
        kto_loss: ("beta", "desirable_weight", "undesirable_weight", "kl"),
        orpo_loss: ("beta",),
        cpo_loss: ("beta", "nll_weight", "label_smoothing"),
    }.items()
    for name in names
]


def case(x):
    return x.__name__ if callable(x) else None


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=case)
def test_bad_tensors(function, name):
    for wrong, error in (
        ([1.0, 2.0, 3.0], TypeError),
        (torch.zeros(3, dtype=torch.int64), TypeError),
        (torch.zeros(3).to_sparse(), TypeError),
        (GOOD[function][name].to("meta"), ValueError),
        (GOOD[function][name].new_zeros(4), ValueError),
    ):
        # A first argument of another shape or device is what the others are then measured by.
        with pytest.raises(error, match=name if isinstance(wrong, list) else ":"):
            function(**{**GOOD[function], name: wrong})


@pytest.mark.parametrize(("function", "name"), NUMBERS, ids=case)
def test_bad_numbers(function, name):
    for wrong, error in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=name):
            function(**{**GOOD[function], name: wrong})
    for choice in ("reduction", "kind") if function is not orpo_loss else ("reduction",):
        with pytest.raises(ValueError, match=choice):
            function(**{**GOOD[function], choice: "neither"})


REFUSED = [
    (pairwise_preference_loss, {"ref_chosen": None}, TypeError, "ref_chosen"),
    (pairwise_preference_loss, {"kind": "simpo"}, ValueError, "ref_chosen.*no reference"),
    (pairwise_preference_loss, {"ref_rejected": vector(requires_grad=True)}, ValueError, "grad"),
    (pairwise_preference_loss, {"kind": "ipo", "label_smoothing": 0.1}, ValueError, "label_smooth"),
    (pairwise_preference_loss, {"label_smoothing": 0.5}, ValueError, "label_smoothing"),
    (pairwise_preference_loss, {"gamma": 1.0}, ValueError, "gamma.*simpo"),
    (pairwise_preference_loss, {"discopop_tau": 0.1}, ValueError, "discopop_tau"),
    (pairwise_preference_loss, {"kind": "discopop", "discopop_tau": 0.0}, ValueError, "tau"),
    (pairwise_preference_loss, {"reward_shift": 0.1}, ValueError, "reward_shift.*bco_pair"),
    (kto_loss, {"kl": None}, TypeError, "kl_logprob"),
    (kto_loss, {"kl": None, "kl_logprob": vector()}, TypeError, "kl_ref_logprob"),
    (kto_loss, {"kl_logprob": vector()}, ValueError, "kl: expected None"),
    (kto_loss, {"kl": torch.zeros(2)}, ValueError, "kl"),
    (kto_loss, {"kind": "apo_zero_unpaired"}, ValueError, "kl: expected None"),
    (
        kto_loss,
        {"kl": None, "kl_logprob": vector(), "kl_ref_logprob": torch.zeros(2)},
        ValueError,
        "kl_ref_logprob",
    ),
    (kto_loss, {"ref_logprob": vector(requires_grad=True)}, ValueError, "ref_logprob"),
    (orpo_loss, {"chosen": torch.ones(3)}, ValueError, "chosen.*at most 0"),
    (orpo_loss, {"rejected": torch.ones(3)}, ValueError, "rejected.*at most 0"),
    (orpo_loss, {"chosen_nll": torch.zeros(2)}, ValueError, "chosen_nll"),
    (orpo_loss, {"chosen_nll": 1.0}, TypeError, "chosen_nll"),
    (cpo_loss, {"chosen_nll": None}, TypeError, "chosen_nll"),
    (cpo_loss, {"kind": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing"),
    (cpo_loss, {"gamma": 0.1}, ValueError, "gamma"),
    (cpo_loss, {"kind": "simpo", "gamma": -0.1}, ValueError, "gamma"),
]


@pytest.mark.parametrize(("function", "change", "error", "match"), REFUSED, ids=case)
def test_refused(function, change, error, match):
    with pytest.raises(error, match=match):
        function(**{**GOOD[function], **change})


def test_kto_keeps_the_digits_of_float64():
    beta, good, bad = 0.1, 0.7, 1.3  # none of them is a float32
    ratio = column(0.4, -0.9)
    out = kto_loss(
        ratio,
        torch.zeros_like(ratio),
        torch.tensor([True, False]),
        kl=0.0,
        beta=beta,
        desirable_weight=good,
        undesirable_weight=bad,
        reduction="none",
    )
    expected = column(good / (1 + math.exp(beta * 0.4)), bad / (1 + math.exp(beta * 0.9)))
    torch.testing.assert_close(out.loss, expected, rtol=1e-14, atol=0)
