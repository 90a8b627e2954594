"""Element-wise formulas that the kernels share: exponentials, the head transform, merging.

The formulas are those of ``csrc/elementary.h``. Kernels that use them are compiled with
``enable_fp_fusion=False``: a logit must have the same bits in a statistic, in a gradient and where
a label's logit is looked up, whatever is computed next to it. Where an FMA helps it is written out.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: What a head does to raw products: nothing, scale and temperature, or a soft cap as well.
IDENTITY, LINEAR, CAPPED = 0, 1, 2

# Where the float32 exponential leaves the normal numbers, and where tanh is 1 to all digits.
LOWEST: tl.constexpr = tl.constexpr(-87.3365402)
FLAT: tl.constexpr = tl.constexpr(40.0)


@triton.jit
def finite_or_zero(maximum):
    """A reference to subtract: the maximum, or 0 where everything is -inf."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def weighted(weight, factor):
    """Weight * factor, where a weight of 0 counts 0 whatever it multiplies."""
    return tl.where(weight == 0, 0.0, weight * factor)


@triton.jit
def rescale(part, whole):
    """exp(part - whole) of two maxima; 0 for an empty part, exactly 1 for an equal one."""
    return tl.where(part == whole, 1.0, tl.exp(part - finite_or_zero(whole)))


@triton.jit
def exp_parts(x):
    """(scale, tail) with exp(x) = scale (1 + tail), x in [LOWEST, 0]; scale is a power of two.

    One ulp, unlike the hardware's exponential, and exp(x) - 1 keeps its digits. ln 2 is split so
    that n * head is exact; the polynomial has a relative error of 3.1e-9 on |r| <= ln(2) / 2.
    """
    shifted = x * 1.44269504088896341 + 12582912.0  # adding 1.5 * 2^23 rounds to an integer
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    q = tl.fma(r, 1.3814540580e-3, 8.3687454462e-3)
    q = tl.fma(q, r, 4.1668388993e-2)
    q = tl.fma(q, r, 1.66665211320e-1)
    q = tl.fma(q, r, 4.99999940395e-1)
    exponent = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return exponent.to(tl.float32, bitcast=True), tl.fma(q * r, r, r)


@triton.jit
def log1p_of(y, u):
    """log(1 + y) for y in (-1, 0], about 1 ulp.

    ``u`` is 1 + y, with the digits that a sum of 1 and y near -1 would lose.
    """
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # u = 2^k f with f in [sqrt(1/2), sqrt(2))
    reduced = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(k == 0, y, reduced)  # a small y keeps its digits
    q = f / (2.0 + f)
    z = q * q
    series = tl.fma(z, 1.0 / 11, 1.0 / 9)
    series = tl.fma(series, z, 1.0 / 7)
    series = tl.fma(series, z, 1.0 / 5)
    series = tl.fma(series, z, 1.0 / 3)
    return k.to(tl.float32) * 0.693147180559945309417 + 2.0 * (q + q * z * series)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2, each to about 1 ulp at every size of x."""
    size = tl.abs(x)
    scale, tail = exp_parts(-2.0 * tl.minimum(size, FLAT))
    decay = scale * tail + scale  # exp(-2|x|)
    inverse = 1.0 / (1.0 + decay)
    z = x * x
    q = tl.fma(z, 2.2149027422e-3, -8.2724567323e-3)
    q = tl.fma(q, z, 2.1746187089e-2)
    q = tl.fma(q, z, -5.3956349394e-2)
    q = tl.fma(q, z, 1.3333290746e-1)
    q = tl.fma(q, z, -3.3333333084e-1)
    near = tl.fma(q * z, size, size)
    far = 1.0 - 2.0 * decay * inverse
    magnitude = tl.where(size < 0.65, near, far)
    # minimum drops a NaN, so it is put back.
    value = tl.where(x != x, x, tl.where(x < 0, -magnitude, magnitude))
    return value, 4.0 * decay * inverse * inverse


@triton.jit
def head_transform(raw, head, KIND: tl.constexpr):
    """Raw products, bias added, to logits; ``head`` is (scale, softcap, temperature).

    Rounded step by step, as a dense computation does: a product with a rounded reciprocal would
    shift all logits one way, and a normaliser of 1e4 shows it.
    """
    if KIND == 0:
        return raw
    logits = raw * head[0]
    if KIND == 2:
        logits = tanh_and_slope(tl.div_rn(logits, head[1]))[0] * head[1]
    return tl.div_rn(logits, head[2])


@triton.jit
def head_slope(raw, head, KIND: tl.constexpr):
    """The derivative of :func:`head_transform` at ``raw``."""
    if KIND == 0:
        return 1.0
    slope = head[0] / head[2]
    if KIND == 2:
        slope = slope * tanh_and_slope(tl.div_rn(raw * head[0], head[1]))[1]
    return slope


@triton.jit
def merge_normalizers(maximum, total, other_maximum, other_total):
    """(max, sum of exp(logit - max)) of two disjoint parts of a row. Associative."""
    joined = tl.maximum(maximum, other_maximum)
    total = total * rescale(maximum, joined) + other_total * rescale(other_maximum, joined)
    return joined, total
