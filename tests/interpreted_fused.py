"""The fused Triton kernels under the interpreter."""

import dataclasses
from collections.abc import Callable

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import pytest
import torch
from oracles import GRADIENTS, VALUES, assert_by_norm
from torch import Tensor

import pad_kernels as pk
from pad_kernels.backends.torch_blocked import _dense as dense_gradient
from pad_kernels.backends.triton import backend as triton_backend
from pad_kernels.backends.triton import fused
from pad_kernels.backends.triton.fused_operands import Measured, Operands
from pad_kernels.backends.triton.tilings import Tiling
from pad_kernels.engine.problem import Stream
from pad_kernels.engine.workspace import account
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import (
    Argmax,
    Block,
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Total,
    empty_stats,
    measure,
)
from pad_kernels.heads import HeadOptions

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [HeadOptions(), HeadOptions(30.0, 0.5, 2.0), HeadOptions(None, 2.0, 1.5)]
SMALL = Tiling(16, 32, 16, 4, 3, 2)
STATISTICS: dict[int, list[Statistic]] = {
    1: [Moment(0, (1.0,)), Total(), Argmax()],
    2: [Moment(1, (-1.0, 1.0)), Moment(0, (1.0, -1.0)), Moment(0, (1.0,))],
    3: [Moment(0, (0.0, 1.0, -1.0)), Moment(1, (-1.0, 1.0)), Total()],
}
#: Ids a row, by streams; some are listed twice.
IDS = {1: 1, 2: 3, 3: 40}
#: Rows, vocabulary, hidden sizes: nothing divides; one of each; whole tiles, for the copy engine.
SHAPES = [(21, 107, (45, 17, 33)), (1, 1, (1, 1, 1)), (1, 507, (123, 8, 8)), (32, 96, (32, 64, 16))]


def make_streams(shape: tuple[int, int, tuple[int, ...]], count: int, dtype: torch.dtype):
    """Streams with strided hidden states, every kind of head; one alone has logits of -inf."""
    rows, vocab, sizes = shape
    streams = []
    for j, size in enumerate(sizes[:count]):
        pad = -size % 8 + 8
        hidden = torch.randn(rows, size + pad).to(dtype)[:, :size]
        weight = (torch.randn(vocab, size + pad) * 3 / size**0.5).to(dtype)[:, :size]
        bias = torch.randn(vocab)
        if vocab > 1 and count == 1:
            bias[torch.rand(vocab) < 0.2] = -torch.inf
            bias[-1] = 0.0
        head = HEADS[(j + int(torch.randint(3, ()))) % 3]
        biased = head.softcap is None and torch.rand(()) < 0.7
        streams.append(Stream(hidden, weight, bias if biased else None, head))
    return streams


def logits_of(streams: list[Stream], dtype: torch.dtype) -> dict[int, Tensor]:
    """Dense logits; products in float32 for those less than float64, as kernels add them up."""
    found = {}
    for j, s in enumerate(streams):
        raw = s.hidden.to(dtype) @ s.weight.to(dtype).t()
        found[j] = s.head.transform(raw if s.bias is None else raw + s.bias.to(dtype))
    return found


def operands_of(streams: list[Stream]) -> Operands:
    return Operands(
        [s.hidden for s in streams],
        [s.weight for s in streams],
        tuple(s.bias for s in streams),
        [s.head for s in streams],
    )


def run_statistics(
    streams: list[Stream], wanted: list[Statistic], inputs: dict[str, Tensor], splits: int, **more
) -> RowStats:
    rows = streams[0].hidden.shape[0]
    # views of wider tensors, as the rows of a part are
    wide = {k: torch.cat((x, x)) for k, x in inputs.items()}
    stats = empty_stats(wanted, 2 * rows, wide, torch.device("cpu")).rows(rows, 2 * rows)
    measured = Measured.of(range(len(streams)), wanted)
    assert measured is not None
    partial = torch.full((splits, len(measured.slots), rows), torch.nan, dtype=torch.float64)
    operands = operands_of(streams)
    for launch in fused.statistics_launches(measured, operands, SMALL, stats, partial, **more):
        launch.run()
    return stats


