"""The tail of offline teachers in the fused kernels, interpreted.

Listed tokens that are nearly everything, next to nothing, all there is, or without any mass.
"""

from collections.abc import Callable

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import oracles
import pytest
import test_offline_teachers as offline
import torch
from interpreted_fused import (
    DTYPES,
    SMALL,
    Rounded,
    check_gradient,
    finished,
    logits_of,
    make_streams,
    operands_of,
    run_statistics,
)
from oracles import GRADIENTS, VALUES, assert_by_norm
from torch import Tensor

import pad_kernels as pk
from pad_kernels.backends.triton import backend as triton_backend
from pad_kernels.backends.triton import fused
from pad_kernels.backends.triton.fused_operands import Measured
from pad_kernels.engine.problem import Stream
from pad_kernels.functionals import LogitGradient, TopKDivergence
from pad_kernels.functionals.divergence import KINDS
from pad_kernels.functionals.statistics import (
    Argmax,
    Block,
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Tail,
    measure,
)
from pad_kernels.heads import HeadOptions

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread", "multiply_float16")

TAIL = Tail("kept")
#: Rows, vocabulary, hidden sizes of the streams, kept tokens: nothing divides; one of each; one
#: row; all there is; whole tiles, for the copy engine.
CASES = [
    ((21, 107, (45, 17, 33)), 40),
    ((1, 1, (1,)), 1),
    ((1, 507, (123,)), 1),
    ((3, 507, (123, 8)), 507),
    ((32, 96, (32,)), 17),
]
by_case = pytest.mark.parametrize(("shape", "k"), CASES, ids=str)
EPS = torch.finfo(torch.float32).eps


def ids_of(rows: int, vocab: int, k: int) -> dict[str, Tensor]:
    """Tokens that a teacher kept, distinct in a row, and a label, which may be among them."""
    kept = torch.stack([torch.randperm(vocab)[:k] for _ in range(rows)])
    labels = torch.where(torch.arange(rows) % 2 == 0, kept[:, -1], torch.randint(vocab, (rows,)))
    return {"labels": labels[:, None], "kept": kept}


def statistics(streams: list[Stream], inputs: dict[str, Tensor], **how) -> tuple[RowStats, ...]:
    """The kernels', those of float64 and of float32, of all that goes with a tail."""
    count = len(streams)
    normalizers: list[Statistic] = [Normalizer(j) for j in range(count)]
    moments = [Moment(count - 1, tuple([-1.0, 0.0, 1.0][3 - count :]))] * (count > 1)
    wanted = [*normalizers, *moments, Argmax(), Picked("labels"), Picked("kept"), TAIL]
    dense = [
        measure(wanted, Block(logits_of(streams, dtype), 0, inputs), None)
        for dtype in (torch.float64, torch.float32)
    ]
    return run_statistics(streams, wanted, inputs, **how), *dense


def log_tail(stats: RowStats) -> Tensor:
    return stats[TAIL][0].nan_to_num(neginf=0) + stats[TAIL][1].log()


@by_case
def test_statistics(shape, k: int) -> None:
    """Dtypes and copies take turns."""
    turn = CASES.index((shape, k))
    streams = make_streams(shape, len(shape[2]), DTYPES[turn % 3])
    inputs = ids_of(*shape[:2], k)
    stats, exact, dense = statistics(streams, inputs, splits=3, tma=turn % 2 == 0)
    for statistic in exact:
        if statistic == TAIL or statistic == Argmax():
            continue
        ours, reference, like = (finished(x, statistic) for x in (stats, exact, dense))
        fine = reference.isfinite()
        assert torch.equal(ours[~fine], reference[~fine]), statistic
        scale = max(reference[fine].norm(), exact.maximum()[exact.maximum().isfinite()].norm())
        room = max((like - reference)[fine].norm(), EPS * scale)
        assert (ours - reference)[fine].norm() <= VALUES * room, statistic
    ours, reference, like = (log_tail(x) for x in (stats, exact, dense))
    fine = reference.isfinite()
    assert torch.equal(ours[~fine], reference[~fine])
    assert_by_norm(ours[fine], reference[fine], like[fine], VALUES, EPS)
    if k == shape[1]:
        assert (stats[TAIL][0] == -torch.inf).all() and (stats[TAIL][1] == 0).all()


