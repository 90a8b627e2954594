"""Products of dL/dz that read its live tiles alone: which tiles those are, and the products.

A tile that the filter leaves out costs a look at one number. Which tiles are left is known on the
device only, where it becomes a list for every line of tiles; a program walks one list, in its
order, so that the sums are the same every time and nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_live_kernel(
    peaks,  # (row tiles, column tiles) float32: the largest magnitude of each tile
    bound,  # (1,) float32: a tile whose peak is below it is dead
    lists,  # (lines, length) int32: receives the live tiles of each line, ascending
    counts,  # (lines,) int32: receives how many they are
    length,
    strides,  # of peaks, from line to line and along a line
    BLOCK: tl.constexpr,
):
    """The live tiles of a line: a row of tiles, or a column of them."""
    line = tl.program_id(0)
    least = tl.load(bound)
    found = 0
    for start in range(0, length, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        inside = tiles < length
        peak = tl.load(peaks + line * strides[0] + tiles * strides[1], inside, other=0.0)
        live = ((peak < least) == 0) & inside  # so that nobody loses a NaN
        place = found + tl.cumsum(live.to(tl.int32), 0) - 1
        tl.store(lists + line * length + place, tiles, live)
        found += tl.sum(live.to(tl.int32), 0)
    tl.store(counts + line, found)


@triton.jit
def live_product_kernel(
    dz,  # (rows, cols): (pointer, stride of a row, columns to read, zeros behind the last)
    other,  # (cols or rows, H): the weight, or the hidden states if TRANSPOSED; (pointer, stride)
    total,  # (rows or cols, H): (pointer, stride)
    index,  # (cols,) int64: which row of weight and weight gradient a column is; None: itself
    lists,  # (lines, length) int32: live tiles
    counts,  # (lines,) int32
    scale,  # (1,) float32: a power of two that products are multiplied by; None: 1
    length,
    rows,
    cols,
    width,  # H
    ADD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Total = scale * dz @ weight, or dz.T @ hidden, over live tiles; or added to it."""
    parts = tl.cdiv(width, BLOCK_H)
    line = tl.program_id(0) // parts
    h = tl.program_id(0) % parts * BLOCK_H + tl.arange(0, BLOCK_H)
    steps = tl.load(counts + line) * (TILE // BLOCK_K)
    m = line * TILE + tl.arange(0, TILE)
    at = m.to(tl.int64)
    limit = rows
    if TRANSPOSED:
        limit = cols
        if index is not None:
            at = tl.load(index + m, m < cols, other=0)
    inside = (m < limit)[:, None] & (h < width)[None, :]
    target = total[0] + at[:, None] * total[1] + h[None, :]
    if ADD:
        # Before the products: the sums and what is there do not fit into registers side by side.
        sums = tl.load(target, inside, other=0.0).to(tl.float32)
        if scale is not None:
            sums *= 1.0 / tl.load(scale)
    else:
        sums = tl.zeros((TILE, BLOCK_H), tl.float32)
    for step in range(steps):
        tile = tl.load(lists + line * length + step // (TILE // BLOCK_K))
        k = tile * TILE + step % (TILE // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            left = _tile(dz, k.to(tl.int64), m, k < rows, m < dz[2]).T
            right = _tile(other, k.to(tl.int64), h, k < rows, h < width)
        else:
            left = _tile(dz, m.to(tl.int64), k, m < rows, k < dz[2])
            entry = k.to(tl.int64)
            if index is not None:
                entry = tl.load(index + k, k < cols, other=0)
            right = _tile(other, entry, h, k < cols, h < width)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    if scale is not None:
        sums *= tl.load(scale)
    tl.store(target, sums.to(total[0].dtype.element_ty), inside)


@triton.jit
def _tile(matrix, r, c, inside_r, inside_c):
    """Some rows and columns of a matrix, 0 outside: dz is not written beyond its edges."""
    return tl.load(
        matrix[0] + r[:, None] * matrix[1] + c[None, :],
        inside_r[:, None] & inside_c[None, :],
        other=0.0,
    )
