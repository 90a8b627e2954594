"""The largest logits of each row, as chunks of the vocabulary come by.

A (value, id) pair is one 64-bit integer: the float's bits made monotone above, the id counted down
below. So one integer order is "value descending, id ascending", pairs are distinct, and the result
does not depend on the order in which chunks or tiles come.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pad_kernels.backends.triton.launch import Launch, head_kind, reach
from pad_kernels.backends.triton.math import head_transform
from pad_kernels.backends.triton.statistics import load_raw
from pad_kernels.engine.problem import Stream

#: Beyond this a row's pairs no longer fit into the registers of a program.
MOST = 256
#: Logits of one look. Most looks end with a comparison: once the first tiles are through, few
#: tiles have anything to add to the k largest.
TILE = 1024

_NOTHING: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def _pair(value, token):
    """(float32, int32) as an int64 whose order is value descending, id ascending, reversed."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF ^ token).to(tl.int64)


@triton.jit
def _unpair(pair):
    """The inverse of :func:`_pair`; -inf and id -1 for nothing."""
    ordered = (pair >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    token = 0x7FFFFFFF ^ (pair & 0x7FFFFFFF).to(tl.int32)
    found = pair != _NOTHING
    value = tl.where(found, bits.to(tl.float32, bitcast=True), -float("inf"))
    return value, tl.where(found, token, -1)


@triton.jit
def merge_largest_kernel(
    logits,  # (rows, cols), raw
    stride,
    bias,  # (cols,) float32, or None
    head,
    state,  # (2 k, rows) float64: values over ids, of ``functionals.statistics.Largest``
    state_stride,
    cols,
    reach,  # columns that may be read, or None: cols
    offset,  # vocabulary id of the first column
    k,
    KIND: tl.constexpr,
    K: tl.constexpr,  # k, rounded up to a power of two, at least 64
    TILE: tl.constexpr,
):
    """Merge one row of a block into its k largest logits."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    values = state + place.to(tl.int64) * state_stride + row
    ids = state + (place + k).to(tl.int64) * state_stride + row
    held = tl.load(values, place < k, other=0.0).to(tl.float32)
    tokens = tl.load(ids, place < k, other=-1.0).to(tl.int32)
    best = tl.sort(tl.where(tokens >= 0, _pair(held, tokens), _NOTHING), descending=True)
    for start in range(0, cols, TILE):
        col = start + tl.arange(0, TILE)
        raw = load_raw(logits, bias, row * stride, col, reach, col < cols)
        pairs = _pair(head_transform(raw, head, KIND), offset + col)
        pairs = tl.where(col < cols, pairs, _NOTHING)
        if tl.max(pairs) > tl.min(best):
            # Of two sorted lists, one turned round, the larger of each place are the k largest.
            fresh = tl.sort(tl.topk(pairs, K), descending=False)
            best = tl.sort(tl.maximum(best, fresh), descending=True)
    value, token = _unpair(best)
    tl.store(values, value.to(tl.float64), place < k)
    tl.store(ids, token.to(tl.float64), place < k)


def merge_largest(
    stream: Stream, logits: Tensor, offset: int, state: Tensor, *, tile: int = TILE
) -> Launch:
    """The launch that merges raw logits [rows, cols] into a state [2 k, rows]."""
    rows, cols = logits.shape
    k = state.shape[0] // 2
    bias = None if stream.bias is None else stream.bias[offset : offset + cols]
    arguments = {
        "logits": logits,
        "stride": logits.stride(0),
        "bias": bias,
        "head": stream.head.numbers,
        "state": state,
        "state_stride": state.stride(0),
        "cols": cols,
        "reach": reach(cols, logits),
        "offset": offset,
        "k": k,
    }
    constants = {
        "KIND": head_kind(stream.head),
        "K": max(triton.next_power_of_2(k), 64),
        "TILE": tile,
    }
    return Launch(merge_largest_kernel, (rows,), arguments, constants, registers=128)
