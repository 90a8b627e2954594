// Exponential, logarithm and tanh, once, for the CPU and the GPU: scalar code without branches that
// a compiler turns into vectors, and that is as exact as the type.
#pragma once

#include <math.h>

#include "pad.h"

namespace pad {
namespace PAD_ISA {

// exp(x) = scale * (1 + tail), scale a power of two. Kept apart so that one FMA joins them.
template <class T>
struct ExpParts {
  T scale;
  T tail;
};

// For x in [ln(FLT_MIN), ln(FLT_MAX)). ln 2 is split so that n * head is exact without an FMA, and
// the polynomial is the minimax one of relative error 3.1e-9 on |r| <= ln(2) / 2. Adding the
// shifter rounds to an integer n and leaves n + 127, the exponent of 2^n, in the lowest bits.
PAD_HD ExpParts<float> exp_parts(float x) {
  const float shifter = 12582912.0f + 127.0f;  // 1.5 * 2^23
  const float shifted = x * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 1.3814540580e-3f;
  q = q * r + 8.3687454462e-3f;
  q = q * r + 4.1668388993e-2f;
  q = q * r + 1.66665211320e-1f;
  q = q * r + 4.99999940395e-1f;
  return {bits_as<float>(bits_as<uint32_t>(shifted) << 23), q * r * r + r};
}

// The same in double; the Taylor series to r^13 leaves 4e-18.
PAD_HD ExpParts<double> exp_parts(double x) {
  const double shifter = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52
  const double shifted = x * 1.44269504088896340736 + shifter;
  const double n = shifted - shifter;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double q = 1.0 / 6227020800.0;
  q = q * r + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  return {bits_as<double>(bits_as<uint64_t>(shifted) << 52), q * r * r + r};
}

// Where the exponential leaves the normal numbers. Below it is an exact 0, never a denormal (they
// are slow, and no sum of probabilities sees them). Above it saturates at 2.4e38 (9e307): x is a
// logit minus its row's maximum, so it can only be positive by the rounding of a recomputed logit.
template <class T>
struct ExpRange;
template <>
struct ExpRange<float> {
  static constexpr float lowest = -87.3365402f, highest = 88.3762589f, flat = 40.0f;
};
template <>
struct ExpRange<double> {
  static constexpr double lowest = -708.396418532264, highest = 709.0895657128, flat = 100.0;
};

// exp: about 1 ulp, exact 0 from -inf to underflow; NaN stays NaN. For x <= 0, which is what there
// is once the maximum is known.
template <class T>
PAD_HD T exp_below(T x) {
  const ExpParts<T> parts = exp_parts(x);
  return x < ExpRange<T>::lowest ? T(0) : parts.scale * parts.tail + parts.scale;
}
// For any x.
template <class T>
PAD_HD T exp_of(T x) {
  return exp_below(x > ExpRange<T>::highest ? ExpRange<T>::highest : x);
}
#if defined(__CUDA_ARCH__)
// A GPU's own takes half as many instructions, one of them its exponential unit.
template <>
__device__ inline float exp_of<float>(float x) {
  return expf(x);
}
#endif

// log(1 + y) for y in (-1, 0], about 1 ulp. 1 + y = 2^k f with f in [sqrt(1/2), sqrt(2)); where
// k is 0 the series takes y itself, so that a small y keeps its digits.
template <class T>
struct LogReduction;
template <>
struct LogReduction<float> {
  using Bits = int32_t;
  static constexpr int32_t half = 0x3f3504f3;  // sqrt(1/2)
  static constexpr int mantissa = 23;
};
template <>
struct LogReduction<double> {
  using Bits = int64_t;
  static constexpr int64_t half = 0x3fe6a09e667f3bcdll;
  static constexpr int mantissa = 52;
};
// (log(1 + f) - f) / f^2 for f in [sqrt(1/2) - 1, sqrt(2) - 1]. In float a minimax polynomial of
// relative error 5e-9 in the logarithm: a division would take longer than all of it. In double
// the series of atanh(q), q = f / (2 + f), to below 1 ulp.
PAD_HD float log1p_series(float f) {
  float q = -7.62306079e-2f;
  q = q * f + 1.29055038e-1f;
  q = q * f - 1.32429808e-1f;
  q = q * f + 1.41816348e-1f;
  q = q * f - 1.66090563e-1f;
  q = q * f + 2.00019851e-1f;
  q = q * f - 2.50015855e-1f;
  q = q * f + 3.33333254e-1f;
  return q * f - 4.99999881e-1f;
}
PAD_HD double log1p_series(double f) {
  const double h = 1 / (2 + f), z = f * h * f * h;
  double q = 1.0 / 23;
  q = q * z + 1.0 / 21;
  q = q * z + 1.0 / 19;
  q = q * z + 1.0 / 17;
  q = q * z + 1.0 / 15;
  q = q * z + 1.0 / 13;
  q = q * z + 1.0 / 11;
  q = q * z + 1.0 / 9;
  q = q * z + 1.0 / 7;
  q = q * z + 1.0 / 5;
  q = q * z + 1.0 / 3;
  return h * (2 * h * h * f * q - 1);
}
// u is 1 + y, with the digits that a sum of 1 and y near -1 would lose.
template <class T>
PAD_HD T log1p_of(T y, T u) {
  using Bits = typename LogReduction<T>::Bits;
  const Bits bits = bits_as<Bits>(u);
  const Bits k = (bits - LogReduction<T>::half) >> LogReduction<T>::mantissa;
  const T reduced = bits_as<T>(Bits(bits - k * (Bits(1) << LogReduction<T>::mantissa))) - T(1);
  const T f = k == 0 ? y : reduced;
  return T(k) * T(0.693147180559945309417) + (log1p_series(f) * f * f + f);
}

// The same for y in [-1/2, 0], which needs no reduction: in float a polynomial of relative error
// 4e-9.
PAD_HD float log1p_to_half(float y) {
  float q = -1.745943427f;
  q = q * y - 2.482321501f;
  q = q * y - 1.976712704f;
  q = q * y - 5.953666568e-1f;
  q = q * y - 3.410469592e-1f;
  q = q * y + 1.756901294e-1f;
  q = q * y - 2.518885434e-1f;
  q = q * y + 3.332621455e-1f;
  q = q * y - 5.000008941e-1f;
  return q * y * y + y;
}
PAD_HD double log1p_to_half(double y) { return log1p_of(y, 1 + y); }

// tanh with an error of about 1 ulp at every size of x: an odd polynomial (Chebyshev fits of
// relative error 1e-9 and 1e-19) where |x| < 0.65, else 1 - 2 / (exp(2|x|) + 1). Also 1 - tanh^2,
// which 1 - t * t would lose to cancellation where the soft cap saturates.
PAD_HD float tanh_polynomial(float z) {
  float q = 2.2149027422e-3f;
  q = q * z - 8.2724567323e-3f;
  q = q * z + 2.1746187089e-2f;
  q = q * z - 5.3956349394e-2f;
  q = q * z + 1.3333290746e-1f;
  return q * z - 3.3333333084e-1f;
}
PAD_HD double tanh_polynomial(double z) {
  double q = -2.2629737427941101312e-06;
  q = q * z + 1.1798355545481783345e-05;
  q = q * z - 3.6660183711190407995e-05;
  q = q * z + 9.5794178887567163116e-05;
  q = q * z - 2.3879773217106857343e-04;
  q = q * z + 5.8995935509657702084e-04;
  q = q * z - 1.4558247379056235066e-03;
  q = q * z + 3.5921271155005115651e-03;
  q = q * z - 8.8632354732576105548e-03;
  q = q * z + 2.1869488534076167651e-02;
  q = q * z - 5.3968253968214229427e-02;
  q = q * z + 1.3333333333333303428e-01;
  return q * z - 3.3333333333333333296e-01;
}
template <class T>
struct TanhSlope {
  T value;
  T slope;
};
template <class T>
PAD_HD TanhSlope<T> tanh_of(T x) {
  const T size = x < T(0) ? -x : x;
  const T clamped = size > ExpRange<T>::flat ? ExpRange<T>::flat : size;
  const ExpParts<T> parts = exp_parts(T(-2) * clamped);
  const T decay = parts.scale * parts.tail + parts.scale;  // exp(-2|x|)
  const T inverse = T(1) / (T(1) + decay);
  const T z = x * x;
  const T near = tanh_polynomial(z) * z * size + size;
  const T far = T(1) - T(2) * decay * inverse;
  const T magnitude = size < T(0.65) ? near : far;
  // A NaN compares false throughout and comes out of `far`.
  return {x < T(0) ? -magnitude : magnitude, T(4) * decay * inverse * inverse};
}

}  // namespace PAD_ISA
}  // namespace pad
