"""The row passes of csrc/cuda/ on a CPU, held to what the C++ ones are held to."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cuda_on_cpu
import functional_cases
import pytest
import row_pass_harness
import test_divergence
import test_parity
import test_row_bounds
import test_row_pass
import test_row_pass_numerics
import torch
from parity_cases import NAMES, Route
from row_pass_harness import HEADS, State, make_streams, run_gradient, strided

import pad_kernels as pk
from pad_kernels.functionals.base import Functional

pytestmark = pytest.mark.usefixtures("one_thread")

#: float16 logits are a GPU's alone, float64 ones a CPU's.
DTYPES = [torch.float32, torch.bfloat16]
# one entry; no whole vector; vectors and a rest; more threads' worth than a block has
SHAPES = [(1, 1), (5, 7), (3, 507), (2, 9001)]


@pytest.fixture(scope="module")
def module() -> Any:
    return cuda_on_cpu.load()


@pytest.fixture
def passes(module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The harness calls this module's passes; they take a stream, not a number of threads."""

    def statistics(*args: Any, threads: int, **kwargs: Any) -> None:
        module.row_statistics(*args, **kwargs)

    def gradient(*args: Any) -> None:
        module.row_gradient(*args[:-1], 0)

    replaced = SimpleNamespace(
        row_statistics=statistics,
        row_gradient=gradient,
        row_outcomes=module.row_outcomes,
        head_transform=module.head_transform,
        GradientTerms=module.GradientTerms,
    )
    for place in (row_pass_harness, test_row_pass_numerics):
        monkeypatch.setattr(place, "C", replaced)
    return replaced


