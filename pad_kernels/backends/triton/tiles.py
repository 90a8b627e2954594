"""Tiles of hidden @ weight.T that stay on the chip: loading, multiplying, and who does which.

A matrix comes as a tensor descriptor (the copy engine of sm_90 and up, which fills shared memory
without registers and pads with zeros at the edges) or as a pointer, whose rows are clamped to the
last one instead of masked: nobody looks at what is computed beyond the edges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pad_kernels.backends.triton.math import head_transform


@triton.jit
def place(rows, splits, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """(token tile, vocabulary split) of this program.

    ``GROUP`` token tiles run side by side over the same splits, so that their hidden states stay
    in the L2 cache and a weight tile that one of them brought in serves the others.
    """
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    first = program // (GROUP * splits) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * splits)
    return first + inside % size, inside // size


@triton.jit
def load_tile(source, row, col, rows, shape, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """Rows ``row``.. and columns ``col``.. of a matrix, [R, C]; ``shape`` is (width, stride)."""
    if TMA:
        found = source.load([row, col])
    else:
        r = tl.minimum(row + tl.arange(0, R), rows - 1).to(tl.int64)
        c = col + tl.arange(0, C)
        inside = (c < shape[0])[None, :]
        found = tl.load(source + r[:, None] * shape[1] + c[None, :], inside, other=0.0)
    return found


@triton.jit
def product_tile(
    hidden,  # (rows, H)
    weight,  # (vocab, H)
    row,
    col,
    rows,
    vocab,
    shape,  # (H, stride of hidden, stride of weight)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """hidden[row:] @ weight[col:].T, [BLOCK_M, BLOCK_N] float32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, shape[0], BLOCK_K):
        left = load_tile(hidden, row, k, rows, (shape[0], shape[1]), BLOCK_M, BLOCK_K, TMA)
        right = load_tile(weight, col, k, vocab, (shape[0], shape[2]), BLOCK_N, BLOCK_K, TMA)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    return total


@triton.jit
def add_bias(raw, bias, cols, vocab):
    """Raw products with the head's bias [vocab] float32, if it has one."""
    if bias is not None:
        raw += tl.load(bias + cols, cols < vocab, other=0.0)[None, :]
    return raw


@triton.jit
def logit_tiles(
    hidden,  # for each stream (rows, H)
    weight,  # for each stream (vocab, H)
    biases,
    shapes,
    heads,
    row,
    col,
    rows,
    vocab,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Logits of every stream and the student's raw products; -inf beyond the vocabulary."""
    cols = col + tl.arange(0, BLOCK_N)
    logits = ()
    student = ()
    for j in tl.static_range(len(KINDS)):
        raw = product_tile(
            hidden[j], weight[j], row, col, rows, vocab, shapes[j], BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        raw = add_bias(raw, biases[j], cols, vocab)
        if j == 0:
            student = (raw,)
        logit = head_transform(raw, heads[j], KINDS[j])
        inside = tl.arange(0, BLOCK_N) < vocab - col
        logits += (tl.where(inside[None, :], logit, -float("inf")),)
    return logits, student[0]
