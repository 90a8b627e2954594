"""Finite differences in float64: every one-head op, every schedule, every differentiable input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pad_kernels as pk

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, VOCAB, HIDDEN = 4, 7, 3
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 2.5, "logit_scale": 1.4, "temperature": 0.8, "vocab_size": 6},
    "negative": {"logit_scale": -0.7},
}


def _plan(route: str, tokens: int = TOKENS) -> pk.PlanRequest:
    schedule, backend = route.split(":")
    if backend == "cpp" and pk.available_backends()["cpp"] != "available":
        pytest.skip("the extension is not built")
    kept = {"kept": tokens, "partly": 2}.get(schedule)
    schedule = "kept" if schedule == "partly" else schedule
    return pk.PlanRequest(schedule, backend, token_block=3, vocab_block=4, kept_rows=kept)


BACKENDS = ["cpp", "torch_blocked"]
LATE = [f"{s}:{b}" for s in ("late", "kept", "partly") for b in BACKENDS] + ["late:reference"]
EARLY = [f"early:{b}" for b in BACKENDS]

every_head = pytest.mark.parametrize("head", HEADS)


def _leaves() -> list[Tensor]:
    double = torch.float64
    shapes = [(TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    return [torch.randn(*shape, dtype=double, requires_grad=True) for shape in shapes]


def _labels() -> Tensor:
    return torch.tensor([3, 0, -100, 5])


def _gradcheck(op: Callable[..., Any], *more: Tensor, early: bool = False) -> None:
    _check(op, [*_leaves(), *more], early)


def _check(op: Callable[..., Any], leaves: list[Tensor], early: bool) -> None:
    if not early:
        assert torch.autograd.gradcheck(op, leaves, fast_mode=False)
        return
    # gradcheck goes backward twice, which an early plan refuses.
    wanted = [x for x in leaves if x.requires_grad]
    for leaf, found in zip(wanted, torch.autograd.grad(op(*leaves), wanted), strict=True):
        flat, step = leaf.detach().reshape(-1), 1e-6
        for i, slope in enumerate(found.reshape(-1).tolist()):
            ends = []
            for sign in (step, -2 * step):
                flat[i] += sign
                ends.append(float(op(*leaves).detach()))
            flat[i] += step
            assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 1e-7 + 1e-4 * abs(slope)


@every_head
@pytest.mark.parametrize("route", LATE)
def test_logprob(route: str, head: str) -> None:
    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = HEADS[head]
        return pk.linear_logprob(hidden, weight, _labels(), bias=bias, plan=_plan(route), **options)

    _gradcheck(op)


@every_head
@pytest.mark.parametrize("route", LATE)
def test_token_stats(route: str, head: str) -> None:
    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        options = HEADS[head]
        return pk.linear_token_stats(
            hidden, weight, _labels(), bias=bias, plan=_plan(route), **options
        )[:3]

    _gradcheck(op)


@every_head
@pytest.mark.parametrize("route", LATE)
@pytest.mark.parametrize("shared", [True, False])
def test_option_logprobs(route: str, head: str, shared: bool) -> None:
    ids = torch.tensor([1, 4, 1]) if shared else torch.randint(6, (TOKENS, 2))

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = HEADS[head]
        return pk.option_logprobs(hidden, weight, ids, bias=bias, plan=_plan(route), **options)

    _gradcheck(op)


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "z_loss": 0.3},
    "smoothed": {"label_smoothing": 0.2, "normalizer": 2.5},
    "none": {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.3},
}


#: Per-token outputs are never early.
ROUTES_OF_LOSSES = [
    (loss, route) for loss in LOSSES for route in (LATE if loss == "none" else LATE + EARLY)
]


@every_head
@pytest.mark.parametrize(("loss", "route"), ROUTES_OF_LOSSES)
def test_cross_entropy(route: str, loss: str, head: str) -> None:
    token_weights = torch.tensor([0.5, 0.0, 2.0, -1.0]) if head == "capped" else None

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pk.linear_cross_entropy(
            hidden,
            weight,
            _labels(),
            token_weights=token_weights,
            bias=bias,
            plan=_plan(route),
            **LOSSES[loss],
            **HEADS[head],
        )

    _gradcheck(op, early=route in EARLY)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("route", LATE)
def test_token_weights_that_require_grad(route: str, loss: str) -> None:
    """They go late, and get their gradient, that of a weight of 0 included."""
    weights = torch.tensor([0.5, 0.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)

    def op(hidden: Tensor, weight: Tensor, bias: Tensor, token_weights: Tensor) -> Tensor:
        return pk.linear_cross_entropy(
            hidden,
            weight,
            _labels(),
            token_weights=token_weights,
            bias=bias,
            plan=_plan(route),
            **LOSSES[loss],
        )

    _gradcheck(op, weights)


@pytest.mark.parametrize("route", LATE + EARLY)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden and weight"])
def test_frozen_inputs(route: str, frozen: str) -> None:
    """Only what wants a gradient gets one, and that one is right."""
    leaves = dict(zip(("hidden", "weight", "bias"), _leaves(), strict=True))
    for name in frozen.split(" and "):
        leaves[name].requires_grad_(False)

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pk.linear_cross_entropy(hidden, weight, _labels(), bias=bias, plan=_plan(route))

    _check(op, list(leaves.values()), route in EARLY)


@pytest.mark.parametrize("route", LATE + EARLY)
def test_shift(route: str) -> None:
    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ends = torch.tensor([0, 2, TOKENS])
        return pk.linear_cross_entropy(
            hidden, weight, _labels(), bias=bias, shift=True, cu_seqlens=ends, plan=_plan(route)
        )

    _gradcheck(op, early=route in EARLY)
