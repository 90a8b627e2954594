"""The Triton row passes under Triton's interpreter.

It is not collected by itself: whether kernels are interpreted is decided when triton is imported.
Every case is the one of the other backends' tests, with this backend named.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import functional_cases as functionals
import oracles
import pytest
import random_heads
import test_distill
import test_divergence as divergences
import test_functionals
import test_offline_teachers as offline
import test_parity as parity
import torch
from parity_cases import Route, case
from torch import Tensor

import pad_kernels as pk
from pad_kernels.backends.base import RawBlock
from pad_kernels.backends.choice import get_backend
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.plan import ALIGNED
from pad_kernels.functionals import Divergence, LogitGradient
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Normalizer,
    RowStats,
    Statistic,
    Tail,
    Total,
    empty_stats,
)
from pad_kernels.heads import HeadOptions

# float16 is multiplied as on a GPU.
pytestmark = pytest.mark.usefixtures("poisoned", "one_thread", "multiply_float16")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = {
    name: pk.PlanRequest(name.split("-")[0], "triton", **blocks)
    for name, blocks in {
        "early": {"token_block": 7},
        "late": {"vocab_block": 150},
        "kept": {"vocab_block": 200, "kept_rows": 6},
    }.items()
}
#: What is compared with what.
BACKENDS = ("torch_blocked", "triton")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


# --- whole ops: every functional, mixtures, schedules ---


@pytest.mark.parametrize("functional", functionals.EXAMPLES, ids=str)
def test_every_functional(functional: Any) -> None:
    """The schedules and dtypes take turns over the functionals; the mixtures see all schedules."""
    turn = functionals.EXAMPLES.index(functional)
    name = [*PLANS][turn % 3]
    check = functionals.check_total if name == "early" else functionals.check_tokens
    check((functional,), DTYPES[turn // 3 % 3], PLANS[name])


@pytest.mark.parametrize("mixture", [m for m in functionals.MIXTURES if m != "everything"])
@pytest.mark.parametrize("name", PLANS)
def test_mixtures(mixture: str, name: str) -> None:
    check = functionals.check_total if name == "early" else functionals.check_tokens
    turn = [*PLANS].index(name) + [*functionals.MIXTURES].index(mixture)
    check(functionals.MIXTURES[mixture], DTYPES[turn % 3], PLANS[name], None if turn % 2 else 5.0)


CASES = [
    *("plain", "every_option", "softcap_saturated", "negative_scale", "zero_scale", "cold"),
    *("no_tokens", "one_token", "one_entry", "all_ignored", "none_ignored", "minus_infinity"),
    *("label_without_probability", "huge_logits", "confident", "confident_capped"),
    *("hidden_of_three_dimensions", "weight_strided_both_ways", "vocab_size_one"),
]


@pytest.mark.parametrize("name", CASES)
def test_awkward_inputs(name: str) -> None:
    dtype = DTYPES[CASES.index(name) % 3]
    parity.test_token_stats(Route("triton", "late", odd=False), dtype, name)
    x = case(name, DTYPES[(CASES.index(name) + 1) % 3])
    loss = ("sum_smoothed", "z_loss_normalizer", "weighted")[CASES.index(name) % 3]
    parity._cross_entropy(x, Route("triton", "early", odd=False), name, loss)


def test_argmax_is_the_first_of_equals() -> None:
    x = case("ties", torch.float32)
    z = x.hidden @ x.weight.T
    first = (z == z.amax(-1, keepdim=True)).int().argmax(-1)
    _, stats = x.ours(pk.linear_token_stats, x.labels, plan=PLANS["late"])
    assert torch.equal(stats.argmax[x.labels >= 0], first[x.labels >= 0])


@pytest.mark.parametrize("kind", divergences.KINDS)
def test_minus_infinity(kind: str) -> None:
    divergences.test_minus_infinity(kind, "triton", "none")


@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_any_mixture(scale: float, kind: str) -> None:
    divergences.test_any_mixture(scale, 0.9, kind, "triton")


def test_certain_students() -> None:
    divergences.test_certain_students_have_no_gradient("late", "triton")


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_tiny_divergences(kind: str) -> None:
    """True values near 1e-6 of a large vocabulary, which float32 sums would lose."""
    hidden = torch.randn(3, 32).bfloat16().float()
    weight = (torch.randn(32000, 32) / 32**0.5).bfloat16().float()
    student, teacher = pk.Head(hidden, weight, torch.randn(32000) * 1.5e-3), pk.Head(hidden, weight)
    z = [random_heads.logits(x) for x in (student, teacher)]
    exact = oracles.between(kind, 0.5, *z)
    assert 1e-8 < float(exact.median()) < 5e-6
    found = pk.linear_divergence(student, teacher, kind=kind, reduction="none", plan="late:triton")
    assert float((found.double() - exact).abs().max()) < 1e-8


@pytest.mark.parametrize("functional", test_functionals.ALIKE[:3:2], ids=str)
def test_equal_models(functional: Any) -> None:
    test_functionals.test_a_student_that_is_its_teacher_has_no_divergence(
        functional, torch.bfloat16, "triton"
    )


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("likely", [True, False], ids=["likely", "unlikely"])
@every_dtype
def test_offline_teachers(tail: str, likely: bool, dtype: torch.dtype) -> None:
    kind = "forward_kl" if likely else "jsd"
    offline.check_accuracy(kind, tail, likely, dtype, "late:triton")


@pytest.mark.parametrize("schedule", ["early", "kept"])
def test_mixtures_of_losses(schedule: str) -> None:
    """Rows that use different teachers: a part of the rows lacks streams of the others."""
    kind = {"early": "jsd", "kept": "forward_kl"}[schedule]
    test_distill.test_a_mixture_is_the_sum_of_its_parts(kind, schedule, "triton")


def test_what_it_cannot_do_is_refused_by_name() -> None:
    two = (Divergence("jsd", 0.5), Divergence("tvd"))
    with pytest.raises(ValueError, match=r"'triton', which cannot: .* room for 1 of Outcomes"):
        functionals.setup(torch.float32).call(two, "late:triton")[1].tokens(two)
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'triton', which cannot: no row pass for torch.float64"):
        pk.linear_logprob(x, x, torch.arange(3), plan="triton")


# --- the filter ---


@every_dtype
def test_filtered_gradients_are_within_their_bound(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    rows, vocab, bound = 12, 1300, 1e-3
    hidden = torch.randn(rows, 16).to(dtype)
    weight = (torch.randn(vocab, 16) / 4).to(dtype)
    bias = torch.where(torch.arange(vocab) // 256 == 2, 12.0, 0.0).to(dtype)
    labels = torch.randint(512, 768, (rows,))
    found = []
    for filtered in (0.0, bound):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        plan = pk.PlanRequest("late", "triton", filter=filtered, vocab_block=1024)
        loss = pk.linear_cross_entropy(*leaves, labels, bias=bias, reduction="sum", plan=plan)
        found.append(torch.autograd.grad(loss, leaves))
    (exact_hidden, exact_weight), (d_hidden, d_weight) = found
    left_out = (d_weight == 0).all(1) & (exact_weight != 0).any(1)
    assert left_out[:512].any() and not left_out[512:768].any()
    limit = bound * hidden.double().norm(dim=1).sum()
    assert float((d_weight - exact_weight).double().norm(dim=1).max()) <= float(limit) * 1.01
    limit = bound * weight[left_out].double().norm(dim=1).sum()
    slack = 4 * torch.finfo(dtype).eps * float(exact_hidden.double().norm())
    assert float((d_hidden - exact_hidden).double().norm(dim=1).max()) <= float(limit) + slack


# --- the passes by themselves ---

BOUND = torch.tensor(0.1)  # of a filter: the passes find the largest magnitudes for it

STATISTICS: list[Statistic] = [
    *(Normalizer(j) for j in range(3)),
    Moment(0, (1.0,)),
    Moment(1, (-1.0, 1.0)),
    Moment(0, (0.0, 1.0, -1.0)),
    Total(),
    Argmax(),
    Tail("ids"),
]
HEADS = {
    "plain": HeadOptions(),
    "scaled": HeadOptions(logit_scale=0.4, temperature=1.7),
    "capped": HeadOptions(softcap=4.0, logit_scale=1.3, temperature=0.8),
}
SHAPES = [(1, 1), (5, 7), (3, 507), (2, 5000)]


def block(
    rows: int, cols: int, dtype: torch.dtype, head: HeadOptions, biased: bool
) -> tuple[Any, dict[int, Tensor], dict[str, Tensor]]:
    """A problem of three streams, logits inside wider, NaN-padded storage, and ids."""
    logits = {}
    for j in range(3):
        storage = torch.full((rows, cols + 5), torch.nan, dtype=dtype)
        storage[:, :cols] = torch.randn(rows, cols) * 3
        logits[j] = storage[:, :cols]
    streams = [
        SimpleNamespace(bias=torch.randn(cols) if biased else None, head=head) for _ in range(3)
    ]
    ids = torch.stack([torch.randperm(cols)[: max(cols // 40, 1)] for _ in range(rows)])
    problem = SimpleNamespace(streams=streams, accumulate=torch.float32)
    return problem, logits, {"ids": ids}


def piece(logits: Tensor, begin: int, end: int) -> Tensor:
    """A chunk of logits as a plan for a GPU lays it out: rows padded, here with NaN."""
    padding = (0, (begin - end) % ALIGNED)
    return torch.nn.functional.pad(logits[:, begin:end], padding, value=torch.nan)[:, : end - begin]


def measured(
    backend: str,
    problem: Any,
    logits: dict[int, Tensor],
    inputs: dict[str, Tensor],
    cuts: list[int],
) -> RowStats:
    """Statistics of a block, chunk by chunk."""
    rows = logits[0].shape[0]
    stats = empty_stats(STATISTICS, rows, inputs, torch.device("cpu"))
    for begin, end in itertools.pairwise(cuts):
        chunk = {j: piece(z, begin, end) for j, z in logits.items()}
        get_backend(backend).measure(RawBlock(problem, stats, chunk, begin), STATISTICS)
    return stats


def close(ours: RowStats, exact: RowStats, rtol: float, cols: int) -> None:
    for statistic in STATISTICS:
        a, b = ours[statistic], exact[statistic]
        atol = rtol * float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
        if statistic == Total():  # of terms of about 3, which cancel
            atol += 3e-7 * cols
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=f"{statistic}: {a} for {b}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_statistics_of_chunks(name: str, shape: tuple[int, int]) -> None:
    """The dtypes take turns: each meets every shape and every head."""
    dtype = DTYPES[([*HEADS].index(name) + SHAPES.index(shape)) % 3]
    problem, logits, inputs = block(*shape, dtype, HEADS[name], biased=name != "plain")
    cols = shape[1]
    if cols > 100:  # a chunk in which a stream is empty, one that is huge, and single holes
        logits[1][0, 97:250] = -torch.inf
        logits[0][1, 97:101] = -torch.inf
        logits[2][-1, 250:] += 100
        logits[0][-1, ::7] = -torch.inf
    exact = measured("torch_blocked", problem, logits, inputs, [0, cols])
    for cuts in ([0, cols], sorted({0, min(97, cols), min(250, cols), cols})):
        close(measured("triton", problem, logits, inputs, cuts), exact, 3e-6, shape[1])


def test_rows_without_any_entry() -> None:
    problem, logits, inputs = block(3, 507, torch.float32, HeadOptions(), biased=False)
    for z in logits.values():
        z[1] = -torch.inf
    stats = measured("triton", problem, logits, inputs, [0, 100, 507])
    exact = measured("torch_blocked", problem, logits, inputs, [0, 507])
    close(stats, exact, 3e-6, 507)


def test_a_nan_reaches_its_row_and_no_other() -> None:
    problem, logits, inputs = block(3, 507, torch.float32, HeadOptions(), biased=False)
    logits[0][1, 200] = torch.nan
    stats = measured("triton", problem, logits, inputs, [0, 100, 507])
    bad = stats[Normalizer(0)][1].isnan()
    assert bad.tolist() == [False, True, False]
    assert stats[Argmax()][0, 1] == 200


def test_two_runs_have_the_same_bits() -> None:
    problem, logits, inputs = block(2, 5000, torch.bfloat16, HEADS["capped"], biased=True)
    a, b = (measured("triton", problem, logits, inputs, [0, 1234, 5000]) for _ in range(2))
    for statistic in STATISTICS:
        assert torch.equal(a[statistic], b[statistic])


@every_dtype
@pytest.mark.parametrize("name", HEADS)
def test_a_labels_logit_has_the_bits_of_its_normaliser(name: str, dtype: torch.dtype) -> None:
    """One entry a row: the maximum is its logit."""
    problem, logits, inputs = block(12, 1, dtype, HEADS[name], biased=True)
    stats = measured("triton", problem, logits, inputs, [0, 1])
    raw = logits[0].float() + problem.streams[0].bias
    found = get_backend("triton").transform(HEADS[name], raw)
    assert torch.equal(found[:, 0].double(), stats[Normalizer(0)][0])


@every_dtype
@pytest.mark.parametrize("kind", [k for k in divergences.KINDS if "_kl" not in k or "skew" in k])
def test_second_sweep_of_chunks(kind: str, dtype: torch.dtype) -> None:
    problem, logits, inputs = block(3, 1400, dtype, HEADS["capped"], biased=True)
    logits[0][0, 10:400], logits[1][1, 300:1000] = -torch.inf, -torch.inf
    curved = Divergence(kind, 0.3, 1)
    exact, ours = (outcomes(b, curved, problem, logits, inputs) for b in BACKENDS)
    atol = 3e-6 * float(exact.abs().max())
    torch.testing.assert_close(ours, exact, rtol=3e-6, atol=atol)


def outcomes(
    backend: str, curved: Divergence, problem: Any, logits: Any, inputs: dict[str, Tensor]
) -> Tensor:
    """A divergence's sums over two chunks, from statistics of the plain torch backend."""
    cols = logits[0].shape[1]
    stats = measured("torch_blocked", problem, logits, inputs, [0, cols])
    stats[curved.outcomes] = torch.zeros(2, len(logits[0]), dtype=torch.float64)
    for begin, end in ((0, cols // 3), (cols // 3, cols)):
        chunk = {j: piece(z, begin, end) for j, z in logits.items()}
        get_backend(backend).measure(RawBlock(problem, stats, chunk, begin), [curved.outcomes])
    return stats[curved.outcomes]


@every_dtype
@pytest.mark.parametrize("in_place", [True, False])
def test_gradient_of_a_chunk(in_place: bool, dtype: torch.dtype) -> None:
    """Every term at once, in place or beside kept logits, with the filter's maxima."""
    problem, logits, inputs = block(3, 700, dtype, HEADS["capped"], biased=True)
    curved = Divergence("skew_forward_kl", 0.3, 2)
    stats = measured("torch_blocked", problem, logits, inputs, [0, 700])
    stats[curved.outcomes] = outcomes("torch_blocked", curved, problem, logits, inputs)
    gradient = LogitGradient(
        constant=torch.randn(3),
        student=torch.randn(3),
        moments={0: torch.randn(3), 1: torch.randn(3)},
        probabilities={1: torch.randn(3), 2: torch.randn(3)},
        sparse=[
            (torch.randint(700, (3, 9)), torch.randn(3, 9)),
            (torch.full((3, 1), 300), torch.ones(3, 1)),
        ],
        outside={"ids": torch.randn(3)},
        curved=[(curved, torch.randn(1, 3))],
    )
    begin, end = 130, 687
    found, peaks = {}, {}
    for backend in BACKENDS:
        chunk = {j: piece(z, begin, end) for j, z in logits.items()}
        room = torch.full((3, 600), torch.nan, dtype=dtype)
        out = chunk[0] if in_place else room[:, : end - begin]
        whole = RawBlock(problem, stats, chunk, begin)
        peaks[backend] = get_backend(backend).gradient(whole, gradient, out, BOUND)
        found[backend] = out.double()
        assert room[:, end - begin :].isnan().all()
    eps = max(torch.finfo(dtype).eps, 2e-6)
    exact, ours = found.values()
    assert float((ours - exact).norm()) <= 2 * eps * float(exact.norm())
    exact_peaks, our_peaks = peaks.values()
    assert our_peaks.shape == (1, -(-(end - begin) // FILTER_TILE))
    torch.testing.assert_close(our_peaks[0], exact_peaks, rtol=2 * eps, atol=0.0)
