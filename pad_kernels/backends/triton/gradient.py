"""The second sweep of a divergence, and the gradient with respect to a block of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from pad_kernels.backends.triton.lists import first_at_least, next_column
from pad_kernels.backends.triton.math import (
    LOWEST,
    exp_parts,
    head_slope,
    head_transform,
    log1p_of,
    weighted,
)
from pad_kernels.backends.triton.statistics import load_raw

#: Divergences of two sweeps, by their place here.
DIVERGENCES = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


@triton.jit
def outcome(x_s, x_t, inverse_s, inverse_t, log_sums, mix, KIND: tl.constexpr):
    """What entries add to a divergence: balanced value, slope, and the student's probability.

    ``x_s`` and ``x_t`` are logits less their row's maximum, log t/s = (x_t - x_s) - log_sums.
    ``mix`` is (alpha, 1 - alpha), each rounded once. Logarithms are taken of the mixture m over the
    larger of s and t, which lies in (0, 1]: neither huge ratios nor nearly equal probabilities lose
    digits.
    """
    neither = (x_s == -float("inf")) & (x_t == -float("inf"))
    ratio = tl.where(neither, 0.0, (x_t - x_s) - log_sums)
    leads = ratio >= 0  # the teacher has more
    size = tl.abs(ratio)
    scale, tail = exp_parts(-tl.minimum(size, -LOWEST))
    less = scale * tail + (scale - 1.0)  # smaller / larger - 1
    # Exactly 0 where it underflows: it may multiply an infinite logarithm.
    part = tl.where(size > -LOWEST, 0.0, scale * tail + scale)
    larger = tl.exp(tl.where(leads, x_t, x_s)) * tl.where(leads, inverse_t, inverse_s)
    s = tl.where(leads, larger * part, larger)
    t = tl.where(leads, larger, larger * part)
    if KIND == 3:
        sign = tl.where(ratio == 0, 0.0, tl.where(leads, -0.5, 0.5))
        return -0.5 * larger * less, s * sign, s
    alpha, rest = mix[0], mix[1]
    of_t, of_s = alpha, rest  # m = of_t t + of_s s
    if KIND == 2:
        of_t, of_s = rest, alpha
    under = tl.where(leads, of_s, of_t)  # weight of the smaller
    whole = tl.where(leads, of_t, of_s) + under * part  # m/larger
    below = log1p_of(under * less, whole)
    of_student = tl.where(leads, -ratio, 0.0) - below  # log s/m
    of_teacher = tl.where(leads, 0.0, ratio) - below  # log t/m
    if KIND == 0:
        slope = rest * weighted(s, of_student)
        # Written as alpha * x + y, the bfloat16 second sweep for sm_90 crashes LLVM in Triton 3.9.
        return tl.fma(weighted(t, of_teacher), alpha, slope), slope, s
    gap = tl.where(leads, larger * less, -larger * less)  # s - t
    share = tl.where(leads, part, 1.0) / whole  # s / m
    if KIND == 1:
        value = weighted(t, of_teacher) + rest * gap
        return value, -rest * t * share, s
    value = weighted(s, of_student)
    return value - rest * gap, value - alpha * rest * gap * share, s


@triton.jit
def row_numbers(coefficients, rows, row, FIELDS: tl.constexpr):
    """The numbers of one row, read before anything is written."""
    found = ()
    for i in tl.static_range(FIELDS):
        found = found + (tl.load(coefficients + i * rows + row),)
    return found


@triton.jit(do_not_specialize=["rows", "tiles"])
def row_outcomes(
    logits,  # of student and teacher a (rows, cols) pointer, rows `strides` apart
    strides,
    biases,  # (cols,) float32, or None
    heads,  # (scale, softcap, temperature)
    coefficients,  # (5, rows) float32: shifts, inverse sums, log of the sums' ratio
    mix,  # (alpha, 1 - alpha)
    partial,  # (2, splits, rows) float64: sums of value and slope
    rows,
    cols,
    reach,  # columns that may be read, or None: cols
    tiles,
    KINDS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums over a part of a row of a divergence's values and slopes."""
    row = tl.program_id(0)
    begin = tl.program_id(1) * tiles * (DEPTH * LANES)
    end = tl.minimum(begin + tiles * (DEPTH * LANES), cols)
    lanes = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    value = tl.zeros([LANES], tl.float32)
    slope = tl.zeros([LANES], tl.float32)
    c = row_numbers(coefficients, rows, row, 5)
    for start in range(begin, end, DEPTH * LANES):
        columns = start + lanes
        inside = columns < end
        tile = ()
        for j in tl.static_range(2):
            line = row.to(tl.int64) * strides[j]
            raw = load_raw(logits[j], biases[j], line, columns, reach, inside)
            a = head_transform(raw, heads[j], KINDS[j])
            tile = tile + (tl.where(inside, a, -float("inf")),)
        x_s, x_t = tile[0] - c[0], tile[1] - c[1]
        v, g, _s = outcome(x_s, x_t, c[2], c[3], c[4], mix, DIVERGENCE)
        value += tl.sum(v, 0)
        slope += tl.sum(g, 0)
    field = partial + tl.program_id(1) * rows + row
    tl.store(field, tl.sum(value.to(tl.float64), 0))
    tl.store(field + tl.num_programs(1) * rows, tl.sum(slope.to(tl.float64), 0))