def large(mass: float) -> tuple[list[Stream], dict[str, Tensor]]:
    """Kept tokens with logits about ``mass`` higher than the others'; -inf is lower than any."""
    streams = make_streams(((5, 107, (33,))), 1, torch.bfloat16)
    streams[0].head, streams[0].bias = HeadOptions(), torch.randn(107)
    inputs = ids_of(1, 107, 23)
    inputs = {name: x.expand(5, -1) for name, x in inputs.items()}
    streams[0].bias[inputs["kept"][0]] += mass if mass > 0 else 0
    if mass < 0:
        streams[0].bias[inputs["kept"][0]] = mass
    return streams, inputs


@pytest.mark.parametrize("mass", [1e4, 90.0, 16.0, -16.0, -1e4, -torch.inf])
def test_a_tail_has_digits_of_its_own(mass: float) -> None:
    """Statistics and gradient where the tail is too small for a probability, or all there is."""
    streams, inputs = large(mass)
    stats, exact, dense = statistics(streams, inputs, splits=4, tma=False)
    assert_by_norm(*(log_tail(x) for x in (stats, exact, dense)), VALUES, EPS)
    terms = LogitGradient(outside={"kept": torch.rand(5) + 0.5})
    out = gradient_of(streams, stats, terms, (0, 107), torch.float32, tma=False)
    shares = logits_of(streams, torch.float64)[0].scatter(1, inputs["kept"], -torch.inf).softmax(1)
    expected = shares * terms.outside["kept"][:, None].double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0.0)


def test_no_tail_is_left() -> None:
    """All other tokens are impossible, and so is a share of nothing."""
    streams, inputs = large(1e4)
    others = torch.ones(107, dtype=torch.bool).scatter(0, inputs["kept"][0], False)
    streams[0].bias[others] = -torch.inf
    stats, *_ = statistics(streams, inputs, splits=4, tma=True)
    assert (stats[TAIL][0] == -torch.inf).all() and (stats[TAIL][1] == 0).all()
    terms = LogitGradient(outside={"kept": torch.ones(5)})
    assert not gradient_of(streams, stats, terms, (0, 107), torch.float32, tma=True).any()


def gradient_of(
    streams: list[Stream],
    stats: RowStats,
    terms: LogitGradient,
    span: tuple[int, int],
    dtype: torch.dtype,
    *,
    tma: bool,
) -> Tensor:
    """The kernel's gradient of the vocabulary entries of ``span``, written over NaN."""
    rows, (a, b), used = streams[0].hidden.shape[0], span, list(range(len(streams)))
    out = torch.full((rows, b - a + 7), torch.nan, dtype=dtype)[:, : b - a]
    operands = operands_of(streams).cut(a, [s.weight[a:b] for s in streams])
    fused.gradient_launch(operands, used, SMALL, stats, terms, out, a, None, tma=tma).run()
    return out


