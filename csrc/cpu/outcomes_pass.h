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

template <DivergenceKind kKind, class A, class T>
T chunk_outcomes(const A* a_s, const A* a_t, int64_t n, const OutcomeRow<T>& constants, T alpha,
                 T* slope_out, T* slopes) {
  const OutcomeRow<T> row = constants;
  T value = 0, slope = 0;
  PAD_SIMD_SUM(value, slope)
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<T> found = outcome_of<kKind>(load(a_s[i]), load(a_t[i]), row, alpha);
    value += found.value;
    slope += found.slope;
    slopes[i] = found.slope;
  }
  *slope_out = slope;
  return value;
}
// `kept`: where the tile's slopes go as bytes, or null. They may overwrite the teacher's logits of
// what lies before them and, as a chunk is read before it is written, of the chunk itself.
template <DivergenceKind kKind, class A, class T>
OutcomeSums tile_outcomes(const A* a_s, const A* a_t, int64_t n, const OutcomeRow<T>& row, T alpha,
                          char* kept) {
  OutcomeSums sums;
  alignas(64) T slopes[kChunk];
  sums.value = over_chunks(n, [&](int64_t i, int64_t m) {
    T slope;
    const T value = chunk_outcomes<kKind>(a_s + i, a_t + i, m, row, alpha, &slope, slopes);
    if (kept) memcpy(kept + i * int64_t(sizeof(T)), slopes, size_t(m) * sizeof(T));
    sums.slope += slope;
    return value;
  });
  return sums;
}

// The coefficients of one row's gradient of a divergence: d = c0 + weight * slope + s * own.
template <class T>
struct DivergenceRow {
  OutcomeRow<T> outcome;
  T alpha, c0, weight, own;
};

// d of a tile from a divergence. `out` may be `a_s`.
template <DivergenceKind kKind, class O, class A, class T>
void divergence_loop(const A* a_s, const A* a_t, int64_t n, const DivergenceRow<T>& coefficients,
                     O* out) {
  const DivergenceRow<T> row = coefficients;
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<T> found = outcome_of<kKind>(load(a_s[i]), load(a_t[i]), row.outcome, row.alpha);
    out[i] = store<O>(row.c0 + row.weight * found.slope + found.s * row.own);
  }
}
template <class O, class A, class T>
void divergence_gradient(DivergenceKind kind, const A* a_s, const A* a_t, int64_t n,
                         const DivergenceRow<T>& row, O* out) {
  switch (kind) {
    case DivergenceKind::jsd:
      return divergence_loop<DivergenceKind::jsd>(a_s, a_t, n, row, out);
    case DivergenceKind::skew_forward_kl:
      return divergence_loop<DivergenceKind::skew_forward_kl>(a_s, a_t, n, row, out);
    case DivergenceKind::skew_reverse_kl:
      return divergence_loop<DivergenceKind::skew_reverse_kl>(a_s, a_t, n, row, out);
    case DivergenceKind::tvd:
      return divergence_loop<DivergenceKind::tvd>(a_s, a_t, n, row, out);
  }
}

template <class A, class T>
OutcomeSums outcomes_of(DivergenceKind kind, const A* a_s, const A* a_t, int64_t n,
                        const OutcomeRow<T>& row, T alpha, char* kept) {
  switch (kind) {
    case DivergenceKind::jsd:
      return tile_outcomes<DivergenceKind::jsd>(a_s, a_t, n, row, alpha, kept);
    case DivergenceKind::skew_forward_kl:
      return tile_outcomes<DivergenceKind::skew_forward_kl>(a_s, a_t, n, row, alpha, kept);
    case DivergenceKind::skew_reverse_kl:
      return tile_outcomes<DivergenceKind::skew_reverse_kl>(a_s, a_t, n, row, alpha, kept);
    case DivergenceKind::tvd:
      return tile_outcomes<DivergenceKind::tvd>(a_s, a_t, n, row, alpha, kept);
  }
  return {};
}

template <class Z>
OutcomeSums segment_outcomes(const OutcomeArgs& args,
                             const Head<typename Accumulator<Z>::type>* head, int64_t row,
                             int64_t begin, int64_t end, char* kept) {
  using T = typename Accumulator<Z>::type;
  const DivergenceArgs& divergence = args.divergence;
  const int stream[2] = {0, divergence.teacher};
  const OutcomeRow<T> constants = outcome_row<T>(args.maximum, args.sum, divergence.teacher, row);
  const T alpha = T(divergence.alpha);
  bool raw = true;
  for (int j : stream) raw = raw && Rows<Z>::raw(args.stream[j], head[j]);
  OutcomeSums total;
  for (int64_t col = begin; col < end; col += kTile) {
    const int64_t n = smaller(kTile, end - col);
    prefetch_streams<Z>(args, row, col + n, smaller(kTile, end - col - n));
    const Z* z[2];
    for (int k = 0; k < 2; ++k) z[k] = Rows<Z>::logits(args.stream[stream[k]], row, col);
    OutcomeSums tile;
    if (raw) {
      char* at = kept ? kept + col * int64_t(sizeof(T)) : nullptr;
      tile = outcomes_of(divergence.kind, z[0], z[1], n, constants, alpha, at);
    } else {
      alignas(64) T a[2][kTile];
      for (int k = 0; k < 2; ++k)
        transform_tile<T, Z>(z[k], Rows<Z>::bias(args.stream[stream[k]], col), head[stream[k]], n,
                             a[k], nullptr);
      tile = outcomes_of<T, T>(divergence.kind, a[0], a[1], n, constants, alpha, nullptr);
    }
    total.add(tile);
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
        return segment_outcomes<Z>(args, head, row, begin, end, nullptr);
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