@triton.jit(do_not_specialize=["rows", "tiles", "offset", "count", "outside_count"])
def row_gradient(
    logits,  # of each stream that is read a (rows, cols) pointer, rows `strides` apart
    strides,
    biases,  # (cols,) float32, or None
    heads,  # (scale, softcap, temperature)
    out,  # (pointer to (rows, cols), its stride), may be a stream
    out_reach,  # columns that may be written, or None: cols
    coefficients,  # (fields, rows) float32; the constants below are places in it, -1 for none
    sparse,  # (ids (rows, count) int64 ascending, values (rows, count) float32), or None
    count,
    outside,  # (rows, outside_count) int64 ascending, or None
    outside_count,
    mix,  # (alpha, 1 - alpha) of a divergence of two sweeps
    peaks,  # (row tiles, column tiles) int32: bits of the filter's largest magnitudes, or None
    rows,
    cols,
    reach,  # columns that may be read, or None: cols
    tiles,
    offset,
    KINDS: tl.constexpr,
    FIELDS: tl.constexpr,
    SHIFTS: tl.constexpr,  # of each stream its maximum
    INVERSES: tl.constexpr,  # of each stream 1 / sum
    CONSTANT: tl.constexpr,
    STUDENT: tl.constexpr,
    MOMENTS: tl.constexpr,  # of each stream q
    SHARES: tl.constexpr,  # of each stream p / sum
    OUTSIDE: tl.constexpr,  # maximum, value
    CURVED: tl.constexpr,  # teacher's place, divergence, then weight, mean slope, log of sums
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    FILTER: tl.constexpr,  # rows and columns of a filter tile
):
    """The derivative by the first stream's raw logits, chain factor of its head included."""
    row = tl.program_id(0)
    begin = tl.program_id(1) * tiles * (DEPTH * LANES)
    end = tl.minimum(begin + tiles * (DEPTH * LANES), cols)
    lanes = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    c = row_numbers(coefficients, rows, row, FIELDS)
    if sparse is not None:
        listed = sparse[0] + row.to(tl.int64) * count
        values = sparse[1] + row.to(tl.int64) * count
        cursor = first_at_least(listed, count, begin + offset)
        upcoming = next_column(listed, cursor, count, offset)
    if outside is not None:
        left_out = outside + row.to(tl.int64) * outside_count
        out_cursor = first_at_least(left_out, outside_count, begin + offset)
        out_upcoming = next_column(left_out, out_cursor, outside_count, offset)
    for start in range(begin, end, DEPTH * LANES):
        columns = start + lanes
        inside = columns < end
        line = row.to(tl.int64) * strides[0]
        first_raw = load_raw(logits[0], biases[0], line, columns, reach, inside)
        x = (head_transform(first_raw, heads[0], KINDS[0]),)
        for j in tl.static_range(1, len(KINDS)):
            line = row.to(tl.int64) * strides[j]
            raw = load_raw(logits[j], biases[j], line, columns, reach, inside)
            x = x + (head_transform(raw, heads[j], KINDS[j]),)
        d = tl.zeros([DEPTH, LANES], tl.float32)
        if CONSTANT >= 0:
            d += c[CONSTANT]
        d += dense_part(x, c, SHIFTS, INVERSES, STUDENT, MOMENTS, SHARES)
        if outside is not None:
            shift = c[OUTSIDE[0]]
            share = tl.exp(x[0] - shift) * c[OUTSIDE[1]]
            while out_upcoming < start + DEPTH * LANES:
                share = tl.where(columns == out_upcoming, 0.0, share)
                out_cursor += 1
                out_upcoming = next_column(left_out, out_cursor, outside_count, offset)
            d += share
        if len(CURVED) > 0:
            d += curved_part(x, c, mix, SHIFTS, INVERSES, CURVED)
        if sparse is not None:
            while upcoming < start + DEPTH * LANES:
                added = tl.load(values + cursor)
                d += tl.where(columns == upcoming, added, 0.0)
                cursor += 1
                upcoming = next_column(listed, cursor, count, offset)
        d *= head_slope(first_raw, heads[0], KINDS[0])
        stored = tl.where(inside, d, 0.0).to(out[0].dtype.element_ty)
        near = inside
        if out_reach is not None:  # zeros behind the last column
            near = columns < out_reach
        tl.store(out[0] + row.to(tl.int64) * out[1] + columns, stored, mask=near)
        if peaks is not None:
            # Bits of numbers without a sign are in their order, NaN last; a maximum is the same in
            # any order, so that the atomic is deterministic.
            bits = tl.abs(stored.to(tl.float32)).to(tl.int32, bitcast=True)
            most = tl.max(tl.reshape(bits, (DEPTH * LANES // FILTER, FILTER)), 1)
            place = start // FILTER + tl.arange(0, DEPTH * LANES // FILTER)
            of_row = peaks + row // FILTER * tl.cdiv(cols, FILTER)
            tl.atomic_max(of_row + place, most, mask=place * FILTER < end)


@triton.jit
def dense_part(
    x,
    c,
    SHIFTS: tl.constexpr,
    INVERSES: tl.constexpr,
    STUDENT: tl.constexpr,
    MOMENTS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """s_0 (sum_j q_j (a_j - max_j) + student) + sum_j p_j s_j."""
    d = tl.zeros_like(x[0])
    weighs = STUDENT >= 0
    for j in tl.static_range(len(x)):
        weighs = weighs or MOMENTS[j] >= 0
    if weighs:
        factor = tl.zeros_like(d)
        for j in tl.static_range(len(x)):
            if MOMENTS[j] >= 0:
                shifted = x[j] - c[SHIFTS[j]]
                factor += c[MOMENTS[j]] * shifted
        if STUDENT >= 0:  # last: a mean of the sum so far, which it may cancel
            factor += c[STUDENT]
        share = tl.exp(x[0] - c[SHIFTS[0]])
        d += weighted(share * c[INVERSES[0]], factor)
    for j in tl.static_range(len(x)):
        if SHARES[j] >= 0:
            share = tl.exp(x[j] - c[SHIFTS[j]])
            d += share * c[SHARES[j]]
    return d


@triton.jit
def curved_part(
    x,
    c,
    mix,
    SHIFTS: tl.constexpr,
    INVERSES: tl.constexpr,
    CURVED: tl.constexpr,
):
    """The weight times (slope - s * mean slope) of a divergence of two sweeps."""
    t: tl.constexpr = CURVED[0]
    _value, slope, s = outcome(
        x[0] - c[SHIFTS[0]],
        x[t] - c[SHIFTS[t]],
        c[INVERSES[0]],
        c[INVERSES[t]],
        c[CURVED[4]],
        mix,
        CURVED[1],
    )
    mean = c[CURVED[3]]
    return c[CURVED[2]] * (slope - s * mean)


@triton.jit(do_not_specialize=["numel"])
def transform_values(values, head, numel, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Raw logits behind their head transform, in place; float32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(values + place, mask=place < numel, other=0.0)
    tl.store(values + place, head_transform(raw, head, KIND), mask=place < numel)