@by_case
def test_gradient_of_a_block(shape, k: int) -> None:
    """Tail, label, kept tokens and the other terms at once, against the torch row pass."""
    turn = CASES.index((shape, k)) + 1
    dtype, (rows, vocab, _), count = DTYPES[turn % 3], shape, len(shape[2])
    streams, inputs = make_streams(shape, count, dtype), ids_of(*shape[:2], k)
    _, stats, _ = statistics(streams, inputs, splits=1, tma=False)
    terms = LogitGradient(
        student=torch.randn(rows),
        moments={j: torch.randn(rows) for j in range(count - 1)},
        probabilities={j: torch.randn(rows) for j in range(1, count)},
        sparse=[(ids, torch.randn(ids.shape)) for ids in inputs.values()],
        outside={"kept": torch.randn(rows)},
    )
    a, b = min(33, vocab // 3), min(33 + 64, vocab)
    out = gradient_of(streams, stats, terms, (a, b), dtype, tma=turn % 2 == 0)
    check_gradient(out, streams, stats, terms, (a, b), inputs)


def test_a_tail_of_ids_that_are_not_picked_is_left_to_the_row_passes() -> None:
    assert Measured.of([0], [Normalizer(0), TAIL, Picked("labels")]) is None
    assert Measured.of([0], [Normalizer(0), TAIL, Picked("labels"), Picked("kept")]) is not None


# --- through the engine ---


@pytest.fixture
def fused_calls(calls_of: Callable[..., list[str]]) -> list[str]:
    """Names of the steps over logits, fused or in memory, that ran."""
    return calls_of(triton_backend, "plan_statistics", "plan_gradient", "Passes")


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(fused_calls: list[str], kind: str) -> None:
    """Every divergence by the rule; tails, dtypes and schedules take turns."""
    turn = KINDS.index(kind)
    plan = pk.PlanRequest("late", "triton", vocab_block=256)
    if turn % 3 == 0:
        plan = pk.PlanRequest("kept", "triton", kept_rows=4)
    dtype = [torch.bfloat16, torch.float16][turn % 2]
    offline.check_accuracy(kind, "bucket", turn % 4 < 2, dtype, plan)
    assert {"plan_statistics", "plan_gradient"} <= set(fused_calls)
    assert ("Passes" in fused_calls) == (plan.schedule == "kept")


@pytest.mark.parametrize(("lift", "k"), [(14.0, 7), (0.0, 40), (-6.0, 1)])
def test_digits_of_a_mixture(fused_calls: list[str], lift: float, k: int) -> None:
    """Cross-entropy and an offline teacher, judged as float32 products: values and gradients.

    Where kept tokens have nearly all the mass, those of the others are judged by themselves.
    """
    rows, vocab, size = 19, 301, 48
    hidden, weight = torch.randn(rows, size).bfloat16(), torch.randn(vocab + 5, size).bfloat16() / 7
    kept = torch.randperm(vocab)[:k]
    hidden[:, 0] = 1
    weight[:, 0] = 0
    weight[kept, 0] = lift
    labels = kept[torch.randint(k, (rows,))]
    labels[4] = -100
    live, others = labels >= 0, torch.ones(vocab, dtype=torch.bool).scatter(0, kept, False)
    ids, oracle = kept.expand(rows, k), Rounded([(hidden[live], weight[:vocab])])
    exact = oracle.logprobs(torch.float64, HeadOptions())[0].detach()
    logprobs = torch.full((rows, k), -5.0, dtype=torch.float64)
    noise = 0.3 * torch.rand(exact.shape[0], k, dtype=torch.float64)
    logprobs[live] = exact.gather(1, ids[live]) - noise
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = pk.linear_distill(
        pk.Head(*leaves, vocab_size=vocab),
        labels,
        teacher=pk.TopKTeacher(ids, logprobs.float()),
        reduction="none",
        plan=pk.PlanRequest("late", "triton", vocab_block=128),
    )
    assert found.divergence is not None
    upstream = torch.rand(2, rows)
    loss = (found.cross_entropy * upstream[0] + found.divergence * upstream[1]).sum()
    got = torch.autograd.grad(loss, leaves)
    assert fused_calls == ["plan_statistics"] + ["plan_gradient"] * 3
    values, gradients, functional = [], [], TopKDivergence("forward_kl")
    for working in (torch.float64, torch.float32):
        z = oracle.logprobs(working, HeadOptions())[0]
        ce = -z.gather(1, labels[live, None])[:, 0]
        kl = oracles.topk_divergence(functional, z, ids[live], logprobs[live].float())
        values.append((ce, kl))
        total = (ce * upstream[0, live] + kl * upstream[1, live]).sum()
        gradients.append(oracle.gradients(total))
    assert ((exact[:, others].exp().sum(1) < 1e-3) == (lift > 0)).all()
    for mine, *judges in zip(
        (found.cross_entropy[live], found.divergence[live]), *values, strict=True
    ):
        assert_by_norm(mine.double(), *(x.detach().double() for x in judges), VALUES, 4 * EPS)
    half = torch.finfo(torch.bfloat16).eps
    mine = got[0][live], got[1][:vocab], got[1][:vocab][others]
    judges = [(d, w, w[others]) for d, w in gradients]
    for g, reference, dense in zip(mine, *judges, strict=True):
        assert_by_norm(g.double(), reference.double(), dense.double(), GRADIENTS, half)


def distilled(plan: pk.PlanRequest, rows: int = 40) -> tuple[Tensor, ...]:
    """Loss and gradients: cross-entropy, an offline teacher, an online advantage, by token."""
    torch.manual_seed(5)
    vocab, heads = 203, []
    for size in (32, 48, 16):
        hidden, weight = torch.randn(rows, size).bfloat16(), torch.randn(vocab, size).bfloat16() / 4
        heads.append(pk.Head(hidden, weight))
    student = pk.Head(heads[0].hidden.requires_grad_(), heads[0].weight.requires_grad_())
    ids = (
        torch.stack([torch.randperm(vocab)[:9] for _ in range(rows)])
        if rows
        else torch.zeros(0, 9).long()
    )
    weights = torch.rand(3, rows) * (torch.rand(3, rows) < 0.6)
    loss = pk.linear_distill(
        student,
        torch.randint(vocab, (rows,)),
        teacher=pk.TopKTeacher(ids, torch.rand(rows, 9).log_softmax(-1) - 0.2),
        aligned=heads[1],
        reference=heads[2],
        ce_weight=weights[0],
        divergence_weight=weights[1],
        advantage_weight=weights[2],
        reduction="sum",
        plan=plan,
    ).loss
    assert loss is not None
    return loss.detach(), *torch.autograd.grad(loss, (student.hidden, student.weight))


def test_three_streams_and_a_filter(fused_calls: list[str]) -> None:
    """Each token with what it asks for, over logits in memory, fused, and tile by tile."""
    memory = distilled(pk.PlanRequest("early", "triton"))
    assert set(fused_calls) == {"Passes"}
    fused_calls.clear()
    for level in (0.0, 1e-30):
        plan = pk.PlanRequest("late", "triton", filter=level, vocab_block=80)
        for mine, like in zip(distilled(plan), memory, strict=True):
            error, eps = (mine.double() - like.double()).norm(), torch.finfo(torch.bfloat16).eps
            assert error <= 2 * GRADIENTS * eps * like.double().norm()
    assert "Passes" not in fused_calls


def test_scoring_and_no_rows(fused_calls: list[str]) -> None:
    """Without a gradient, some rows at a time; with none that counts, nothing runs."""
    hidden, weight = torch.randn(37, 32).bfloat16(), torch.randn(131, 32).bfloat16()
    ids = torch.stack([torch.randperm(131)[:5] for _ in range(37)])
    teacher = pk.TopKTeacher(ids, torch.rand(37, 5).log_softmax(-1) - 0.1)
    found = []
    for rows in (None, 8):
        plan = pk.PlanRequest(None, "triton", token_block=rows)
        student = pk.Head(hidden, weight)
        found.append(pk.linear_divergence(student, teacher, reduction="none", plan=plan))
    assert torch.equal(*found)
    assert set(fused_calls) == {"plan_statistics"}
    fused_calls.clear()
    student = pk.Head(hidden.requires_grad_(), weight.requires_grad_())
    nobody = torch.full((37,), -100)
    loss = pk.linear_divergence(student, teacher, labels=nobody, plan="late:triton")
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and not any(g.any() for g in gradients)
    assert all(torch.isfinite(x).all() for x in distilled(pk.PlanRequest("late", "triton"), rows=0))
    assert not fused_calls
