"""Logits of a few given tokens a row, and their gradients: only those rows of the weight are read.

For losses over a few tokens alone, which have no normaliser over the vocabulary. Where there is
one, a token's logit has to come from the code that computes it, see ``fused_stats.py``. Sums are
float32, in a fixed order; nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pad_kernels.backends.base import GivenTokens
from pad_kernels.backends.triton.launch import Launch

#: Tokens, or rows, of a step, and hidden features: 4 KiB of weight under way in half precision for
#: every one of 8 programs and more that share a multiprocessor, contiguous pieces of 256 bytes.
STEP, FEATURES = 16, 128


@triton.jit(do_not_specialize=["vocab"])
def gather_logits_kernel(
    hidden,  # (rows, H)
    hidden_strides,
    weight,  # (V, H)
    weight_strides,
    ids,  # (rows, count) int64
    counted,  # (rows,) bool
    out,  # (rows, count) float32
    size,
    count,
    vocab,
    STEP: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """hidden[row] . weight[id] for some ids of a row that counts; an id out of range gets NaN."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * STEP + tl.arange(0, STEP)
    if tl.load(counted + row):
        token = tl.load(ids + row * count + place, place < count, other=0)
        valid = (token >= 0) & (token < vocab)
        source = weight + tl.where(valid, token, 0)[:, None] * weight_strides[0]
        total = tl.zeros((STEP, FEATURES), tl.float32)
        for start in range(0, size, FEATURES):
            # Of a transpose the last feature may lie beyond 2^31.
            at = (start + tl.arange(0, FEATURES)).to(tl.int64)
            x = tl.load(hidden + row * hidden_strides[0] + at * hidden_strides[1], at < size, 0.0)
            w = tl.load(source + at[None, :] * weight_strides[1], (at < size)[None, :], 0.0)
            total += w.to(tl.float32) * x.to(tl.float32)[None, :]
        found = tl.where(valid, tl.sum(total, 1), float("nan"))
        tl.store(out + row * count + place, found, place < count)


@triton.jit(do_not_specialize=["vocab"])
def gather_hidden_kernel(
    grad,  # (rows, count) float32
    weight,
    weight_strides,
    ids,  # (rows, count) int64
    counted,
    out,  # (rows, H), the hidden states' dtype
    out_strides,
    size,
    count,
    vocab,
    STEP: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Some features of a row's gradient: sum over its ids of grad * weight[id]."""
    row = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)).to(tl.int64)
    if tl.load(counted + row):
        total = tl.zeros((FEATURES,), tl.float32)
        for start in range(0, count, STEP):
            place = start + tl.arange(0, STEP)
            token = tl.load(ids + row * count + place, place < count, other=0)
            valid = (place < count) & (token >= 0) & (token < vocab)
            g = tl.load(grad + row * count + place, valid, other=0.0)
            source = weight + token[:, None] * weight_strides[0] + at[None, :] * weight_strides[1]
            w = tl.load(source, valid[:, None] & (at < size)[None, :], 0.0)
            total += tl.sum(w.to(tl.float32) * g[:, None], 0)
        target = out + row * out_strides[0] + at * out_strides[1]
        tl.store(target, total.to(out.dtype.element_ty), at < size)


@triton.jit(do_not_specialize=["pairs", "vocab"])
def scatter_weight_kernel(
    grad,  # (pairs,) float32, a pair being a row's id
    hidden,
    hidden_strides,
    keys,  # (pairs,) int64, ascending: the pairs' ids, at the end `vocab` for what does not count
    order,  # (pairs,) int64, which pair each is
    out,  # (V, H), zeros, the weight's dtype
    out_strides,
    pairs,
    vocab,
    size,
    count,  # ids a row
    STEP: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Some features of an id's gradient: the sum over its pairs, by the program of the first."""
    start = tl.program_id(0)
    key = tl.load(keys + start)
    before = tl.load(keys + start - 1, start > 0, other=-1)
    if (key >= 0) & (key < vocab) & (before != key):
        at = (tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)).to(tl.int64)
        total = tl.zeros((FEATURES,), tl.float32)
        ours = tl.full((STEP,), 1, tl.int1)
        while tl.min(ours.to(tl.int32), 0) > 0:  # the pairs of the last step were all this id's
            place = start + tl.arange(0, STEP)
            ours = tl.load(keys + place, place < pairs, other=-1) == key
            pair = tl.load(order + place, ours, other=0)
            g = tl.load(grad + pair, ours, other=0.0)
            source = hidden + (pair // count)[:, None] * hidden_strides[0]
            inside = ours[:, None] & (at < size)[None, :]
            x = tl.load(source + at[None, :] * hidden_strides[1], inside, 0.0)
            total += tl.sum(x.to(tl.float32) * g[:, None], 0)
            start += STEP
        target = out + key * out_strides[0] + at * out_strides[1]
        tl.store(target, total.to(out.dtype.element_ty), at < size)


def _launch(kernel: object, grid: tuple[int, int], arguments: dict[str, object]) -> Launch:
    return Launch(kernel, grid, arguments, {"STEP": STEP, "FEATURES": FEATURES})


def _given(given: GivenTokens) -> dict[str, object]:
    """What the two gathers share."""
    return {
        "weight": given.weight,
        "weight_strides": given.weight.stride(),
        "ids": given.ids,
        "counted": given.counted,
        "size": given.weight.shape[1],
        "count": given.ids.shape[1],
        "vocab": given.weight.shape[0],
    }


def gather_logits(given: GivenTokens, out: Tensor) -> Launch:
    """The launch that fills the counted rows of ``out`` [N, k] float32 with raw products."""
    hidden = given.hidden
    own = {"hidden": hidden, "hidden_strides": hidden.stride(), "out": out}
    grid = out.shape[0], triton.cdiv(out.shape[1], STEP)
    return _launch(gather_logits_kernel, grid, {**_given(given), **own})


def gather_hidden(given: GivenTokens, grad: Tensor, out: Tensor) -> Launch:
    """The launch that fills the counted rows of the hidden gradient ``out`` [N, H]."""
    own = {"grad": grad, "out": out, "out_strides": out.stride()}
    grid = out.shape[0], triton.cdiv(out.shape[1], FEATURES)
    return _launch(gather_hidden_kernel, grid, {**_given(given), **own})


def scatter_weight(
    grad: Tensor, hidden: Tensor, keys: Tensor, order: Tensor, out: Tensor
) -> Launch:
    """The launch that adds up the weight gradient ``out`` [V, H], zero so far.

    Args:
        grad: [N, k] float32.
        keys, order: [N k], the sorted ids, V for what does not count, and where they stood.
    """
    arguments = {
        "grad": grad,
        "hidden": hidden,
        "hidden_strides": hidden.stride(),
        "keys": keys,
        "order": order,
        "out": out,
        "out_strides": out.stride(),
        "pairs": keys.shape[0],
        "vocab": out.shape[0],
        "size": hidden.shape[1],
        "count": grad.shape[1],
    }
    grid = keys.shape[0], triton.cdiv(hidden.shape[1], FEATURES)
    return _launch(scatter_weight_kernel, grid, arguments)
