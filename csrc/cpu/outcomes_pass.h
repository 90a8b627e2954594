// The second sweep: sums over a divergence's outcomes. For row_pass.cpp alone, once per
// instruction set.
#pragma once

#include "statistics_pass.h"

namespace pad {
namespace PAD_ISA {
namespace {

// What the loops over a divergence need of one row.
template <class T>
OutcomeRow<T> outcome_row(const double* const* maximum, const double* const* sum, int teacher,
                          int64_t row) {
  const double sum_s = sum[0][row], sum_t = sum[teacher][row];
  return {shift_of(T(maximum[0][row])), shift_of(T(maximum[teacher][row])), T(inverse_of(sum_s)),
          T(inverse_of(sum_t)), T(log(sum_t / sum_s))};
}

struct OutcomeSums {
  double value = 0, slope = 0;

  void add(const OutcomeSums& other) {
    value += other.value;
    slope += other.slope;
  }
};

// A formula of outcome_of as a type, and the one of a kind and alpha handed to a function.
template <DivergenceKind kKind, bool kHalf = false>
struct Formula {
  template <class T>
  static PAD_HD Outcome<T> of(T a_s, T a_t, const OutcomeRow<T>& row, const Mixing<T>& mix) {
    return outcome_of<kKind, kHalf>(a_s, a_t, row, mix);
  }
  // With the exponentials, which the row's inverses make probabilities.
  template <class T>
  static PAD_HD Outcome<T> given(T a_s, T a_t, T exp_s, T exp_t, const OutcomeRow<T>& row,
                                 const Mixing<T>& mix) {
    const T s = exp_s * row.inverse_s, t = exp_t * row.inverse_t;
    return outcome_from<kKind, kHalf>(a_s - row.shift_s, a_t - row.shift_t, row, mix,
                                      [&](bool leads) { return leads ? t : s; });
  }
};
template <class T, class Use>
auto by_formula(DivergenceKind kind, const Mixing<T>& mix, Use use) {
  switch (kind) {
    case DivergenceKind::jsd:
      return mix.alpha == T(0.5) ? use(Formula<DivergenceKind::jsd, true>())
                                 : use(Formula<DivergenceKind::jsd>());
    case DivergenceKind::skew_forward_kl:
      return use(Formula<DivergenceKind::skew_forward_kl>());
    case DivergenceKind::skew_reverse_kl:
      return use(Formula<DivergenceKind::skew_reverse_kl>());
    default:
      return use(Formula<DivergenceKind::tvd>());
  }
}

template <class Formula, class A, class T>
void chunk_outcomes(const A* a_s, const A* a_t, int64_t n, const OutcomeRow<T>& constants,
                    const Mixing<T>& mix, OutcomeSums* sums) {
  const OutcomeRow<T> row = constants;
  T value = 0, slope = 0;
  PAD_SIMD_SUM(value, slope)
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<T> found = Formula::of(load(a_s[i]), load(a_t[i]), row, mix);
    value += found.value;
    slope += found.slope;
  }
  sums->value += value;
  sums->slope += slope;
}
// The same given the exponentials. The slopes take the place of the teacher's.
template <class Formula, class A, class T>
void chunk_kept_outcomes(const A* a_s, const A* a_t, const T* exps_s, T* exps_t, int64_t n,
                         const OutcomeRow<T>& constants, const Mixing<T>& mix, OutcomeSums* sums) {
  const OutcomeRow<T> row = constants;
  T value = 0, slope = 0;
  PAD_SIMD_SUM(value, slope)
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<T> found =
        Formula::given(load(a_s[i]), load(a_t[i]), exps_s[i], exps_t[i], row, mix);
    value += found.value;
    slope += found.slope;
    exps_t[i] = found.slope;
  }
  sums->value += value;
  sums->slope += slope;
}

// The coefficients of one row's gradient of a divergence: d = c0 + weight * slope + s * own.
template <class T>
struct DivergenceRow {
  OutcomeRow<T> outcome;
  Mixing<T> mix;
  T c0, weight, own;
};

// d of a tile from a divergence. `out` may be `a_s`.
template <class Formula, class O, class A, class T>
void divergence_loop(const A* a_s, const A* a_t, int64_t n, const DivergenceRow<T>& coefficients,
                     O* out) {
  const DivergenceRow<T> row = coefficients;
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<T> found = Formula::of(load(a_s[i]), load(a_t[i]), row.outcome, row.mix);
    out[i] = store<O>(row.c0 + row.weight * found.slope + found.s * row.own);
  }
}
template <class O, class A, class T>
void divergence_gradient(DivergenceKind kind, const A* a_s, const A* a_t, int64_t n,
                         const DivergenceRow<T>& row, O* out) {
  by_formula(kind, row.mix,
             [&](auto formula) { divergence_loop<decltype(formula)>(a_s, a_t, n, row, out); });
}