def check_gradient(
    out: Tensor,
    streams: list[Stream],
    stats: RowStats,
    terms: LogitGradient,
    span: tuple[int, int],
    inputs: dict[str, Tensor],
) -> None:
    """A block of dL/dz, vocabulary entries of the span, against float64 and float32."""
    a, b = span
    found = []
    for working in (torch.float64, torch.float32):
        logits = logits_of(streams, torch.float64)
        block = Block({j: z[:, a:b].to(working) for j, z in logits.items()}, a, inputs)
        dense = dense_gradient(block, stats, terms)
        for ids, values in terms.sparse:
            inside = (ids >= a) & (ids < b)
            dense.scatter_add_(1, torch.where(inside, ids - a, 0), (values * inside).to(working))
        student = streams[0]
        raw = student.hidden.to(working) @ student.weight[a:b].to(working).t()
        if student.bias is not None:
            raw += student.bias[a:b].to(working)
        found.append(dense * student.head.chain(raw))
    eps = torch.finfo(out.dtype).eps
    dense = found[1].to(out.dtype).double()
    assert_by_norm(out.double(), found[0], dense, GRADIENTS, 4 * eps if eps < 1e-6 else eps)


def finished(stats: RowStats, statistic: Statistic, bound: bool = False) -> Tensor:
    """A statistic as values use it: log normalisers, expectations."""
    found = stats[statistic]
    if isinstance(statistic, Normalizer):
        return stats.logsumexp(statistic.stream)
    if isinstance(statistic, Moment):
        return found[0] / stats.total(statistic.stream)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tma", [False, True])
def test_statistics(dtype: torch.dtype, count: int, shape, tma: bool) -> None:
    streams = make_streams(shape, count, dtype)
    rows, vocab, _ = shape
    inputs = {"labels": torch.randint(vocab, (rows, IDS[count]))}
    normalizers: list[Statistic] = [Normalizer(j) for j in range(count)]
    wanted = [*normalizers, *STATISTICS[count], Picked("labels")]
    stats = run_statistics(streams, wanted, inputs, splits=3, tma=tma)
    exact = measure(wanted, Block(logits_of(streams, torch.float64), 0, inputs), None)
    dense = measure(wanted, Block(logits_of(streams, torch.float32), 0, inputs), None)
    for statistic in wanted:
        got, ref, like = (finished(x, statistic) for x in (stats, exact, dense))
        if isinstance(statistic, Argmax):
            a = logits_of(streams, torch.float32)[0]
            near = a.gather(1, got.t()).double() >= a.amax(1, True).double() - 1e-5
            assert near.all()
            continue
        fine = torch.isfinite(ref)
        assert torch.equal(got[~fine], ref[~fine])
        if isinstance(statistic, Total):  # as good as its terms
            terms = logits_of(streams, torch.float64)[0].abs().nan_to_num(posinf=0).sum(1)
            assert ((got - ref)[fine].abs() <= 2e-7 * terms.expand_as(fine)[fine]).all()
            continue
        scale = max(ref[fine].norm(), exact.maximum()[exact.maximum().isfinite()].norm())
        room = max((like - ref)[fine].norm(), torch.finfo(torch.float32).eps * scale)
        assert (got - ref)[fine].norm() <= VALUES * room, statistic


def test_one_stream_lacks_what_another_has() -> None:
    streams = make_streams(SHAPES[0], 2, torch.bfloat16)
    streams = [dataclasses.replace(s, head=HeadOptions()) for s in streams]
    streams[0].bias, streams[1].bias = torch.zeros(107), torch.zeros(107)
    streams[0].bias[40:] = -torch.inf  # whole tiles and splits without any mass
    moments: list[Statistic] = [Moment(1, (-1.0, 1.0)), Moment(0, (1.0, -1.0))]
    wanted = [Normalizer(0), Normalizer(1), *moments]
    stats = run_statistics(streams, wanted, {}, splits=4, tma=False)
    exact = measure(wanted, Block(logits_of(streams, torch.float64), 0, {}), None)
    assert (stats[moments[0]] == torch.inf).all()
    found, expected = (x[moments[1]] / x.total() for x in (stats, exact))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    streams[0].bias[:] = -torch.inf
    stats = run_statistics(streams, [*wanted, Argmax()], {}, splits=4, tma=False)
    assert (stats.maximum() == -torch.inf).all()
    assert (stats.total() == 0).all()
    assert (stats[Argmax()] == 0).all()
    assert (stats[moments[1]] == 0).all()


def test_lowest_id_among_equals() -> None:
    streams = make_streams(SHAPES[3], 1, torch.float32)
    streams[0].hidden.zero_()
    streams[0].head, streams[0].bias = HeadOptions(), torch.zeros(96)
    streams[0].bias[[37, 38, 70, 95]] = 1.0
    stats = run_statistics(streams, [Normalizer(0), Argmax()], {}, splits=3, tma=True)
    assert (stats[Argmax()] == 37).all()


