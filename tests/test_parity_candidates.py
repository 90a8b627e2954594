"""The parity product for candidate tokens and the likeliest tokens, and for the causal shift."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from extended import exact
from oracles import ORACLE, VALUES, OneHead, assert_accurate, assert_all_accurate, dense
from parity_cases import DTYPES, NATIVE_MISSING, TOKEN_ROUTES, Route, case, upstream
from torch import Tensor

import pad_kernels as pk

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

CASES = [
    "plain",
    "every_option",
    "no_tokens",
    "one_token",
    "one_entry",
    "minus_infinity",
    "huge_logits",
    "ties",
    "hidden_of_three_dimensions",
    "weight_strided_both_ways",
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_case = pytest.mark.parametrize("name", CASES)


def _plan(route: Route, x: OneHead) -> pk.PlanRequest:
    if route.backend == "cpp" and NATIVE_MISSING:
        pytest.skip("the extension is not built")
    return route.plan(x.labels.numel())


# --- option_logprobs ---


def _count(x: OneHead) -> int:
    """Candidates; of a single entry its probability is 1, which a sum of several hides."""
    return 3 if x.vocab > 1 else 1


@functools.cache
def _candidates(name: str, dtype: torch.dtype, shared: bool) -> tuple[Tensor, Any]:
    """Ids as given to the op, and the references; ids may repeat."""
    x = case(name, dtype)
    x = replace(x, labels=torch.zeros_like(x.labels))
    torch.manual_seed(9)
    leading = () if shared else x.labels.shape
    count = _count(x)
    ids = torch.randint(x.vocab, (*leading, count))
    rows = ids.expand(*x.labels.shape, count).reshape(-1, count)
    grad = upstream(count, len(rows))

    def values(z: Tensor, labels: Tensor) -> Tensor:
        return oracles.logprob_of(z, rows).T

    careful = x.compute(dense(dtype), values, grad)
    if dtype != torch.float64:
        return ids, (x.compute(ORACLE, values, grad), careful)
    picks = {str(i): rows[:, i] for i in range(count)}
    return ids, (exact(x, [{i: 1.0} for i in picks], grad, picks), careful)


@every_case
@every_dtype
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("route", [r for r in TOKEN_ROUTES if r.odd or r.schedule is None], ids=str)
def test_option_logprobs(route: Route, shared: bool, dtype: torch.dtype, name: str) -> None:
    x = case(name, dtype)
    ids, reference = _candidates(name, dtype, shared)
    leaves, values = x.ours(pk.option_logprobs, ids, plan=_plan(route, x))
    assert values.shape == (*x.labels.shape, _count(x))
    flat = values.reshape(-1, _count(x)).T
    gradients = torch.autograd.grad((flat * upstream(*flat.shape)).sum(), leaves)
    assert_all_accurate([flat.detach(), *gradients], *reference, dtype)


def test_options_are_shares_of_the_whole_vocabulary() -> None:
    """All tokens as candidates: a log-softmax."""
    x = case("every_option", torch.float64)
    _, values = x.ours(pk.option_logprobs, torch.arange(x.vocab))
    torch.testing.assert_close(values.detach().exp().sum(-1), torch.ones(24).double())


# --- linear_topk ---

ROUTES = [
    pk.PlanRequest(None, backend, vocab_block=block)
    for backend in ("cpp", "torch_blocked")
    for block in (97, None)
]
every_plan = pytest.mark.parametrize(
    "plan", ROUTES, ids=lambda p: f"{p.backend}-{p.vocab_block or 'planned'}"
)


@pytest.mark.parametrize("backend", ["auto", "torch_blocked"])
def test_no_token_is_likelier_than_certain(backend: str) -> None:
    """Not even by the last digit of capped logits, which is much where the temperature is low."""
    hidden, weight = torch.randn(200, 64) * 3, torch.randn(50, 64)
    plan = None if backend == "auto" else backend
    found = pk.linear_topk(hidden, weight, 3, softcap=30.0, temperature=0.1, plan=plan)
    assert float(found.logprobs.max()) <= 0
    one = pk.linear_topk(hidden, weight[:1], 1, softcap=30.0, temperature=0.1, plan=plan)
    assert not one.logprobs.any()


def _topk(x: OneHead, k: int, plan: pk.PlanRequest) -> pk.TopK:
    if plan.backend == "cpp" and NATIVE_MISSING:
        pytest.skip("the extension is not built")
    _, found = x.ours(pk.linear_topk, k, plan=plan)
    assert found.ids.dtype == torch.int64 and not found.logprobs.requires_grad
    assert found.ids.shape == found.logprobs.shape == (*x.labels.shape, k)
    return pk.TopK(found.ids.reshape(-1, k), found.logprobs.reshape(-1, k))


@every_case
@every_dtype
@every_plan
@pytest.mark.parametrize("k", [1, 5, 150, None])
def test_topk(k: int | None, plan: pk.PlanRequest, dtype: torch.dtype, name: str) -> None:
    x = case(name, dtype)
    k = min(k or x.vocab, x.vocab)
    ids, logprobs = _topk(x, k, plan)
    tensors = [x.hidden, x.weight, x.bias]
    z = [how.logits(*[how.leaf(t, False) for t in tensors], **x.options) for how in _both(dtype)]
    expected, careful = (t.log_softmax(-1) for t in z)
    # Sorting moves no value by more than the values are off.
    best = [t.sort(dim=-1, descending=True).values[:, :k] for t in (expected, careful)]
    if dtype == torch.float64:
        torch.testing.assert_close(logprobs, best[0], rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(expected.gather(1, ids), logprobs, rtol=1e-12, atol=1e-9)
    else:
        assert_accurate(logprobs, best[0], best[1], k=VALUES, dtype=dtype)
        picked = [t.gather(1, ids) for t in (expected, careful)]
        assert_accurate(logprobs, picked[0], picked[1], k=VALUES, dtype=dtype)
    assert (logprobs[:, 1:] <= logprobs[:, :-1]).all(), "values descend"
    equal = logprobs[:, 1:] == logprobs[:, :-1]
    assert all(len(row.unique()) == k for row in ids), "ids differ"
    if name in ("ties", "minus_infinity"):
        # Equal log-probs of equal logits; where logits differ by a rounding the order is theirs.
        exactly = z[0].gather(1, ids)
        equal &= exactly[:, 1:] == exactly[:, :-1]
        assert equal.any() or k < x.vocab
        assert (ids[:, 1:] > ids[:, :-1])[equal].all(), "ids ascend among equals"


def _both(dtype: torch.dtype) -> tuple[oracles.Dense, oracles.Dense]:
    return ORACLE, dense(dtype)


@every_plan
@every_dtype
def test_topk_of_exact_logits(dtype: torch.dtype, plan: pk.PlanRequest) -> None:
    """Where products are exact the ids are those of a stable sort."""
    x = case("ties", dtype)
    z = x.hidden.double() @ x.weight.double().T
    for k in (1, 40, x.vocab):
        expected = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(_topk(x, k, plan).ids, expected)


# --- shift ---


@every_dtype
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_shift_is_a_shift_of_the_labels(packed: bool, dtype: torch.dtype) -> None:
    """Row i predicts label i + 1; the last of each sequence predicts nothing."""
    torch.manual_seed(2)
    shape = (11,) if packed else (3, 5)
    hidden, weight = torch.randn(*shape, 8).to(dtype), torch.randn(29, 8).to(dtype)
    labels = torch.randint(29, shape)
    labels.reshape(-1)[4] = -100
    aligned = torch.full_like(labels, -100)
    more: dict[str, Any] = {}
    if packed:
        ends = [0, 4, 5, 11]
        more["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        for a, b in itertools.pairwise(ends):
            aligned[a : b - 1] = labels[a + 1 : b]
    else:
        aligned[:, :-1] = labels[:, 1:]
    for op in (pk.linear_logprob, pk.linear_token_stats, pk.linear_cross_entropy):
        shifted = op(hidden, weight, labels, shift=True, **more)
        by_hand = op(hidden, weight, aligned)
        pairs = (
            zip(shifted, by_hand, strict=True)
            if isinstance(shifted, tuple)
            else [(shifted, by_hand)]
        )
        assert all(torch.equal(a, b) for a, b in pairs)