@pytest.mark.parametrize(
    ("shape", "head"),
    [
        (shape, head)
        for shape in SHAPES
        for head in (HEADS if shape == (5, 7) else ("plain", "all"))
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_gradient(
    passes: Any, dtype: torch.dtype, shape: tuple[int, int], count: int, head: str
) -> None:
    test_row_pass.test_statistics(dtype, shape, count, head)
    test_row_pass.test_gradient(dtype, shape, count, head)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_and_nearly_equal_streams(passes: Any, dtype: torch.dtype) -> None:
    for count in (1, 2, 3):
        test_row_pass.test_chunks_merge_to_the_whole_in_any_order(count, dtype)
    for apart in (1.0, 1e-3):
        test_row_pass.test_log_ratio_of_two_streams(dtype, "plain", 1, apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(passes: Any, dtype: torch.dtype) -> None:
    for cols in (7, 5000):
        test_row_pass_numerics.test_infinite_and_huge_logits(dtype, cols)
    for count in (1, 2):
        test_row_pass_numerics.test_nan_reaches_its_row_only(dtype, count, 1.0)


@pytest.mark.parametrize("tile", [4, 100, 256, 10_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitudes_of_tiles(passes: Any, dtype: torch.dtype, tile: int) -> None:
    """The caller's zeros are raised to them."""
    streams = make_streams(1, 6, 5001, dtype, {})
    state = State(streams).add()
    tiles = -(-5001 // tile)
    out, absmax = torch.full((6, 5001), torch.nan, dtype=dtype), torch.zeros(tiles + 1)
    terms = row_pass_harness.Terms(c1=torch.randn(6))
    run_gradient(streams, state.maxima, state.sums, terms, out, tile=tile, absmax=absmax)
    padded = torch.zeros(6, (tiles + 1) * tile)
    padded[:, :5001] = out.float().abs()
    torch.testing.assert_close(absmax, padded.view(6, tiles + 1, tile).amax((0, 2)), rtol=0, atol=0)


def test_tiles_narrower_than_a_group_of_columns_are_refused(passes: Any) -> None:
    streams = make_streams(1, 1, 9, torch.float32, {})
    state, absmax = State(streams).add(), torch.zeros(9)
    with pytest.raises(ValueError, match="tile: expected >= 4, got 3"):
        run_gradient(
            *(streams, state.maxima, state.sums, row_pass_harness.Terms(), torch.zeros(1, 9)),
            tile=3,
            absmax=absmax,
        )


def test_float16_is_what_torch_says(module: Any) -> None:
    """Every float16 through a gradient of 0 + (the sparse value at it), so that it is stored."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)[None]
    finite = values.isfinite()
    logits = torch.where(finite, values, 0.0)
    doubles = [torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    best, where = torch.full((1,), -torch.inf, dtype=torch.float64), torch.full((1,), -1)
    maximum, total = torch.full((1,), -torch.inf, dtype=torch.float64), doubles[0].clone()
    stream = (logits.data_ptr(), logits.shape[1], 0, 1.0, 0.0, 1.0)
    module.row_statistics(
        *("float16", [stream], 1, logits.shape[1], 0, [maximum.data_ptr()]),
        *([doubles[0].data_ptr()], []),
        total=total.data_ptr(),
        argmax=where.data_ptr(),
        argmax_value=best.data_ptr(),
    )
    assert maximum.item() == 65504.0 == best.item() and logits[0, where.item()] == 65504.0
    assert abs(total.item()) < 1e-3  # every number and its opposite
    wanted = torch.linspace(-7e4, 7e4, 1 << 16)[None].double() * torch.rand(1 << 16).double() ** 8
    terms = module.GradientTerms()
    ids = torch.arange(1 << 16)[None].contiguous()
    terms.sparse, terms.sparse_values = (ids.data_ptr(), ids.shape[1]), wanted.data_ptr()
    out = torch.empty_like(logits)
    module.row_gradient(
        *("float16", [stream], 1, logits.shape[1], 0, [maximum.data_ptr()]),
        *([doubles[1].data_ptr()], out.data_ptr(), out.shape[1], terms),
    )
    torch.testing.assert_close(out, wanted.float().half(), rtol=0, atol=0)


def test_rows_that_are_not_aligned_alike(passes: Any) -> None:
    """The student's rows and the teacher's at different places of a vector, and the output's."""
    for dtype in DTYPES:
        cols = 77
        student, teacher = make_streams(2, 3, cols, dtype, {})
        shifted = torch.full((3, cols + 4), torch.nan, dtype=dtype)
        shifted[:, 3 : 3 + cols] = teacher.logits
        moved = row_pass_harness.Stream(shifted[:, 3 : 3 + cols])
        moments = [(1, (-1.0, 1.0))]
        plain = State([student, teacher], moments).add()
        odd = State([student, moved], moments).add()
        for a, b in zip(plain.everything, odd.everything, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
        terms = row_pass_harness.Terms(c1=torch.ones(3), p=[None, -torch.ones(3)])
        outs = [
            run_gradient([student, t], plain.maxima, plain.sums, terms, strided(out))
            for t, out in (
                (teacher, student.logits.clone()),
                (moved, torch.zeros(3, cols).to(dtype)),
            )
        ]
        torch.testing.assert_close(*outs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_further_apart_than_an_int_counts(passes: Any, dtype: torch.dtype) -> None:
    test_row_bounds.check_far_apart(dtype)


PLANS = [
    pk.PlanRequest(schedule, "cuda", token_block=5, vocab_block=71, kept_rows=kept)
    for schedule, kept in (("early", None), ("late", None), ("kept", 6))
]


@pytest.mark.parametrize("functional", functional_cases.EXAMPLES, ids=str)
def test_every_functional_from_hidden_states(module: Any, functional: Functional) -> None:
    """Dtypes take turns over the schedules; the passes by themselves have seen every pair."""
    turn = functional_cases.EXAMPLES.index(functional)
    early, late, kept = PLANS
    one, other = DTYPES[turn % 2], DTYPES[1 - turn % 2]
    with cuda_on_cpu.in_place_of_a_gpu(module):
        functional_cases.check_total((functional,), one, early)
        functional_cases.check_tokens((functional,), other, late)
        functional_cases.check_tokens((functional,), one, kept)
        functional_cases.check_total((functional,), other, kept)


@pytest.mark.parametrize("mixture", ["one_stream", "distill", "two_sweeps"])
def test_mixtures_from_hidden_states(module: Any, mixture: str) -> None:
    functionals = functional_cases.MIXTURES[mixture]
    with cuda_on_cpu.in_place_of_a_gpu(module):
        for dtype in (torch.float32, torch.float16):
            functional_cases.check_total(functionals, dtype, PLANS[0], 5.0)
            functional_cases.check_tokens(functionals, dtype, PLANS[1], 5.0)


def test_log_probs_over_awkward_inputs(module: Any) -> None:
    """Ties, -inf, one token, nothing but ignored rows: the parity product's cases."""
    with cuda_on_cpu.in_place_of_a_gpu(module):
        for turn, name in enumerate(NAMES):
            # The host's part of both ops is the cpp backend's, which sees the whole product.
            if turn % 2:
                test_parity.test_logprob(Route("cuda", "late"), torch.bfloat16, name)
            else:
                test_parity.test_token_stats(Route("cuda", "kept", 0.5), torch.float32, name)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "tvd"])
def test_tiny_divergences(module: Any, kind: str) -> None:
    """What is left of two normalisers that agree to seven digits."""
    with cuda_on_cpu.in_place_of_a_gpu(module):
        for spread in (0.3, 4.0):
            test_divergence.test_tiny_divergences_are_right_to_a_tenth(kind, "cuda", spread)
