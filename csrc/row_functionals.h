// The formulas of the row functionals, once, for the CPU and the GPU.
//
// A row of logits is summarised by a RowState; `merge` joins the states of two parts of a row and
// is associative, so the same function serves the next vocabulary chunk, another thread and another
// block of threads. `gradient_entry` is the derivative with respect to one logit once the state of
// the whole row is known. Everything is branch-free scalar code that a compiler turns into vectors.
#pragma once

#include <math.h>

#include "pad.h"

namespace pad {

constexpr int kMaxStreams = 4;  // student, and up to three teachers
constexpr int kMaxMoments = 4;

enum class DivergenceKind { jsd, skew_forward_kl, skew_reverse_kl, tvd };

namespace PAD_ISA {

// ---------------------------------------------------------------- exponential and tanh

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

// ---------------------------------------------------------------- head transform

// a = softcap * tanh((z + bias) * scale / softcap) / temperature, and da/dz. The steps are rounded
// one by one, as a dense computation does: a product with a rounded reciprocal would shift all
// logits one way, and a normaliser of 1e4 shows it.
template <class T>
struct Head {
  T scale, softcap, temperature;
  T slope;  // scale / temperature: the derivative where nothing is capped
  bool capped;
  bool identity;  // a == z, but for the bias
};

template <class T>
PAD_HD Head<T> make_head(double scale, double softcap, double temperature) {
  Head<T> head;
  head.capped = softcap > 0;
  head.scale = T(scale);
  head.softcap = T(softcap);
  head.temperature = T(temperature);
  head.slope = T(scale / temperature);
  head.identity = !head.capped && head.scale == T(1) && head.temperature == T(1);
  return head;
}

// ---------------------------------------------------------------- statistics

// Finite stand-in for an empty maximum, so that -inf - max is -inf and not NaN.
template <class T>
PAD_HD T shift_of(T maximum) {
  return maximum == -T(INFINITY) ? T(0) : maximum;
}

// exp * factor, where a probability of 0 counts 0 whatever it multiplies.
template <class T>
PAD_HD T weighted(T exp, T factor) {
  return exp == T(0) ? T(0) : exp * factor;
}

// The larger one; NaN wins.
template <class T>
PAD_HD T larger(T left, T right) {
  return (left > right || left != left) ? left : right;
}

// of[index] by comparison: a GPU cannot index registers with a number known at run time alone.
template <class T>
PAD_HD T chosen(const T* of, int index) {
  T found = of[0];
  PAD_UNROLL
  for (int j = 1; j < kMaxStreams; ++j) found = j == index ? of[j] : found;
  return found;
}

// M = sum_v exp(a_w - max_w) * sum_j c_j (a_j - max_j). A log-ratio of two streams has coefficients
// 1 and -1, and over and under are their numbers; else they are -1.
template <class T>
struct Moment {
  int weight;                   // w
  T coefficients[kMaxStreams];  // c_j
  int over, under;
};

template <class T>
struct RowState {
  T maximum[kMaxStreams];
  T sum[kMaxStreams];  // sum_v exp(a_j - maximum_j)
  T moment[kMaxMoments];
  T total;  // sum_v a_0
  T best;   // the largest a_0 and where it is; a NaN is larger than all
  int64_t best_index;
};

template <class T>
PAD_HD RowState<T> empty_state() {
  RowState<T> state;
  for (int j = 0; j < kMaxStreams; ++j) {
    state.maximum[j] = -T(INFINITY);
    state.sum[j] = T(0);
  }
  for (int k = 0; k < kMaxMoments; ++k) state.moment[k] = T(0);
  state.total = T(0);
  state.best = -T(INFINITY);
  state.best_index = -1;
  return state;
}

// exp(part - whole) with a part that is empty counting 0 and an equal one exactly 1.
template <class T>
PAD_HD T merge_scale(T part, T whole) {
  if (part == whole) return T(1);
  return part == -T(INFINITY) ? T(0) : exp_of(part - whole);
}

// What one side brings to a moment of the union, whose maxima are `maximum`.
template <class T>
PAD_HD T merged_moment(const RowState<T>& side, T value, const T* maximum, const Moment<T>& moment,
                       int streams) {
  const int w = moment.weight;
  const T sum = chosen(side.sum, w);
  const T scale = merge_scale(chosen(side.maximum, w), chosen(maximum, w));
  if (scale == T(0) || sum == T(0)) return T(0);
  T shift = T(0);
  PAD_UNROLL
  for (int j = 0; j < kMaxStreams; ++j) {
    if (j >= streams) break;
    // A side whose stream j is all -inf has an infinite moment already: no shift changes it.
    const bool moves = side.maximum[j] != maximum[j] && side.maximum[j] != -T(INFINITY);
    if (moves && moment.coefficients[j] != T(0))
      shift += moment.coefficients[j] * (side.maximum[j] - maximum[j]);
  }
  return scale * (value + shift * sum);
}

template <class T>
PAD_HD void merge(RowState<T>& into, const RowState<T>& other, int streams,
                  const Moment<T>* moments, int moment_count) {
  T maximum[kMaxStreams];
  PAD_UNROLL
  for (int j = 0; j < kMaxStreams; ++j) maximum[j] = larger(into.maximum[j], other.maximum[j]);
  PAD_UNROLL
  for (int k = 0; k < kMaxMoments; ++k) {
    if (k >= moment_count) break;
    into.moment[k] = merged_moment(into, into.moment[k], maximum, moments[k], streams) +
                     merged_moment(other, other.moment[k], maximum, moments[k], streams);
  }
  PAD_UNROLL
  for (int j = 0; j < kMaxStreams; ++j) {
    if (j >= streams) break;
    into.sum[j] = into.sum[j] * merge_scale(into.maximum[j], maximum[j]) +
                  other.sum[j] * merge_scale(other.maximum[j], maximum[j]);
    // A NaN among the logits reaches every sum, but not every maximum.
    into.maximum[j] = into.sum[j] != into.sum[j] ? into.sum[j] : maximum[j];
  }
  into.total += other.total;
  if (other.best_index < 0) return;
  const bool into_nan = into.best != into.best, other_nan = other.best != other.best;
  const bool level = into.best == other.best || (into_nan && other_nan);
  const bool wins = level ? other.best_index < into.best_index
                          : (other_nan || (!into_nan && other.best > into.best));
  if (wins || into.best_index < 0) {
    into.best = other.best;
    into.best_index = other.best_index;
  }
}

// ---------------------------------------------------------------- gradient

// Whether the largest of a row's logits has all the probability, to the last digit. What is less
// its mean over such a row is 0, and rounding would be all that is left of it.
template <class T>
bool certain(double sum) {
  return T(sum) == T(1);
}

// 1 / sum, where a row without any mass has probabilities of 0.
template <class T>
PAD_HD T inverse_of(T sum) {
  return sum == T(0) ? T(0) : T(1) / sum;
}

// ---------------------------------------------------------------- divergences of two sweeps

// What one vocabulary entry adds to a divergence between student and teacher probabilities s and t.
// `value` is balanced by a multiple of s - t, so that it is never below 0 but for rounding; `slope`
// is s (d(value)/ds + c); the gradient by the student's logit is slope - s * (sum of slopes),
// whatever c is. It is what makes slopes small: 0 where s = t, but for skew_forward_kl, whose
// slopes without it are no larger than t.
template <class T>
struct Outcome {
  T value, slope, s;
};

// alpha and 1 - alpha, each rounded once.
template <class T>
struct Mixing {
  T alpha, rest;
  PAD_HD explicit Mixing(double share) : alpha(T(share)), rest(T(1.0 - share)) {}
};

// One row's constants: s = exp(a_s - shift) * inverse, and log t/s = (x_t - x_s) - log_sums.
template <class T>
struct OutcomeRow {
  T shift_s, shift_t, inverse_s, inverse_t, log_sums;
};

// The mixture is m = w t + (1 - w) s. Logarithms are taken of m over the larger of s and t, which
// lies in (0, 1]: neither huge ratios nor nearly equal probabilities lose digits. `kHalf`: alpha is
// one half, and the jsd symmetric. `larger_of(leads)` is t where the teacher leads, else s.
template <DivergenceKind kKind, bool kHalf, class T, class Larger>
PAD_HD Outcome<T> outcome_from(T x_s, T x_t, const OutcomeRow<T>& row, const Mixing<T>& mix,
                               Larger larger_of) {
  // Far below any probability, but finite: an entry that neither has needs no case of its own.
  const T far = T(-1e30);
  x_s = x_s < far ? far : x_s;
  const bool reverse = kKind == DivergenceKind::skew_reverse_kl;
  const T of_t = reverse ? mix.rest : mix.alpha, of_s = reverse ? mix.alpha : mix.rest;
  const T ratio = (x_t - x_s) - row.log_sums;  // log t/s
  const bool leads = ratio >= T(0);            // the teacher has more
  const T size = leads ? ratio : -ratio;
  const bool vanishes = size > -ExpRange<T>::lowest;
  const T distance = vanishes ? -ExpRange<T>::lowest : size;
  const ExpParts<T> parts = exp_parts(-distance);
  // smaller / larger, and the same less 1
  const T part = vanishes ? T(0) : parts.scale * parts.tail + parts.scale;
  const T less = parts.scale * parts.tail + (parts.scale - T(1));
  const T larger = larger_of(leads);
  const T smaller = larger * part;
  const T s = leads ? smaller : larger;
  if (kKind == DivergenceKind::tvd) {
    // The sign of log t/s, which is exactly 0 for equal models; s - t may not be.
    const T half = ratio == T(0) ? T(0) : (leads ? T(-0.5) : T(0.5));
    return {T(-0.5) * larger * less, s * half, s};
  }
  const T under = kHalf ? T(0.5) : (leads ? of_s : of_t);  // weight of the smaller
  const T y = under * less;
  const T whole = (leads ? of_t : of_s) + under * part;           // m/larger = 1 + y
  const T below = kHalf ? log1p_to_half(y) : log1p_of(y, whole);  // its logarithm
  const T of_larger = -larger * below, of_smaller = -smaller * (distance + below);
  if (kHalf)
    return {T(0.5) * (of_larger + of_smaller), T(0.5) * (leads ? of_smaller : of_larger), s};
  const T of_student = leads ? of_smaller : of_larger;  // s log s/m
  const T of_teacher = leads ? of_larger : of_smaller;  // t log t/m
  if (kKind == DivergenceKind::jsd) {
    const T slope = mix.rest * of_student;
    return {mix.alpha * of_teacher + slope, slope, s};
  }
  const T gap = leads ? larger * less : -larger * less;  // s - t
  const T share = (leads ? part : T(1)) / whole;         // s / m
  if (kKind == DivergenceKind::skew_forward_kl)
    return {of_teacher + mix.rest * gap, -mix.rest * (leads ? larger : smaller) * share, s};
  return {of_student - mix.rest * gap, of_student - mix.alpha * mix.rest * gap * share, s};
}

template <DivergenceKind kKind, bool kHalf = false, class T>
PAD_HD Outcome<T> outcome_of(T a_s, T a_t, const OutcomeRow<T>& row, const Mixing<T>& mix) {
  const T x_s = a_s - row.shift_s, x_t = a_t - row.shift_t;
  return outcome_from<kKind, kHalf>(x_s, x_t, row, mix, [&](bool leads) {
    return exp_of(leads ? x_t : x_s) * (leads ? row.inverse_t : row.inverse_s);
  });
}

}  // namespace PAD_ISA
}  // namespace pad
