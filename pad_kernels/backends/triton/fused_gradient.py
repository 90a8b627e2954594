"""The gradient of a block of logits straight from hidden states: logits never reach memory.

A program multiplies one tile, forms dL/dz in registers from the rows' finished statistics and
coefficients, and writes it in half precision to the block that the library's two products then
read. It does not accumulate hidden or weight gradients itself: a tile of 128 rows x H float32 is
2 MiB at H = 4096, ten times what a multiprocessor holds, and splitting H over programs would
multiply every tile once more for each part, 2 N V H flops, where writing and reading a tile once
costs 4 bytes for every 6 H flops of its entry. What is saved against a pass over a block of
logits is their way through memory, one write and one read for each stream, and their rounding:
float32 sums are what the fused statistics saw.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pad_kernels.backends.triton.gradient import dense_part
from pad_kernels.backends.triton.lists import cursors_at, list_ends, upcoming_ids
from pad_kernels.backends.triton.math import head_slope
from pad_kernels.backends.triton.tiles import logit_tiles, place


@triton.jit
def fused_gradient_kernel(
    hidden0,  # (rows, H0): a descriptor of BLOCK_M x BLOCK_K tiles, or a pointer
    hidden1,
    hidden2,
    weight0,  # (vocab, H0): a descriptor of BLOCK_N x BLOCK_K tiles, or a pointer
    weight1,
    weight2,
    biases,  # for each stream (vocab,) float32, or None
    shapes,  # for each stream (H, stride of hidden, stride of weight)
    heads,  # for each stream (scale, softcap, temperature)
    out,  # (pointer to (rows, vocab), its stride, columns that may be written)
    coefficients,  # (fields, rows) float32; the constants below are places in it, -1 for none
    sparse,  # (ids (rows, count) int64 ascending, values (rows, count) float32, count), or None
    outside,  # (ids (rows, count) int64 ascending, count), or None
    peaks,  # (row tiles, column tiles) int32: bits of the filter's largest magnitudes, or None
    bound,  # (1,) float32: what a tile has to reach to be read; None: every tile is
    rows,
    vocab,  # of this block, as are the weights
    offset,  # vocabulary id of the block's first column
    KINDS: tl.constexpr,
    FIELDS: tl.constexpr,
    SHIFTS: tl.constexpr,
    INVERSES: tl.constexpr,
    CONSTANT: tl.constexpr,
    STUDENT: tl.constexpr,
    MOMENTS: tl.constexpr,
    SHARES: tl.constexpr,
    OUTSIDE: tl.constexpr,  # maximum and value of what the tokens outside its ids share, or none
    FILTER: tl.constexpr,  # rows and columns of a filter tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """The derivative by the student's raw products of one tile, chain factor included."""
    tile, part = place(rows, tl.cdiv(vocab, BLOCK_N), BLOCK_M, GROUP)
    row, col = tile * BLOCK_M, part * BLOCK_N
    x, raw = logit_tiles(
        (hidden0, hidden1, hidden2),
        (weight0, weight1, weight2),
        biases,
        shapes,
        heads,
        row,
        col,
        rows,
        vocab,
        KINDS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        TMA,
    )
    at = row + tl.arange(0, BLOCK_M)
    c = ()
    for i in tl.static_range(FIELDS):
        c += (tl.load(coefficients + i * rows + at, at < rows, other=0.0)[:, None],)
    d = dense_part(x, c, SHIFTS, INVERSES, STUDENT, MOMENTS, SHARES)
    if CONSTANT >= 0:
        d += c[CONSTANT]
    if outside is not None:
        share = tl.exp(x[0] - c[OUTSIDE[0]]) * c[OUTSIDE[1]]
        d += _changed(
            share, outside[0], None, outside[1], row, rows, col + offset, BLOCK_M, BLOCK_N
        )
    if sparse is not None:
        d = _changed(d, sparse[0], sparse[1], sparse[2], row, rows, col + offset, BLOCK_M, BLOCK_N)
    d *= head_slope(raw, heads[0], KINDS[0])
    cols = col + tl.arange(0, BLOCK_N)
    # Behind the last column zeros, as far as whole accesses of 16 bytes go.
    stored = tl.where((cols < vocab)[None, :], d, 0.0).to(out[0].dtype.element_ty)
    inside = (at < rows)[:, None] & (cols < out[2])[None, :]
    if peaks is not None:
        # Bits of numbers without a sign are in their order, NaN last; a maximum is the same in any
        # order, so that the atomic is deterministic.
        bits = tl.abs(stored.to(tl.float32)).to(tl.int32, bitcast=True)
        most = tl.max(tl.where(inside, bits, 0))
        tl.atomic_max(peaks + row // FILTER * tl.cdiv(vocab, FILTER) + col // FILTER, most)
        if bound is not None:
            # This tile is the filter's: nobody reads it if it is dead. A NaN is not.
            least = tl.load(bound)
            if most.to(tl.float32, bitcast=True) < least:
                inside = inside & (cols < 0)[None, :]
    tl.store(out[0] + at.to(tl.int64)[:, None] * out[1] + cols[None, :], stored, inside)


@triton.jit
def _changed(
    tile, ids, values, count, row, rows, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile with the listed values that lie in it added, or 0 at the ids if there are none.

    ``first`` is the id of the tile's first column.
    """
    local, start = tl.arange(0, BLOCK_M), row.to(tl.int64) * count
    ids += start
    ends = list_ends(local, count, row + local < rows)
    cursor = cursors_at(ids, local, count, ends, first)
    wanted = upcoming_ids(ids, cursor, ends)
    while tl.min(wanted, 0) < first + BLOCK_N:
        here = wanted < first + BLOCK_N
        hit = first + tl.arange(0, BLOCK_N)[None, :] == wanted[:, None]
        if values is None:
            tile = tl.where(hit, 0.0, tile)
        else:
            added = tl.load(values + start + cursor, here, other=0.0)
            tile += tl.where(hit, added[:, None], 0.0)
        cursor += here.to(tl.int32)
        wanted = upcoming_ids(ids, cursor, ends)
    return tile
