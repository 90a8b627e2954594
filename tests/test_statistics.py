"""Streaming statistics: merging is associative and free of order, for any split."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pad_kernels.functionals.divergence import KINDS, ONE_SWEEP, Outcomes
from pad_kernels.functionals.statistics import (
    Argmax,
    Block,
    Largest,
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Tail,
    Total,
    empty_stats,
    measure,
    merge,
)

ROWS, VOCAB = 9, 61
FIRST: list[Statistic] = [
    Normalizer(0),
    Normalizer(1),
    Moment(0, (1.0,)),
    Moment(1, (-1.0, 1.0)),
    Total(),
    Argmax(),
    Picked("ids"),
    Tail("ids"),
    Largest(5),
]
SECOND: list[Statistic] = [Outcomes(k, 0.3, 1) for k in KINDS if k not in ONE_SWEEP]


def _logits(kind: str) -> list[Tensor]:
    torch.manual_seed(5)
    a, b = (torch.randn(ROWS, VOCAB, dtype=torch.float64) * 4 for _ in range(2))
    if kind == "ties":
        a, b = a.round(), b.round()
    if kind == "minus_infinity":
        # Long runs, so that whole parts have no mass; row 0 has one entry left.
        for x, start in ((a, 0), (b, 20)):
            x[:, start : start + 30] = -torch.inf
            x[0, 1:] = -torch.inf
            x[0, 0] = 1.5
        a[1] = b[1] = torch.where(torch.rand(VOCAB) < 0.5, -torch.inf, 2.0)
    if kind == "huge":
        a, b = a * 2500, b * 2500
    return [a, b]


KINDS = ["plain", "ties", "minus_infinity", "huge"]


def _inputs() -> dict[str, Tensor]:
    torch.manual_seed(6)
    return {"ids": torch.stack([torch.randperm(VOCAB)[:4] for _ in range(ROWS)])}


def _parts(
    logits: list[Tensor], statistics: list[Statistic], cuts: list[int], first: RowStats | None
) -> list[RowStats]:
    edges = [0, *cuts, VOCAB]
    return [
        measure(statistics, Block(dict(enumerate(x[:, a:b] for x in logits)), a, _inputs()), first)
        for a, b in itertools.pairwise(edges)
    ]


def _join(parts: list[RowStats], choose: Callable[[int], int]) -> RowStats:
    """Merge in some order: any two, in any tree."""
    parts = list(parts)
    while len(parts) > 1:
        a = parts.pop(choose(len(parts)))
        b = parts.pop(choose(len(parts)))
        parts.append(merge(a, b))
    return parts[0]


def _close(found: RowStats, whole: RowStats) -> None:
    for statistic, value in whole.items():
        if isinstance(statistic, Moment | Outcomes | Normalizer | Tail | Total):
            torch.testing.assert_close(
                found[statistic], value, rtol=1e-11, atol=1e-11, msg=str(statistic)
            )
        else:
            assert torch.equal(found[statistic], value), str(statistic)
        assert not found[statistic].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_any_split_in_any_order(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    logits = _logits(kind)
    cuts = sorted(draw.sample(range(1, VOCAB), draw.randint(1, 8)))
    whole = measure(FIRST, Block(dict(enumerate(logits)), 0, _inputs()), None)
    _close(_join(_parts(logits, FIRST, cuts, None), draw.randrange), whole)
    second = measure(SECOND, Block(dict(enumerate(logits)), 0, _inputs()), whole)
    _close(_join(_parts(logits, SECOND, cuts, whole), draw.randrange), second)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_associative(kind: str) -> None:
    a, b, c = _parts(_logits(kind), FIRST, [17, 40], None)
    _close(merge(merge(a, b), c), merge(a, merge(b, c)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_the_neutral_element(kind: str) -> None:
    logits = _logits(kind)
    whole = measure(FIRST, Block(dict(enumerate(logits)), 0, _inputs()), None)
    nothing = empty_stats(FIRST, ROWS, _inputs(), torch.device("cpu"))
    for found in (merge(whole, nothing), merge(nothing, whole)):
        for statistic, value in whole.items():
            torch.testing.assert_close(found[statistic], value, rtol=1e-14, atol=1e-14)
    both = merge(nothing, nothing)
    for statistic in FIRST:
        assert torch.equal(both[statistic], nothing[statistic]), str(statistic)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_is_what_it_should_be(kind: str) -> None:
    """Statistics against their definitions, over a random split."""
    logits = _logits(kind)
    stats = _join(_parts(logits, FIRST, [7, 30, 31], None), lambda n: n - 1)
    a, b = logits
    ids = _inputs()["ids"]
    assert torch.equal(stats.maximum(0), a.amax(-1))
    torch.testing.assert_close(stats.logsumexp(1), b.logsumexp(-1))
    torch.testing.assert_close(stats[Total()][0], a.sum(-1))
    first = [int((row == row.max()).nonzero()[0]) for row in a]
    assert stats[Argmax()][0].tolist() == first
    assert torch.equal(stats[Picked("ids")], a.gather(1, ids).T)
    tail_max, tail_sum = stats[Tail("ids")]
    rest = a.scatter(1, ids, -torch.inf)
    assert torch.equal(tail_max, rest.amax(-1))
    torch.testing.assert_close(tail_max + tail_sum.log(), rest.logsumexp(-1))
    order = a.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(stats[Largest(5)][:5], order.values[:, :5].T)
    assert torch.equal(stats[Largest(5)][5:], order.indices[:, :5].T.double())
    if kind in ("plain", "huge"):
        s, t = a.softmax(-1), b.softmax(-1)
        centred = [x - x.amax(-1, keepdim=True) for x in (a, b)]
        for statistic, expected in (
            (Moment(0, (1.0,)), (s * centred[0]).sum(-1)),
            (Moment(1, (-1.0, 1.0)), (t * (centred[1] - centred[0])).sum(-1)),
        ):
            found = stats[statistic][0] / stats.total(statistic.stream)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
