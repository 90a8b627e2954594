"""The C++ row passes against a float64 oracle, through the raw binding."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from row_pass_harness import (
    DTYPES,
    HEADS,
    INF,
    NAN,
    SHAPES,
    State,
    Stream,
    Terms,
    acc_of,
    assert_as_good,
    make_streams,
    oracle_gradient,
    run_gradient,
    strided,
)
from torch import Tensor

# every head at sizes that are quick, the first and the last at those of several tiles
CASES = [
    (shape, count, head)
    for shape in SHAPES
    for count in (1, 2, 3)
    for head in (HEADS if shape[1] < 1000 else ("plain", "all"))
]


def random_moments(count: int) -> list[tuple[int, tuple[float, ...]]]:
    return [
        (w, tuple(float(c) for c in torch.randn(count) * (torch.rand(count) < 0.7)))
        for w in [*range(count), 0]
    ]


def expected(
    streams: Sequence[Stream], moments: Sequence[tuple[int, tuple[float, ...]]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logsumexp (streams, rows) and moment / sum (moments, rows)."""
    a = [s.transformed(dtype)[0] for s in streams]
    x = [v - v.amax(1, keepdim=True) for v in a]
    means = [
        sum((c * v for c, v in zip(cs, x, strict=True)), torch.zeros_like(x[0]))
        .mul(a[w].softmax(1))
        .sum(1)
        for w, cs in moments
    ]
    return torch.stack([v.logsumexp(1) for v in a]), torch.stack(means)


