"""The product: op x backend x schedule x dtype x head options x awkward inputs, by one rule."""

from __future__ import annotations

import functools
from typing import Any

import oracles
import pytest
import torch
from oracles import OneHead, assert_all_accurate
from parity_cases import (
    DTYPES,
    NAMES,
    NATIVE_MISSING,
    SUM_ROUTES,
    TOKEN_ROUTES,
    Route,
    case,
    expected,
    upstream,
)
from torch import Tensor

import pad_kernels as pk

pytestmark = pytest.mark.usefixtures("poisoned")


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


#: Two threads spend their time on waking each other; every loss, below, runs on both.
alone = pytest.mark.usefixtures("one_thread")


def turns(op: int, ops: int, routes: list[Route] = TOKEN_ROUTES) -> pytest.MarkDecorator:
    """A share of the product of routes, dtypes and cases.

    One of the ops meets each triple, and each op every pair of two: what goes wrong between route,
    dtype and case is the engine's, and the same for all of them.
    """
    found = [
        pytest.param(route, dtype, name, id=f"{route}-{str(dtype)[6:]}-{name}")
        for i, route in enumerate(routes)
        for j, dtype in enumerate(DTYPES)
        for k, name in enumerate(NAMES)
        if (i + j + k) % ops == op
    ]
    return pytest.mark.parametrize(("route", "dtype", "name"), found)


def _plan(route: Route, x: OneHead) -> pk.PlanRequest:
    if route.backend == "cpp" and NATIVE_MISSING:
        pytest.skip("the extension is not built")
    return route.plan(x.labels.numel())


def _check(x: OneHead, leaves: list[Tensor], values: Tensor, total: Tensor, reference: Any) -> None:
    """Values [outputs, N] and the gradients of ``total``."""
    before = [leaf.clone() for leaf in leaves]
    gradients = torch.autograd.grad(total, leaves)
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert values.dtype == working
    for leaf, gradient, copy in zip(leaves, gradients, before, strict=True):
        assert gradient.shape == leaf.shape and torch.equal(leaf, copy)
    assert_all_accurate([values, *gradients], *reference, x.dtype)
    ignored = x.labels == x.ignore_index
    assert not values[:, ignored.reshape(-1)].any()
    assert not gradients[0][ignored].any(), "a row that does not count has a gradient"
    for gradient in gradients[1:]:
        assert not gradient[x.vocab :].any(), "an entry beyond vocab_size has a gradient"


# --- per-token ops ---


@functools.cache
def _logprob_reference(name: str, dtype: torch.dtype) -> Any:
    x = case(name, dtype)
    return expected(
        x,
        lambda z, labels: oracles.logprob_of(z, labels[:, None]).T,
        [{"logprob": 1.0}],
        upstream(1, x.labels.numel()),
    )


@alone
@turns(0, 3)
def test_logprob(route: Route, dtype: torch.dtype, name: str) -> None:
    x = case(name, dtype)
    leaves, values = x.ours(pk.linear_logprob, x.labels, plan=_plan(route, x))
    assert values.shape == x.labels.shape
    flat = values.reshape(1, -1)
    total = (flat * upstream(1, flat.shape[1])).sum()
    _check(x, leaves, flat.detach(), total, _logprob_reference(name, dtype))


def _three_statistics(z: Tensor, labels: Tensor) -> Tensor:
    logprob = oracles.logprob_of(z, labels[:, None])[:, 0]
    return torch.stack((logprob, torch.logsumexp(z, -1), oracles.entropy(z)))


@functools.cache
def _stats_reference(name: str, dtype: torch.dtype) -> Any:
    x = case(name, dtype)
    terms = [{"logprob": 1.0}, {"lse": 1.0}, {"entropy": 1.0}]
    return expected(x, _three_statistics, terms, upstream(3, x.labels.numel()))


@alone
@turns(1, 3)
def test_token_stats(route: Route, dtype: torch.dtype, name: str) -> None:
    x = case(name, dtype)
    leaves, stats = x.ours(pk.linear_token_stats, x.labels, plan=_plan(route, x))
    assert all(s.shape == x.labels.shape for s in stats)
    values = torch.stack([s.reshape(-1) for s in stats[:3]])
    total = (values * upstream(3, values.shape[1])).sum()
    _check(x, leaves, values.detach(), total, _stats_reference(name, dtype))
    assert stats.argmax.dtype == torch.int64 and not stats.argmax.requires_grad
    _check_argmax(x, stats.argmax)


def _check_argmax(x: OneHead, argmax: Tensor) -> None:
    ignored = x.labels == x.ignore_index
    assert (argmax[ignored] == -1).all()
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = oracles.Dense(x.dtype, working).logits(x.hidden, x.weight, x.bias, **x.options).double()
    z = z[~ignored.reshape(-1)]
    if not len(z):
        return
    found = z.gather(1, argmax[~ignored].reshape(-1, 1))[:, 0]
    # The same logits up to the order of a product's sum, which may turn one rounding.
    slack = 4 * torch.finfo(x.dtype).eps * z.amax(-1).abs()
    assert (found >= z.amax(-1) - slack).all()
    assert (argmax[~ignored] < x.vocab).all()


def test_argmax_is_the_first_of_equals() -> None:
    x = case("ties", torch.float32)
    z = x.hidden @ x.weight.T
    first = (z == z.amax(-1, keepdim=True)).int().argmax(-1)
    assert ((z == z.amax(-1, keepdim=True)).sum(-1) > 1).any()
    live = x.labels >= 0
    for route in TOKEN_ROUTES[:-1]:
        _, stats = x.ours(pk.linear_token_stats, x.labels, plan=_plan(route, x))
        assert torch.equal(stats.argmax[live], first[live]), str(route)


