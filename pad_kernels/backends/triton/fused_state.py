"""Row statistics on the chip: of one tile, of no tile, and of two disjoint parts joined.

A state is a tuple of tuples of row vectors [BLOCK_M]: (maxima, sums, moments, totals, best), the
first two with an entry for each stream, ``moments`` for each moment, ``totals`` and ``best`` with
one entry or none. Maxima are float32, as logits are; sums are float64, so that the number of tiles
does not show in them. The merge is that of ``functionals/statistics.py``.

Moment i is the sum over the row of exp(a_w - max_w) * sum_j c_j (a_j - max_j), w = WEIGHTS[i] and
c_j = COEFFICIENTS[i * STREAMS + j] (one flat tuple: Triton 3.6 does not index nested constants).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pad_kernels.backends.triton.math import (
    finite_or_zero,
    merge_normalizers,
    rescale,
    weighted,
)


@triton.jit
def empty_state(
    STREAMS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TOTAL: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The state of no vocabulary entries."""
    maxima, sums, moments, totals, best = (), (), (), (), ()
    for _ in tl.static_range(STREAMS):
        maxima += (tl.full((BLOCK_M,), -float("inf"), tl.float32),)
        sums += (tl.zeros((BLOCK_M,), tl.float64),)
    for _ in tl.static_range(len(WEIGHTS)):
        moments += (tl.zeros((BLOCK_M,), tl.float64),)
    if TOTAL:
        totals += (tl.zeros((BLOCK_M,), tl.float64),)
    if ARGMAX:
        best += (tl.full((BLOCK_M,), -1, tl.int32),)
    return maxima, sums, moments, totals, best


@triton.jit
def tile_state(
    logits,  # for each stream [BLOCK_M, BLOCK_N], -inf beyond the vocabulary
    col,
    vocab,
    WEIGHTS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TOTAL: tl.constexpr,
    ARGMAX: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The state of one tile."""
    cols = tl.arange(0, BLOCK_N)
    inside = (cols < vocab - col)[None, :]
    maxima, sums, moments, totals, best = (), (), (), (), ()
    masses, shifted = (), ()
    for j in tl.static_range(STREAMS):
        maximum = tl.max(logits[j], 1)
        shifted += (logits[j] - finite_or_zero(maximum)[:, None],)
        mass = tl.exp(shifted[j])
        masses += (mass,)
        maxima += (maximum,)
        sums += (tl.sum(mass, 1).to(tl.float64),)
    for i in tl.static_range(len(WEIGHTS)):
        factor = tl.zeros_like(logits[0])
        for j in tl.static_range(STREAMS):
            if COEFFICIENTS[i * STREAMS + j] != 0:
                factor += COEFFICIENTS[i * STREAMS + j] * shifted[j]
        moments += (tl.sum(weighted(masses[WEIGHTS[i]], factor), 1).to(tl.float64),)
    if TOTAL:
        totals += (tl.sum(tl.where(inside, logits[0], 0.0), 1).to(tl.float64),)
    if ARGMAX:
        found = (logits[0] == maxima[0][:, None]) & inside
        # A row with a NaN may find nothing; what it gets is a token all the same.
        first = tl.min(tl.where(found, cols[None, :], BLOCK_N), 1)
        best += (tl.minimum(col + first, vocab - 1),)
    return maxima, sums, moments, totals, best


@triton.jit
def _moved(state, maxima, W: tl.constexpr, C: tl.constexpr, i: tl.constexpr, S: tl.constexpr):
    """A state's moment i as it is relative to the joined ``maxima``; 0 where it has no mass.

    As ``moved_moment`` of the row passes has it, Triton 3.6 spills on sm_90.
    """
    scale = rescale(state[0][W], maxima[W])
    shift = tl.zeros_like(maxima[0])
    for j in tl.static_range(S):
        if C[i * S + j] != 0:
            shift += C[i * S + j] * (finite_or_zero(state[0][j]) - finite_or_zero(maxima[j]))
    mass = scale * state[1][W]
    return tl.where(mass == 0, 0.0, scale * state[2][i] + mass * shift)


@triton.jit
def merge_states(a, b, WEIGHTS: tl.constexpr, COEFFICIENTS: tl.constexpr, STREAMS: tl.constexpr):
    """The state of two disjoint parts, ``a`` of the lower vocabulary ids. Associative."""
    maxima, sums, moments, totals, best = (), (), (), (), ()
    for j in tl.static_range(STREAMS):
        maximum, total = merge_normalizers(a[0][j], a[1][j], b[0][j], b[1][j])
        maxima += (maximum,)
        sums += (total,)
    for i in tl.static_range(len(WEIGHTS)):
        ours = _moved(a, maxima, WEIGHTS[i], COEFFICIENTS, i, STREAMS)
        moments += (ours + _moved(b, maxima, WEIGHTS[i], COEFFICIENTS, i, STREAMS),)
    for i in tl.static_range(len(a[3])):
        totals += (a[3][i] + b[3][i],)
    for i in tl.static_range(len(a[4])):
        theirs = (b[4][i] >= 0) & ((b[0][0] > a[0][0]) | (a[4][i] < 0))
        best += (tl.where(theirs, b[4][i], a[4][i]),)
    return maxima, sums, moments, totals, best