@pytest.mark.parametrize(("shape", "count", "head"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype: torch.dtype, shape: tuple[int, int], count: int, head: str) -> None:
    streams = make_streams(count, *shape, dtype, HEADS[head])
    moments = random_moments(count)
    state = State(streams, moments).add(offset=1000)
    acc = acc_of(dtype)
    exact, dense = expected(streams, moments, torch.float64), expected(streams, moments, acc)
    reach = torch.stack([stream.transformed()[0].abs().amax(1) for stream in streams])
    assert_as_good(state.maxima + state.sums.log(), exact[0], dense[0], 2, reach)
    weights = torch.tensor([c for _, c in moments], dtype=torch.float64).abs()
    means = state.moment / state.sums[[w for w, _ in moments]]
    # the float64 oracle's own sums are not exact
    k = 8 if dtype == torch.float64 else 2
    assert_as_good(means, exact[1], dense[1], k, weights @ reach)
    a, rounded = streams[0].transformed()[0], streams[0].transformed(acc)[0]
    assert_as_good(state.maxima[0], a.amax(1), rounded.amax(1), 2)
    # a sum with cancellation is as good as its terms, so the bound is in their norm
    slack = 4 * torch.finfo(acc).eps * a.abs().sum(1)
    assert ((state.total - a.sum(1)).abs() <= slack).all()
    torch.testing.assert_close(state.best, state.maxima[0], rtol=0, atol=0)
    picked = a.gather(1, state.argmax[:, None] - 1000)[:, 0]
    torch.testing.assert_close(picked, a.amax(1), rtol=4 * torch.finfo(acc).eps, atol=0)
    if head == "plain":
        assert torch.equal(state.argmax - 1000, (a == a.amax(1, True)).int().argmax(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_chunks_merge_to_the_whole_in_any_order(count: int, dtype: torch.dtype) -> None:
    cols, cuts = 9001, [0, 1, 40, 4000, 4001, 8000, 9001]
    streams = make_streams(count, 4, cols, dtype, HEADS["bias"])
    for stream in streams:  # one chunk in which a whole stream is empty, another that is huge
        stream.logits[1, 4001:8000] = -INF
        stream.logits[2, 40:4000] += 100
    moments = [(w, tuple(float(j == w) for j in range(count))) for w in range(count)]
    whole = State(streams, moments).add(offset=7)
    chunks = list(itertools.pairwise(cuts))
    for order in (chunks, chunks[::-1], [chunks[i] for i in torch.randperm(len(chunks))]):
        state = State(streams, moments)
        for begin, end in order:
            state.add(begin, end, offset=7)
        assert torch.equal(state.maxima, whole.maxima)
        assert torch.equal(state.argmax, whole.argmax)
        rtol = 16 * torch.finfo(acc_of(dtype)).eps
        torch.testing.assert_close(state.sums, whole.sums, rtol=rtol, atol=0)
        torch.testing.assert_close(state.moment, whole.moment, rtol=4 * rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_log_ratio_of_two_streams(dtype: torch.dtype, head: str, own: int, apart: float) -> None:
    """A KL's statistics, of models that differ and of models that nearly agree."""
    rows, cols = 4, 20011
    streams = make_streams(2, rows, cols, dtype, HEADS[head])
    if apart < 1:
        near = streams[0].logits.double() + torch.randn(rows, cols, dtype=torch.float64) * apart
        streams[1].logits = strided(near.to(dtype))
        streams[1].bias = streams[0].bias
    signs = (1.0, -1.0) if own == 0 else (-1.0, 1.0)
    state = State(streams, [(own, signs)])
    state.total = state.argmax = state.best = None  # what a divergence does not ask for
    for begin, end in ((0, 7), (7, 9000), (9000, cols)):
        state.add(begin, end)
    found = state.moment[0] / state.sums[own] + (state.sums[1 - own] / state.sums[own]).log()
    p, q = (streams[j].transformed()[0].log_softmax(1) for j in (own, 1 - own))
    exact = (p.exp() * (p - q)).sum(1)
    slack = {torch.float64: 1e-13}.get(dtype, 3e-8 if apart < 1 and head != "softcap" else 1e-6)
    torch.testing.assert_close(found, exact, rtol=2e-6 if apart == 1 else 0.05, atol=slack)
    assert float(found.min()) >= -1e-7


def term_sizes(
    streams: Sequence[Stream], maxima: Tensor, sums: Tensor, terms: Terms, offset: int
) -> Tensor:
    """How large a gradient entry's terms are before they cancel, times what logits' rounding adds.

    In float64 the oracle rounds as much as what it judges, and an exponential of x turns an eps in
    x into |x| eps; so does the slope of a soft cap, at any precision.
    """

    def size(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.abs()

    sizes = Terms(
        size(terms.c0),
        size(terms.c1),
        [None if q is None else -q.abs() for q in terms.q],  # what it multiplies is negative
        [size(p) for p in terms.p],
        terms.ids,
        size(terms.values),
        terms.outside_ids,
        size(terms.outside),
        terms.outside_maximum,
    )
    total = oracle_gradient(streams, maxima, sums, sizes, offset)
    if streams[0].logits.dtype != torch.float64 and not streams[0].softcap:
        return total
    return total * (1 + max(s.logits.abs().max() * s.scale / s.temperature for s in streams))


@pytest.mark.parametrize(("shape", "count", "head"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype: torch.dtype, shape: tuple[int, int], count: int, head: str) -> None:
    rows, cols = shape
    acc, offset = acc_of(dtype), 300
    streams = make_streams(count, rows, cols, dtype, HEADS[head])
    state = State(streams).add()
    column = lambda: torch.randn(rows, dtype=acc)  # noqa: E731
    ids = torch.randint(offset - 20, offset + cols + 20, (rows, 6))
    ids[:, 1] = ids[:, 0] = offset + cols // 2  # equal ids add up
    ids = ids.sort(1).values
    sparse = {"ids": ids, "values": torch.randn(rows, 6, dtype=acc)}
    each = [column() for _ in range(count)]
    cases = [
        Terms(c1=column()),
        Terms(c1=column(), **sparse),
        Terms(c0=column(), c1=column(), q=[column(), *[None] * (count - 1)], **sparse),
        Terms(c0=column(), q=[column(), *[None] * (count - 1)]),
        Terms(c1=column(), q=each, p=[c * 0.5 for c in each], **sparse),
        Terms(p=[*[None] * (count - 1), column()]),
        Terms(c1=column(), p=[*[None] * (count - 1), column()], **sparse),
        Terms(
            c1=column(),
            outside_ids=ids[:, 1:].contiguous(),
            outside=column() * 100,
            # Below the row's maximum, as that of the rest of its entries is.
            outside_maximum=state.maxima[0] - 2,
            **sparse,
        ),
        Terms(c0=column()),
    ]
    for terms in cases:
        out = strided(torch.full((rows, cols), NAN, dtype=dtype), pad=9)
        run_gradient(streams, state.maxima, state.sums, terms, out, offset)
        exact = oracle_gradient(streams, state.maxima, state.sums, terms, offset)
        dense = oracle_gradient(streams, state.maxima, state.sums, terms, offset, acc)
        sizes = term_sizes(streams, state.maxima, state.sums, terms, offset)
        assert_as_good(out, exact, dense, 3, sizes)
        beyond = out.as_strided((rows, 9), (out.stride(0), 1), cols)
        assert beyond.isnan().all(), "wrote beyond the row"
    inplace = Stream(strided(streams[0].logits.clone()), streams[0].bias, **_options(head))
    run_gradient([inplace, *streams[1:]], state.maxima, state.sums, terms, inplace.logits, offset)
    assert torch.equal(inplace.logits, out)
    assert inplace.logits.as_strided((rows, 5), (inplace.logits.stride(0), 1), cols).isnan().all()


def _options(head: str) -> dict[str, Any]:
    return {k: v for k, v in HEADS[head].items() if k != "bias"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 100, 2048, 3000, 10_000])
def test_tile_absmax(dtype: torch.dtype, tile: int) -> None:
    streams = make_streams(1, 6, 5001, dtype, {})
    state = State(streams).add()
    terms = Terms(c1=torch.randn(6))
    out = torch.full((6, 5001), NAN, dtype=dtype)
    tiles = -(-5001 // tile)
    absmax = torch.full((tiles + 1,), NAN)
    run_gradient(streams, state.maxima, state.sums, terms, out, tile=tile, absmax=absmax)
    padded = torch.zeros(6, tiles * tile)
    padded[:, :5001] = out.float().abs()
    assert torch.equal(absmax[:-1], padded.reshape(6, tiles, tile).amax((0, 2)))
    assert absmax[-1].isnan()
    streams[0].logits[2, 4000] = NAN
    run_gradient(streams, state.maxima, state.sums, terms, out, tile=tile, absmax=absmax)
    assert absmax[:-1].isnan().nonzero().tolist() == [[4000 // tile]]
