"""The C++ row passes at the edges: special values, precision, determinism, bad arguments."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from row_pass_harness import (
    DTYPES,
    HEADS,
    INF,
    NAN,
    C,
    State,
    Stream,
    Terms,
    make_streams,
    run_gradient,
)
from torch import Tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [7, 5000])
def test_infinite_and_huge_logits(dtype: torch.dtype, cols: int) -> None:
    streams = make_streams(2, 5, cols, dtype, {})
    for stream in streams:
        stream.logits[0] = torch.where(torch.rand(cols) < 0.5, 1e4, -1e4)
        stream.logits[1, ::2] = -INF
        stream.logits[2] = -INF
        stream.logits[3] = -INF
        stream.logits[3, cols - 1] = 2.5
    streams[1].logits[4, 3] = -INF  # mass where the other stream has none
    moments = [(0, (1.0, 0.0)), (0, (1.0, -1.0))]
    state = State(streams, moments).add()
    a = streams[0].transformed()[0]
    lse = state.maxima[0] + state.sums[0].log()
    torch.testing.assert_close(lse.double(), a.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert state.maxima[0, 2] == -INF
    assert state.sums[0, 2] == 0
    assert state.argmax[2] == 0
    assert torch.equal(state.moment[:, 2], torch.zeros_like(state.moment[:, 2]))
    assert not state.moment[:, :4].isnan().any()
    assert state.moment[0].isfinite().all()
    assert state.moment[1, 4] == INF

    c1 = torch.full((5,), -1.0, dtype=state.sums.dtype)
    terms = Terms(c1=c1, q=[c1, None])
    out = torch.full((5, cols), NAN, dtype=dtype)
    run_gradient(streams, state.maxima, state.sums, terms, out)
    assert out.isfinite().all()
    assert (out[1, ::2] == 0).all()
    assert (out[2] == 0).all()
    assert out[3, cols - 1] == -1


@pytest.mark.parametrize("bits_sign", [1.0, -1.0])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_its_row_only(dtype: torch.dtype, count: int, bits_sign: float) -> None:
    streams = make_streams(count, 3, 5000, dtype, {})
    # a NaN with its sign bit set is the smallest integer, not the largest
    streams[0].logits[1, 4321] = torch.copysign(torch.tensor(NAN), torch.tensor(bits_sign))
    zeros = (0.0,) * (count - 1)
    state = State(streams, [(0, (1.0, *zeros))]).add()
    for values in (state.maxima[0], state.sums[0], state.moment[0], state.total, state.best):
        assert values.isnan().tolist() == [False, True, False]
    assert state.argmax[1] == 4321


def unit_rows(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Maxima of 0 and sums of 1: the share of a logit is its exponential."""
    return torch.zeros(1, count, dtype=dtype), torch.ones(1, count, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_to_two_ulp(dtype: torch.dtype) -> None:
    lowest = math.log(torch.finfo(dtype).tiny)
    x = torch.linspace(lowest * 1.2, 0, 200_001, dtype=torch.float64).to(dtype)[None]
    x[0, :3] = torch.tensor([-INF, torch.finfo(dtype).min, NAN])
    out = torch.empty_like(x)
    run_gradient([Stream(x)], *unit_rows(1, dtype), Terms(c1=torch.ones(1, dtype=dtype)), out)
    assert (out[0, :2] == 0).all()
    assert out[0, 2].isnan()
    normal = x >= math.nextafter(lowest, 0)
    assert (out[x < lowest * 1.0001] == 0).all()
    exact = x[normal].double().exp()
    ulp = torch.finfo(dtype).eps * 2.0 ** exact.log2().floor()
    # the double oracle is itself one rounding away
    assert ((out[normal].double() - exact).abs() <= 2.0 * ulp).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softcap_is_relatively_accurate_near_zero_and_when_saturated(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    z = torch.logspace(-30, 3, 5001, dtype=torch.float64).to(dtype)
    z = torch.cat([z, -z, torch.tensor([0.0, INF, -INF], dtype=dtype)])[:, None]
    stream = Stream(z, softcap=3.0)
    state = State([stream]).add()
    u = z[:, 0].double() / 3.0
    torch.testing.assert_close(
        state.maxima[0].double(), 3.0 * u.tanh(), rtol=8 * eps, atol=0, equal_nan=True
    )
    out = torch.empty_like(z)
    ones = torch.ones(len(z), dtype=dtype)
    zeros = torch.zeros_like(ones)
    run_gradient([stream], *unit_rows(len(z), dtype), Terms(c0=ones, c1=zeros), out)
    decay = (-2 * u.abs()).exp()
    exact = 4 * decay / (1 + decay) ** 2  # 1 - tanh^2 without its cancellation
    moderate = u.abs() < 10
    # an error of eps in u is one of 2 u eps in its exponential
    torch.testing.assert_close(
        out[moderate, 0].double(), exact[moderate], rtol=48 * eps, atol=0, equal_nan=True
    )
    assert (out[~moderate] < 1e-8).all()


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    patterns = torch.randint(-(2**31), 2**31, (20_000,)).to(torch.int32)
    ties = (torch.arange(0, 2**15, 5, dtype=torch.int32) << 16) | 0x8000
    edges = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F7FFFFF, 0x7F800000, 0x00000001])
    values = torch.cat([patterns, ties, edges.to(torch.int32)]).view(torch.float32)
    logits = torch.full((len(values), 1), -INF, dtype=torch.bfloat16)
    out = torch.empty_like(logits)
    terms = Terms(c0=values, c1=torch.zeros_like(values))
    run_gradient([Stream(logits)], *unit_rows(len(values), torch.float32), terms, out)
    torch.testing.assert_close(out[:, 0], values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_over_a_long_flat_row_stays_accurate(dtype: torch.dtype) -> None:
    streams = make_streams(1, 2, 131_072, dtype, {}, spread=0.01)
    state = State(streams, [(0, (1.0,))]).add()
    a = streams[0].transformed()[0]
    exact = (a - a.amax(1, keepdim=True)).exp().sum(1)
    torch.testing.assert_close(state.sums[0].double(), exact, rtol=1.5e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 3000), (3, 70_001)])