def test_large_logits_and_nan() -> None:
    streams = make_streams(SHAPES[0], 1, torch.float32)
    streams[0].head, streams[0].bias = HeadOptions(), torch.randn(107) * 1e4
    streams[0].hidden[3, 0] = torch.nan
    stats = run_statistics(streams, [Normalizer(0), Argmax()], {}, splits=2, tma=False)
    exact = logits_of(streams, torch.float64)[0].logsumexp(1)
    torch.testing.assert_close(stats.logsumexp(), exact, rtol=3e-7, atol=0, equal_nan=True)
    assert (stats[Argmax()] >= 0).all()
    assert (stats[Argmax()] < 107).all()


def test_same_bits_again() -> None:
    streams = make_streams(SHAPES[0], 3, torch.bfloat16)
    wanted: list[Statistic] = [Normalizer(0), Normalizer(1), Normalizer(2), *STATISTICS[3]]
    runs = [run_statistics(streams, wanted, {}, splits=3, tma=True) for _ in range(2)]
    for statistic in wanted:
        assert torch.equal(*(run[statistic].nan_to_num() for run in runs))


class Rounded:
    """A dense head in half precision whose products are added up and kept in float32."""

    def __init__(self, streams: list[tuple[Tensor, Tensor]]) -> None:
        self.leaves = [(h.float().requires_grad_(), w.float().requires_grad_()) for h, w in streams]

    def logprobs(self, dtype: torch.dtype, head: HeadOptions) -> list[Tensor]:
        products = (h.to(dtype) @ w.to(dtype).t() for h, w in self.leaves)
        return [head.transform(z).log_softmax(-1) for z in products]

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.leaves[0], retain_graph=True)


@pytest.fixture
def fused_calls(calls_of: Callable[..., list[str]]) -> list[str]:
    """Names of the fused steps that ran."""
    return calls_of(triton_backend, "plan_statistics", "plan_gradient")


@pytest.mark.usefixtures("multiply_float16")
@pytest.mark.parametrize(("dtype", "filtered"), [(torch.bfloat16, False), (torch.float16, True)])
def test_token_stats_through_the_engine(
    fused_calls: list[str], dtype: torch.dtype, filtered: bool
) -> None:
    """Per-token outputs and their gradients; left-out rows, a soft cap, a part of the weight."""
    rows, vocab, size = 19, 301, 48
    hidden, weight = torch.randn(rows, size).to(dtype), torch.randn(vocab + 5, size).to(dtype)
    labels = torch.randint(vocab, (rows,))
    labels[4] = -100
    live, head = labels != -100, HeadOptions(20.0, 1.0, 0.5)
    least = 1e-9 if filtered else 0.0  # a bound that leaves nothing out, found by the kernel
    plan = pk.PlanRequest("late", "triton", vocab_block=128, filter=least)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = pk.linear_token_stats(
        *leaves, labels, softcap=20.0, temperature=0.5, vocab_size=vocab, plan=plan
    )
    upstream = torch.randn(2, rows)
    loss = (found.logprob * upstream[0] + found.entropy * upstream[1]).sum()
    got = torch.autograd.grad(loss, leaves)
    assert fused_calls == ["plan_statistics"] + ["plan_gradient"] * 3
    oracle = Rounded([(hidden[live].detach(), weight[:vocab].detach())])
    values, gradients = [], []
    for working in (torch.float64, torch.float32):
        logprob = oracle.logprobs(working, head)[0]
        picked = logprob.gather(1, labels[live, None])[:, 0]
        values.append((picked, -(logprob.exp() * logprob).sum(-1)))
        loss = (values[-1][0] * upstream[0, live] + values[-1][1] * upstream[1, live]).sum()
        gradients.append(oracle.gradients(loss))
    eps = torch.finfo(torch.float32).eps
    for mine, exact, dense in zip((found.logprob[live], found.entropy[live]), *values, strict=True):
        assert_by_norm(mine.double(), exact.double(), dense.double(), VALUES, 4 * eps)
    half = torch.finfo(dtype).eps
    assert not got[0][~live].any()
    assert not got[1][vocab:].any()
    mine = got[0][live], got[1][:vocab]
    for g, exact, dense in zip(mine, *gradients, strict=True):
        assert_by_norm(g.double(), exact.double(), dense.double(), GRADIENTS, half)


