"""Statistics of rows straight from hidden states: logits never leave the chip.

A program multiplies one token tile with the vocabulary tiles of its split, one after the other, and
keeps the rows' running statistics in registers. A second kernel merges the splits. Nothing is added
atomically and the order of everything is fixed, so the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pad_kernels.backends.triton.fused_state import empty_state, merge_states, tile_state
from pad_kernels.backends.triton.lists import cursors_at, list_ends, upcoming_ids
from pad_kernels.backends.triton.tiles import logit_tiles, place


@triton.jit
def fused_statistics_kernel(
    hidden0,  # (rows, H0): a descriptor of BLOCK_M x BLOCK_K tiles, or a pointer
    hidden1,
    hidden2,
    weight0,  # (vocab, H0): a descriptor of BLOCK_N x BLOCK_K tiles, or a pointer
    weight1,
    weight2,
    biases,  # for each stream (vocab,) float32, or None
    shapes,  # for each stream (H, stride of hidden, stride of weight)
    heads,  # for each stream (scale, softcap, temperature)
    listed,  # (ids (rows, count) int64, ascending in each row, count), or None
    places,  # (rows, count) int64, which of its row's results an id is; None for one id a row
    picks,  # for each list of picked logits (pointer to (count, rows) float64, stride, count)
    partial,  # (splits, slots, rows) float64
    rows,
    vocab,
    split_cols,  # vocabulary entries of a split, whole tiles
    WEIGHTS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TOTAL: tl.constexpr,
    ARGMAX: tl.constexpr,
    TAIL: tl.constexpr,  # which of the lists the tail leaves out; -1 for no tail
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """Statistics of one token tile over one vocabulary split, and the logits picked there.

    The tail is one more stream: the student's logits, -inf at the ids of its list.
    """
    STREAMS: tl.constexpr = len(KINDS) + (TAIL >= 0)
    splits = tl.cdiv(vocab, split_cols)
    tile, split = place(rows, splits, BLOCK_M, GROUP)
    row = tile * BLOCK_M
    hidden = (hidden0, hidden1, hidden2)
    weight = (weight0, weight1, weight2)
    state = empty_state(STREAMS, WEIGHTS, TOTAL, ARGMAX, BLOCK_M)
    MANY: tl.constexpr = listed is not None and places is not None
    local = tl.arange(0, BLOCK_M)
    at = row + local
    if MANY:
        ids = listed[0] + row.to(tl.int64) * listed[1]
        places += row.to(tl.int64) * listed[1]
        ends = list_ends(local, listed[1], at < rows)
        cursor = cursors_at(ids, local, listed[1], ends, split * split_cols)
    for col in range(split * split_cols, tl.minimum((split + 1) * split_cols, vocab), BLOCK_N):
        logits, _ = logit_tiles(
            hidden,
            weight,
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
        if MANY:
            rest, cursor = _pick(
                logits[0], ids, cursor, ends, places, picks, at, col, TAIL, BLOCK_N
            )
            if TAIL >= 0:
                logits += (rest,)
        elif listed is not None:
            wanted = tl.load(listed[0] + at, at < rows, other=-1).to(tl.int32) - col
            inside = (wanted >= 0) & (wanted < BLOCK_N)
            if tl.max(inside.to(tl.int32), 0) > 0:
                _hit, found = _picked(logits[0], wanted, BLOCK_N)
                tl.store(picks[0][0] + at, found, inside)
        fresh = tile_state(
            logits, col, vocab, WEIGHTS, COEFFICIENTS, TOTAL, ARGMAX, STREAMS, BLOCK_N
        )
        state = merge_states(state, fresh, WEIGHTS, COEFFICIENTS, STREAMS)
    SLOTS: tl.constexpr = 2 * STREAMS + len(WEIGHTS) + TOTAL + ARGMAX
    _store_state(
        state, partial + split.to(tl.int64) * SLOTS * rows, rows, row + tl.arange(0, BLOCK_M)
    )


@triton.jit
def _picked(logits, wanted, BLOCK_N: tl.constexpr):
    """Where each row's column ``wanted`` of a tile is, and the logit there; 0 outside the tile.

    It is the very number that the normaliser adds up: from anywhere else, a confident log-prob
    could come out above 0.
    """
    hit = tl.arange(0, BLOCK_N)[None, :] == wanted[:, None]
    return hit, tl.sum(tl.where(hit, logits, 0.0), 1).to(tl.float64)


@triton.jit
def _pick(
    logits, ids, cursor, ends, places, picks, at, col, TAIL: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store the logits of all of the rows' listed ids in this tile.

    Returns:
        The tile without the ids of the tail's list, the cursors behind the tile's ids.
    """
    rest = logits
    wanted = upcoming_ids(ids, cursor, ends)
    while tl.min(wanted, 0) < col + BLOCK_N:
        here = wanted < col + BLOCK_N
        place = tl.load(places + cursor, here, other=0)
        hit, found = _picked(logits, wanted - col, BLOCK_N)
        for i in tl.static_range(len(picks)):
            mine = here & (place >= 0) & (place < picks[i][2])
            tl.store(picks[i][0] + place * picks[i][1] + at, found, mine)
            if i == TAIL:
                rest = tl.where(hit & mine[:, None], -float("inf"), rest)
            place -= picks[i][2]
        cursor += here.to(tl.int32)
        wanted = upcoming_ids(ids, cursor, ends)
    return rest, cursor


@triton.jit
def _store_state(state, place, rows, at):
    """Write a state to slots [slots, rows], in the order of :func:`_load_state`."""
    flat = state[0] + state[1] + state[2] + state[3] + state[4]
    for i in tl.static_range(len(flat)):
        tl.store(place + at, flat[i].to(tl.float64), at < rows)
        place += rows


@triton.jit
def _load_slots(place, rows, at, COUNT: tl.constexpr, dtype: tl.constexpr):
    """Some slots as row vectors."""
    found = ()
    for _ in tl.static_range(COUNT):
        found += (tl.load(place + at, at < rows, other=0.0).to(dtype),)
        place += rows
    return found, place


@triton.jit
def _load_state(place, rows, at, like):
    """Read what :func:`_store_state` wrote of a state with as many entries as ``like``."""
    maxima, place = _load_slots(place, rows, at, len(like[0]), tl.float32)
    sums, place = _load_slots(place, rows, at, len(like[1]), tl.float64)
    moments, place = _load_slots(place, rows, at, len(like[2]), tl.float64)
    totals, place = _load_slots(place, rows, at, len(like[3]), tl.float64)
    best, place = _load_slots(place, rows, at, len(like[4]), tl.int32)
    return maxima, sums, moments, totals, best


@triton.jit
def merge_splits_kernel(
    partial,  # (splits, slots, rows) float64
    targets,  # for each slot a row vector (rows,), float64 or int64, or None
    rows,
    splits,
    STREAMS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TOTAL: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Join the splits' states, lowest vocabulary ids first."""
    slots: tl.constexpr = len(targets)
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    state = empty_state(STREAMS, WEIGHTS, TOTAL, ARGMAX, BLOCK_M)
    for _ in range(splits):
        fresh = _load_state(partial, rows, at, state)
        partial += slots * rows
        state = merge_states(state, fresh, WEIGHTS, COEFFICIENTS, STREAMS)
    flat = state[0] + state[1] + state[2] + state[3] + state[4]
    for i in tl.static_range(len(flat)):
        if targets[i] is not None:
            tl.store(targets[i] + at, flat[i], at < rows)