// Sums over a tile. Of `kept`, if given, it has the exponentials from `col` on.
template <class A, class T>
OutcomeSums outcomes_of(DivergenceKind kind, const A* a_s, const A* a_t, int64_t n,
                        const OutcomeRow<T>& row, const Mixing<T>& mix, Kept<T>* kept,
                        int64_t col) {
  OutcomeSums sums;
  by_formula(kind, mix, [&](auto formula) {
    using F = decltype(formula);
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t m = smaller(kChunk, n - i);
      if (kept)
        chunk_kept_outcomes<F>(a_s + i, a_t + i, kept->exps(0, col + i), kept->exps(1, col + i), m,
                               row, mix, &sums);
      else
        chunk_outcomes<F>(a_s + i, a_t + i, m, row, mix, &sums);
    }
  });
  return sums;
}

template <class Z, class T>
OutcomeSums segment_outcomes(const OutcomeArgs& args, const Head<T>* head, int64_t row,
                             int64_t begin, int64_t end, Kept<T>* kept) {
  const DivergenceArgs& divergence = args.divergence;
  const int stream[2] = {0, divergence.teacher};
  const OutcomeRow<T> constants = outcome_row<T>(args.maximum, args.sum, divergence.teacher, row);
  const Mixing<T> mix(divergence.alpha);
  bool raw = true;
  for (int j : stream) raw = raw && Rows<Z>::raw(args.stream[j], head[j]);
  OutcomeSums total;
  for (int64_t col = begin; col < end; col += kTile) {
    const int64_t n = smaller(kTile, end - col);
    prefetch_streams<Z>(args, row, col + n, smaller(kTile, end - col - n));
    const Z* z[2];
    for (int k = 0; k < 2; ++k) z[k] = Rows<Z>::logits(args.stream[stream[k]], row, col);
    if (raw) {
      OutcomeRow<T> tile = constants;
      if (kept) {
        tile.inverse_s *= kept->scale(0, col, T(args.maximum[0][row]));
        tile.inverse_t *= kept->scale(1, col, T(args.maximum[1][row]));
      }
      total.add(outcomes_of(divergence.kind, z[0], z[1], n, tile, mix, kept, col));
      continue;
    }
    alignas(64) T a[2][kTile];
    for (int k = 0; k < 2; ++k)
      transform_tile<T, Z>(z[k], Rows<Z>::bias(args.stream[stream[k]], col), head[stream[k]], n,
                           a[k], nullptr);
    Kept<T>* none = nullptr;
    total.add(outcomes_of(divergence.kind, a[0], a[1], n, constants, mix, none, col));
  }
  return total;
}

template <class Z>
void outcomes(const OutcomeArgs& args) {
  using T = typename Accumulator<Z>::type;
  Head<T> head[kMaxStreams];
  make_heads(args, head);
  over_rows<OutcomeSums>(
      args,
      [&](int64_t row, int64_t begin, int64_t end) {
        return segment_outcomes<Z, T>(args, head, row, begin, end, nullptr);
      },
      [](OutcomeSums& into, const OutcomeSums& other) { into.add(other); },
      [&](int64_t row, const OutcomeSums& whole) {
        args.value[row] += whole.value;
        args.slope[row] += whole.slope;
      });
}

}  // namespace
}  // namespace PAD_ISA
}  // namespace pad
