// The formulas of the row functionals, once, for the CPU and the GPU.
//
// A row of logits is summarised by a RowState; `merge` joins the states of two parts of a row and
// is associative, so the same function serves the next vocabulary chunk, another thread and another
// block of threads. Everything is branch-free scalar code that a compiler turns into vectors.
#pragma once

#include <math.h>

#include "elementary.h"
#include "pad.h"

namespace pad {

constexpr int kMaxStreams = 4;  // student, and up to three teachers
constexpr int kMaxMoments = 4;

enum class DivergenceKind { jsd, skew_forward_kl, skew_reverse_kl, tvd };

namespace PAD_ISA {

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

// The mixture is m = of_t t + of_s s. Logarithms are taken of m over the larger of s and t, which
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