def test_scoring_some_rows_at_a_time(fused_calls: list[str]) -> None:
    """Without a gradient, in blocks of rows that share their buffers, within the plan."""
    hidden, weight = torch.randn(37, 32).bfloat16(), torch.randn(131, 32).bfloat16()
    labels = torch.randint(131, (37,))
    labels[::5] = -100
    whole = pk.linear_logprob(hidden, weight, labels, plan=pk.PlanRequest(None, "triton"))
    shape = {"token_block": 8, "vocab_block": 64}
    plan = pk.PlanRequest(None, "triton", **shape)
    account.reset()
    found = pk.linear_logprob(hidden, weight, labels, plan=plan)
    assert fused_calls == ["plan_statistics"] * (1 + 4)  # of 29 rows that count
    assert torch.equal(found, whole)
    assert (
        account.high_water <= pk.explain(hidden, weight, per_token=True, plan=plan).workspace_bytes
    )
    odd = hidden[:, :30].contiguous(), weight[:, :30].contiguous()
    other = pk.linear_logprob(*odd, labels, plan=plan)
    exact = (odd[0].double() @ odd[1].double().t()).log_softmax(-1)
    live = labels >= 0
    exact = exact.gather(1, labels.clamp(min=0)[:, None])[live, 0]
    assert_by_norm(other[live].double(), exact, exact.bfloat16().double(), VALUES, 2**-8)
    assert len(fused_calls) == 5


def test_three_streams_through_the_engine(fused_calls: list[str]) -> None:
    """Cross-entropy, a divergence, an advantage: each token with the teachers it asks for."""
    rows, vocab = 24, 203
    shapes = [(16, 32), (32, 48), (16, 16)]
    streams = [
        (torch.randn(rows, b).bfloat16()[:, :a], torch.randn(vocab, b).bfloat16()[:, :a])
        for a, b in shapes
    ]
    labels = torch.randint(vocab, (rows,))
    plan = pk.PlanRequest("late", "triton", vocab_block=80)
    student = [x.clone().requires_grad_() for x in streams[0]]
    heads = [pk.Head(*student), *(pk.Head(h, w) for h, w in streams[1:])]
    weights = torch.rand(2, rows) * (torch.rand(2, rows) < 0.6)
    found = pk.linear_distill(
        heads[0],
        labels,
        aligned=heads[1],
        reference=heads[2],
        ce_weight=weights[0],
        advantage_weight=weights[1],
        reduction="sum",
        plan=plan,
    )
    got = torch.autograd.grad(found.loss, student)
    assert "plan_statistics" in fused_calls
    assert "plan_gradient" in fused_calls
    oracle = Rounded(streams)
    losses, gradients = [], []
    for dtype in (torch.float64, torch.float32):
        s, d, r = oracle.logprobs(dtype, HeadOptions())
        d, r = d.detach(), r.detach()
        ce = -s.gather(1, labels[:, None])[:, 0]
        advantage = (s.exp() * (d - r)).sum(-1)
        losses.append((weights[0] * ce - weights[1] * advantage).sum())
        gradients.append(oracle.gradients(losses[-1]))
    assert_by_norm(found.loss.double(), losses[0].double(), losses[1].double(), VALUES, 1e-6)
    for g, exact, dense in zip(got, *gradients, strict=True):
        assert_by_norm(g.double(), exact.double(), dense.double(), GRADIENTS, 2**-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tma", [False, True])
def test_gradient_of_a_block(dtype: torch.dtype, count: int, tma: bool) -> None:
    """Every coefficient at once, over NaN, against the plain torch row pass in float64."""
    shape = SHAPES[0]
    streams = make_streams(shape, count, dtype)
    rows, vocab, _ = shape
    normalizers: list[Statistic] = [Normalizer(j) for j in range(count)]
    logits = logits_of(streams, torch.float64)
    stats = measure(normalizers, Block(logits, 0, {}), None)
    ids = torch.randint(vocab, (rows, 1 if count == 1 else 20))
    terms = LogitGradient(
        constant=torch.randn(rows),
        student=torch.randn(rows),
        moments={j: torch.randn(rows) for j in range(count - 1, count)},
        probabilities={j: torch.randn(rows) for j in range(1, count)},
        sparse=[(ids, torch.randn(ids.shape)), (ids[:, :1], torch.randn(rows, 1))][-count:],
    )
    a, b = 33, 33 + 64
    out = torch.full((rows, b - a + 7), torch.nan, dtype=dtype)[:, : b - a]
    peaks = torch.zeros(1, dtype=torch.int32)
    operands = operands_of(streams).cut(a, [s.weight[a:b] for s in streams])
    used = list(range(count))
    fused.gradient_launch(operands, used, SMALL, stats, terms, out, a, peaks, tma=tma).run()
    check_gradient(out, streams, stats, terms, (a, b), {})
    assert peaks.view(torch.float32)[0] == out.float().abs().max()
