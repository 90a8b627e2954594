"""First-sweep statistics of a block of logits, each logit read once.

A program walks its part of one row in tiles of DEPTH x LANES entries, LANES being one 16-byte
access for each thread. Every lane keeps statistics of its own, relative to its own maximum: no
thread waits for another until the end, a tile costs one exponential per entry and one per lane, and
no float32 sum runs over more than a lane's share of the row. The lanes are joined at the end, in
double; the parts of a row by a second kernel, so that the order is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pad_kernels.backends.triton.lists import NOWHERE, first_at_least, next_column
from pad_kernels.backends.triton.math import (
    finite_or_zero,
    head_transform,
    merge_normalizers,
    rescale,
    weighted,
)


@triton.jit
def load_raw(logits, bias, place, columns, reach, inside):
    """Raw products of a tile in float32, bias added; anything outside.

    ``reach`` is how many columns may be read where rows are padded to whole accesses, or None.
    """
    near = inside
    if reach is not None:
        near = columns < reach
    raw = tl.load(logits + place + columns, mask=near, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + columns, mask=inside, other=0.0)
    return raw


@triton.jit
def moved_moment(value, total, scale, old, new, COEFFICIENTS: tl.constexpr, FIRST: tl.constexpr):
    """A part's moment relative to joined maxima; a part without mass counts 0.

    ``old`` and ``new`` are the streams' maxima of the part and of the whole; ``total`` and
    ``scale`` the part's sum in the stream that weighs, and what it is multiplied by.
    """
    shift = tl.zeros_like(value)
    for j in tl.static_range(len(old)):
        if COEFFICIENTS[FIRST + j] != 0:
            shift += COEFFICIENTS[FIRST + j] * (finite_or_zero(old[j]) - finite_or_zero(new[j]))
    return tl.where(scale * total == 0, 0.0, scale * (value + shift * total))


@triton.jit
def tile_moment(tile, share, maxima, COEFFICIENTS: tl.constexpr, FIRST: tl.constexpr):
    """Sum over a tile's rows of share * sum_j c_j (a_j - max_j), [LANES]."""
    factor = tl.zeros_like(share)
    for j in tl.static_range(len(tile)):
        if COEFFICIENTS[FIRST + j] != 0:
            factor += COEFFICIENTS[FIRST + j] * (tile[j] - finite_or_zero(maxima[j])[None, :])
    return tl.sum(weighted(share, factor), 0)


@triton.jit
def better(value, place, tile, columns):
    """The largest entry so far of each lane and its column; a NaN counts as the largest."""
    key = tl.where(tile != tile, float("inf"), tile)
    largest = tl.max(key, 0)
    found = tl.min(tl.where(key == largest[None, :], columns, NOWHERE), 0)
    place = tl.where((largest > value) | (place == NOWHERE), found, place)
    return tl.maximum(value, largest), place


@triton.jit
def add_tile(maximum, total, tile):
    """(max, sum) of each lane with another tile, the tile's exponentials, and the sum's scale."""
    joined = tl.maximum(maximum, tl.max(tile, 0))
    share = tl.exp(tile - finite_or_zero(joined)[None, :])
    scale = rescale(maximum, joined)
    return joined, total * scale + tl.sum(share, 0), share, scale


@triton.jit
def add_streams(maxima, sums, tile):
    """:func:`add_tile` for every stream: four tuples."""
    joined, totals, shares, scales = (), (), (), ()
    for j in tl.static_range(len(tile)):
        maximum, total, share, scale = add_tile(maxima[j], sums[j], tile[j])
        joined, totals = joined + (maximum,), totals + (total,)
        shares, scales = shares + (share,), scales + (scale,)
    return joined, totals, shares, scales


@triton.jit
def move_moments(
    moments, sums, scales, old, new, WEIGHTS: tl.constexpr, COEFFICIENTS: tl.constexpr
):
    """:func:`moved_moment` for every moment."""
    moved = ()
    for k in tl.static_range(len(WEIGHTS)):
        total, scale = sums[WEIGHTS[k]], scales[WEIGHTS[k]]
        moment = moved_moment(moments[k], total, scale, old, new, COEFFICIENTS, k * len(old))
        moved = moved + (moment,)
    return moved


@triton.jit
def store_normalizer(field, step, maximum, total):
    """Join the lanes of a (max, sum) and store the two, `step` apart; the joined maximum.

    In double: the divergence of nearly equal models is a difference of two such sums.
    """
    joined = tl.max(maximum, 0)
    tl.store(field, joined)
    tl.store(field + step, tl.sum((total * rescale(maximum, joined)).to(tl.float64), 0))
    return joined