# --- cross-entropy ---


@functools.cache
def _token_weights(shape: torch.Size) -> Tensor:
    """Of both magnitudes, some exactly 0."""
    torch.manual_seed(7)
    weights = torch.rand(shape) * 3
    return torch.where(torch.rand(shape) < 0.3, 0.0, weights)


#: Options of linear_cross_entropy, without the token weights that "weighted" stands for.
LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum_smoothed": {"reduction": "sum", "label_smoothing": 0.15},
    "z_loss_normalizer": {"z_loss": 0.25, "normalizer": 7.5},
    "weighted": {"label_smoothing": 0.1, "z_loss": 0.25},
    "none_weighted": {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.25},
}


def _loss_arguments(x: OneHead, loss: str) -> dict[str, Any]:
    found = dict(LOSSES[loss])
    if "weighted" in loss:
        found["token_weights"] = _token_weights(x.labels.shape)
    if "z_loss" in found and x.dtype == torch.float16:
        # Where products take float16 there is room for slopes of 4000 (docs/design.md), which
        # 2 z_loss logsumexp of huge logits is to stay below.
        found["z_loss"] /= 2
    return found


def _row_factors(x: OneHead, arguments: dict[str, Any]) -> Tensor:
    """What each token's loss is multiplied by before it is summed, [1, N]."""
    factors = arguments.get("token_weights", torch.ones(x.labels.shape)).double().reshape(1, -1)
    if arguments.get("reduction", "mean") == "mean":
        counted = int((x.labels != x.ignore_index).sum())
        factors = factors / (arguments.get("normalizer") or max(counted, 1))
    return factors


@functools.cache
def _loss_reference(name: str, dtype: torch.dtype, loss: str) -> Any:
    x = case(name, dtype)
    arguments = _loss_arguments(x, loss)
    smoothing = arguments.get("label_smoothing", 0.0)
    z_loss = arguments.get("z_loss", 0.0)
    factors = _row_factors(x, arguments)
    outputs = upstream(1, x.labels.numel())
    grad = (outputs if loss == "none_weighted" else torch.ones_like(outputs)) * _scale(name)

    def values(z: Tensor, labels: Tensor) -> Tensor:
        row = factors[:, (x.labels != x.ignore_index).reshape(-1)].to(z.dtype)
        found = oracles.cross_entropy(z, labels, smoothing, z_loss)[None]
        return torch.where(row == 0, 0.0, found) * row

    terms = {
        "logprob": (smoothing - 1) * factors[0],
        "lse": smoothing * factors[0],
        "sum": -smoothing / x.vocab * factors[0],
        "lse2": z_loss * factors[0],
    }
    return expected(x, values, [terms], grad)


def _scale(name: str) -> float:
    """What the loss is multiplied by; float16 gradients must not overflow."""
    return 0.02 if "confident" in name else {"huge_logits": 2e-4, "cold": 0.1}.get(name, 2.5)


@alone
@turns(0, 1, [r for r in SUM_ROUTES if r.schedule == "early"])
def test_cross_entropy_early(route: Route, dtype: torch.dtype, name: str) -> None:
    test_cross_entropy(route, dtype, name)


@alone
@turns(2, 3)
def test_cross_entropy(route: Route, dtype: torch.dtype, name: str) -> None:
    x = case(name, dtype)
    # Every loss meets every route and every dtype; the case decides which comes first.
    turn = NAMES.index(name) + sum(str(route).encode()) + DTYPES.index(dtype)
    loss = [n for n in LOSSES if n != "none_weighted"][turn % 4]
    _cross_entropy(x, route, name, loss)


def _cross_entropy(x: OneHead, route: Route, name: str, loss: str) -> None:
    arguments = _loss_arguments(x, loss)
    leaves, value = x.ours(pk.linear_cross_entropy, x.labels, plan=_plan(route, x), **arguments)
    assert value.shape == ()
    gradients = torch.autograd.grad(value * _scale(name), leaves)
    reference = _loss_reference(name, x.dtype, loss)
    assert_all_accurate([value.detach(), *gradients], *reference, x.dtype)
    assert not gradients[0][x.labels == x.ignore_index].any()
    for gradient in gradients[1:]:
        assert not gradient[x.vocab :].any()


@pytest.mark.parametrize("loss", [n for n in LOSSES if n != "none_weighted"])
@pytest.mark.parametrize("name", ["every_option", "all_ignored", "none_ignored"])
@every_dtype
@pytest.mark.parametrize("route", [r for r in SUM_ROUTES if r.odd], ids=str)
def test_every_loss(route: Route, dtype: torch.dtype, name: str, loss: str) -> None:
    _cross_entropy(case(name, dtype), route, name, loss)


@alone
@turns(0, 2, [r for r in TOKEN_ROUTES if r.odd])
def test_cross_entropy_per_token(route: Route, dtype: torch.dtype, name: str) -> None:
    x = case(name, dtype)
    arguments = _loss_arguments(x, "none_weighted")
    leaves, values = x.ours(pk.linear_cross_entropy, x.labels, plan=_plan(route, x), **arguments)
    assert values.shape == x.labels.shape
    flat = values.reshape(1, -1)
    total = (flat * upstream(1, flat.shape[1])).sum() * _scale(name)
    _check(x, leaves, flat.detach(), total, _loss_reference(name, dtype, "none_weighted"))


def test_a_mean_over_no_tokens_is_zero() -> None:
    x = case("all_ignored", torch.float32)
    for route in SUM_ROUTES:
        _, value = x.ours(pk.linear_cross_entropy, x.labels, plan=_plan(route, x))
        assert float(value.detach()) == 0.0