def test_same_bits_for_every_run_and_thread_count(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    streams = make_streams(2, *shape, dtype, HEADS["softcap"])
    moments = [(0, (1.0, -1.0))]
    first = State(streams, moments, threads=1).add()
    terms = Terms(c1=torch.randn(shape[0], dtype=first.sums.dtype))
    empty = torch.empty(*shape, dtype=dtype)
    out = run_gradient(streams, first.maxima, first.sums, terms, empty, threads=1)
    for threads in (1, 2, 2, 3):
        again = State(streams, moments, threads=threads).add()
        for left, right in zip(first.everything, again.everything, strict=True):
            assert torch.equal(left, right)
        other = run_gradient(
            streams, first.maxima, first.sums, terms, torch.empty_like(out), threads=threads
        )
        assert torch.equal(out, other)


def test_nothing_to_do_changes_nothing() -> None:
    stream = Stream(torch.empty(0, 7))
    assert State([stream]).add().sums.shape == (1, 0)
    state = State([Stream(torch.randn(3, 7))])
    state.add(0, 0)
    assert (state.maxima == -INF).all()
    assert (state.argmax == -1).all()
    absmax = torch.full((1,), NAN)
    terms = Terms(c1=torch.empty(0))
    run_gradient([stream], torch.empty(1, 0), torch.empty(1, 0), terms, stream.logits, 0, 7, absmax)
    assert absmax.tolist() == [0]


BAD_STATISTICS = {
    "dtype": {"dtype": "float16"},
    "rows": {"rows": -1},
    "cols": {"cols": -4},
    "threads": {"threads": 0},
    "streams": {"streams": []},
    "streams[0] logits": {"streams": [(0, 7, 0, 1.0, 0.0, 1.0)]},
    "streams[0] ld": {"streams": [(64, 6, 0, 1.0, 0.0, 1.0)]},
    "streams[0] scale": {"streams": [(64, 7, 0, NAN, 0.0, 1.0)]},
    "streams[0] softcap": {"streams": [(64, 7, 0, 1.0, -1.0, 1.0)]},
    "streams[0] temperature": {"streams": [(64, 7, 0, 1.0, 0.0, 0.0)]},
    "maxima": {"maxima": []},
    "sums[0]": {"sums": [0]},
    "moments[0] weight stream": {"moments": [(1, (1.0,), 64)]},
    "moments[0] coefficients": {"moments": [(0, (1.0, 2.0), 64)]},
    "moments[0]:": {"moments": [(0, (1.0,), 0)]},
    "moments:": {"moments": [(0, (1.0,), 64)] * 5},
    "argmax_value": {"argmax": 64},
}
BAD_GRADIENT = {
    "out:": {"out": 0},
    "out_ld": {"out_ld": 6},
    "q:": {"q": [0, 0]},
    "p:": {"p": [0, 0]},
    "sparse k": {"sparse": (64, -1)},
    "sparse_ids": {"sparse": (0, 1), "sparse_values": 64},
    "sparse_values": {"sparse": (64, 1)},
    "outside_ids": {"outside_value": 64},
    "divergence teacher": {"divergence": ("jsd", 0.5, 1)},
    "tile": {"tile_absmax": 64},
    "rows": {"rows": -1},
}


@pytest.mark.parametrize(
    ("function", "name", "change"),
    [("row_statistics", k, v) for k, v in BAD_STATISTICS.items()]
    + [("row_gradient", k, v) for k, v in BAD_GRADIENT.items()],
)
def test_bad_arguments_raise_before_any_pointer_is_read(
    function: str, name: str, change: dict[str, Any]
) -> None:
    common = {"dtype": "float32", "streams": [(64, 7, 0, 1.0, 0.0, 1.0)], "rows": 3, "cols": 7}
    common |= {"vocab_offset": 0, "maxima": [64], "sums": [64], "threads": 1}
    if function == "row_statistics":
        own = {"moments": [], "total": 0, "argmax": 0, "argmax_value": 0}
    else:
        own = {"out": 64, "out_ld": 7, "terms": C.GradientTerms(), "tile": 0, "tile_absmax": 0}
        for field in [f for f in change if hasattr(own["terms"], f)]:
            setattr(own["terms"], field, change[field])
            change = {k: v for k, v in change.items() if k != field}
    with pytest.raises(ValueError, match=r"expected .*, got ") as error:
        getattr(C, function)(**{**common, **own, **change})
    assert str(error.value).startswith(name)


def test_simd_level_is_what_was_asked_for() -> None:
    wish = os.environ.get("PAD_KERNELS_SIMD", "")
    assert C.simd_level() in ("avx512", "avx2", "baseline")
    if wish == "baseline":
        assert C.simd_level() == "baseline"
    if wish == "avx2":
        assert C.simd_level() != "avx512"
    assert "-O3" in C.cxx_info()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_lower_levels_pass_these_files(level: str) -> None:
    if C.simd_level() == level:
        pytest.skip(f"{level} is what this run has used")
    files = sorted(str(path) for path in Path(__file__).parent.glob("test_row_pass*.py"))
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not lower_levels"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "PAD_KERNELS_SIMD": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