@triton.jit
def store_lanes(
    field, step, maxima, sums, moments, WEIGHTS: tl.constexpr, COEFFICIENTS: tl.constexpr
):
    """Join the lanes of maxima, sums and moments and store them in this order; what comes next."""
    whole, scales = (), ()
    for j in tl.static_range(len(maxima)):
        joined = store_normalizer(field, len(maxima) * step, maxima[j], sums[j])
        whole, scales = whole + (joined,), scales + (rescale(maxima[j], joined),)
        field += step
    field += len(maxima) * step
    moved = move_moments(moments, sums, scales, maxima, whole, WEIGHTS, COEFFICIENTS)
    for k in tl.static_range(len(WEIGHTS)):
        tl.store(field, tl.sum(moved[k].to(tl.float64), 0))
        field += step
    return field


@triton.jit(do_not_specialize=["count", "rows", "tiles", "offset"])
def row_statistics(
    logits,  # of each stream a (rows, cols) pointer, rows `strides` apart
    strides,
    biases,  # of each stream (cols,) float32, or None
    heads,  # of each stream (scale, softcap, temperature)
    ids,  # (rows, count) int64, ascending: the entries that the tail leaves out, or None
    count,
    partial,  # (fields, splits, rows) float64: what merge_statistics reads
    best,  # (splits, rows) int32, the largest entry's column, or None
    rows,
    cols,
    reach,  # columns that may be read, or None: cols
    tiles,  # of a split
    offset,  # vocabulary id of the first column
    KINDS: tl.constexpr,  # of each stream IDENTITY, LINEAR or CAPPED
    WEIGHTS: tl.constexpr,  # of each moment the stream that weighs
    COEFFICIENTS: tl.constexpr,  # (moments, streams), flat
    TOTAL: tl.constexpr,  # whether to sum the first stream's logits
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Statistics of a part of a row."""
    row = tl.program_id(0)
    begin = tl.program_id(1) * tiles * (DEPTH * LANES)
    end = tl.minimum(begin + tiles * (DEPTH * LANES), cols)
    lanes = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    nothing = tl.zeros([LANES], tl.float32)
    empty = tl.full([LANES], -float("inf"), tl.float32)
    maxima, sums, moments = (), (), ()
    for _ in tl.static_range(len(KINDS)):
        maxima, sums = maxima + (empty,), sums + (nothing,)
    for _ in tl.static_range(len(WEIGHTS)):
        moments = moments + (nothing,)
    total, tail_maximum, tail_sum, best_value = nothing, empty, nothing, empty
    place = tl.full([LANES], NOWHERE, tl.int32)
    if ids is not None:
        listed = ids + row.to(tl.int64) * count
        cursor = first_at_least(listed, count, begin + offset)
        upcoming = next_column(listed, cursor, count, offset)
    for start in range(begin, end, DEPTH * LANES):
        columns = start + lanes
        inside = columns < end
        tile = ()
        for j in tl.static_range(len(KINDS)):
            line = row.to(tl.int64) * strides[j]
            raw = load_raw(logits[j], biases[j], line, columns, reach, inside)
            a = head_transform(raw, heads[j], KINDS[j])
            tile = tile + (tl.where(inside, a, -float("inf")),)
        joined, totals, shares, scales = add_streams(maxima, sums, tile)
        moved = move_moments(moments, sums, scales, maxima, joined, WEIGHTS, COEFFICIENTS)
        maxima, sums, moments = joined, totals, ()
        for k in tl.static_range(len(WEIGHTS)):
            more = tile_moment(tile, shares[WEIGHTS[k]], joined, COEFFICIENTS, k * len(KINDS))
            moments = moments + (moved[k] + more,)
        if TOTAL:
            total += tl.sum(tl.where(inside, tile[0], 0.0), 0)
        if best is not None:
            best_value, place = better(best_value, place, tile[0], columns)
        if ids is not None:
            rest = tile[0]
            while upcoming < start + DEPTH * LANES:
                rest = tl.where(columns == upcoming, -float("inf"), rest)
                cursor += 1
                upcoming = next_column(listed, cursor, count, offset)
            tail_maximum, tail_sum, _share, _scale = add_tile(tail_maximum, tail_sum, rest)
    field = partial + tl.program_id(1) * rows + row
    step = tl.num_programs(1) * rows
    field = store_lanes(field, step, maxima, sums, moments, WEIGHTS, COEFFICIENTS)
    if TOTAL:
        tl.store(field, tl.sum(total.to(tl.float64), 0))
        field += step
    if ids is not None:
        store_normalizer(field, step, tail_maximum, tail_sum)
        field += 2 * step
    if best is not None:
        largest = tl.max(best_value, 0)
        tl.store(field, largest)
        found = tl.min(tl.where(best_value == largest, place, NOWHERE), 0)
        tl.store(best + tl.program_id(1) * rows + row, found)


@triton.jit
def load_rows(pointers, row, inside):
    """(rows,) numbers of each pointer of a tuple, in double."""
    found = ()
    for j in tl.static_range(len(pointers)):
        found = found + (tl.load(pointers[j] + row, mask=inside, other=0.0).to(tl.float64),)
    return found


@triton.jit
def store_rows(pointers, values, row, inside):
    """The inverse of :func:`load_rows`."""
    for j in tl.static_range(len(pointers)):
        tl.store(pointers[j] + row, values[j], mask=inside)


@triton.jit
def load_fields(field, step, row, inside, COUNT: tl.constexpr):
    """COUNT consecutive fields of a split, in double."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.load(field + k * step + row, mask=inside, other=0.0).to(tl.float64),)
    return found


@triton.jit(do_not_specialize=["rows", "splits", "offset"])
def merge_statistics(
    partial,  # (fields, splits, rows) float64: maxima, sums, moments, [total], [tail],
    # [the largest entry]
    best,  # (splits, rows) int32, or None
    maxima,  # of each stream (rows,) float64, and likewise those that follow
    sums,
    moments,
    total,  # one, or none
    tail,  # (maximum, sum), or none
    argmax,  # (rows,) int64, or None
    rows,
    splits,
    offset,
    WEIGHTS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join the parts of each row, and what its earlier vocabulary chunks gave, in double."""
    STREAMS: tl.constexpr = len(maxima)
    MOMENTS: tl.constexpr = len(WEIGHTS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    step = splits * rows
    m, s = load_rows(maxima, row, inside), load_rows(sums, row, inside)
    moment, whole = load_rows(moments, row, inside), load_rows(total, row, inside)
    rest = load_rows(tail, row, inside)
    if argmax is not None:
        place = tl.load(argmax + row, mask=inside, other=0)
    for split in range(splits):
        field = partial + split * rows
        part = load_fields(field, step, row, inside, STREAMS)
        part_sum = load_fields(field + STREAMS * step, step, row, inside, STREAMS)
        fresh = load_fields(field + 2 * STREAMS * step, step, row, inside, MOMENTS)
        field += (2 * STREAMS + MOMENTS) * step
        joined, joined_sums, scales, part_scales = (), (), (), ()
        for j in tl.static_range(STREAMS):
            a, b = merge_normalizers(m[j], s[j], part[j], part_sum[j])
            joined, joined_sums = joined + (a,), joined_sums + (b,)
            scales = scales + (rescale(m[j], a),)
            part_scales = part_scales + (rescale(part[j], a),)
        moment = move_moments(moment, s, scales, m, joined, WEIGHTS, COEFFICIENTS)
        fresh = move_moments(fresh, part_sum, part_scales, part, joined, WEIGHTS, COEFFICIENTS)
        joined_moments = ()
        for k in tl.static_range(MOMENTS):
            joined_moments = joined_moments + (moment[k] + fresh[k],)
        if len(total) > 0:
            whole = (whole[0] + load_fields(field, step, row, inside, 1)[0],)
            field += step
        if len(tail) > 0:
            more = load_fields(field, step, row, inside, 2)
            rest = merge_normalizers(rest[0], rest[1], more[0], more[1])
            field += 2 * step
        if argmax is not None:
            value = load_fields(field, step, row, inside, 1)[0]
            found = tl.load(best + split * rows + row, mask=inside, other=0).to(tl.int64) + offset
            largest = tl.where(s[0] != s[0], float("inf"), m[0])
            wins = (value > largest) | ((value == largest) & (found < place))
            place = tl.where(wins | (place < 0), found, place)
        m, s, moment = joined, joined_sums, joined_moments
    store_rows(maxima, m, row, inside)
    store_rows(sums, s, row, inside)
    store_rows(moments, moment, row, inside)
    store_rows(total, whole, row, inside)
    store_rows(tail, rest, row, inside)
    if argmax is not None:
        tl.store(argmax + row, place, mask=inside)
