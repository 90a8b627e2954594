// The gradient with respect to a block of logits. For row_pass.cpp alone, once per
// instruction set.
#pragma once

#include "outcomes_pass.h"

namespace pad {
namespace PAD_ISA {
namespace {

// Whether the largest of a row's logits has all the probability, to the last digit. What is less
// its mean over such a row is 0, and rounding would be all that is left of it.
template <class T>
bool certain(double sum) {
  return T(sum) == T(1);
}

// The coefficients of one row: d = c0 + s_0 (c1 + q0 x_0), x = a - max, s = exp(x) * inverse.
template <class T>
struct RowCoefficients {
  T shift, inverse, c0, c1, q0;
};

template <class T>
PAD_HD T gradient_entry(T a, const RowCoefficients<T>& row) {
  const T x = a - row.shift;
  return row.c0 + weighted(exp_of(x) * row.inverse, row.c1 + row.q0 * x);
}

// d of a tile times a constant, for the student stream alone. `out` may be `a`.
template <class O, class A, class T>
void one_stream_gradient(const A* a, int64_t n, const RowCoefficients<T>& coefficients, T slope,
                         bool with_q, O* out) {
  const RowCoefficients<T> row = coefficients;
  const T c0 = row.c0, shift = row.shift, constant = row.inverse * row.c1;
  if (with_q) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) out[i] = store<O>(gradient_entry(load(a[i]), row) * slope);
  } else if (slope != T(1)) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i)
      out[i] = store<O>((c0 + exp_of(load(a[i]) - shift) * constant) * slope);
  } else {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) out[i] = store<O>(c0 + exp_of(load(a[i]) - shift) * constant);
  }
}

// d of a tile of two streams: a multiple of each one's exponentials. `out` may be `z`.
template <class O, class Z, class T>
void pair_gradient(const Z* z, const Z* other, int64_t n, T shift, T constant, T other_shift,
                   T other_constant, O* out) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i)
    out[i] = store<O>(exp_of(load(z[i]) - shift) * constant +
                      exp_of(load(other[i]) - other_shift) * other_constant);
}

// The same of the exponentials that a walk kept.
template <class O, class T>
void kept_pair_gradient(const T* exps, const T* other, int64_t n, T constant, T other_constant,
                        O* out) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = store<O>(exps[i] * constant + other[i] * other_constant);
}

// d of a tile of several streams: the student's share times a sum over their logits. The constant
// comes last: it may be the mean of the rest, and cancel it.
template <class T>
struct FactorRow {
  T c0, c1, inverse;
  T q[3], shift[3];
};
template <int kStreams, class O, class Z, class T>
void factor_gradient(const Z* const* streams, int64_t n, const FactorRow<T>& coefficients, O* out) {
  const FactorRow<T> row = coefficients;
  const Z* z[3] = {streams[0], streams[1], streams[kStreams - 1]};
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const T x = load(z[0][i]) - row.shift[0];
    T factor = row.q[0] * x + row.q[1] * (load(z[1][i]) - row.shift[1]);
    if (kStreams == 3) factor += row.q[2] * (load(z[2][i]) - row.shift[2]);
    out[i] = store<O>(row.c0 + weighted(exp_of(x) * row.inverse, factor + row.c1));
  }
}

// d += s * (factor + constant), with the share s = exp(a - shift) * inverse
template <class T>
void add_share_times(T* d, const T* a, const T* factors, int64_t n, T shift, T inverse,
                     T constant) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i)
    d[i] += weighted(exp_of(a[i] - shift) * inverse, factors[i] + constant);
}

// d += s * constant
template <class T>
void add_share(T* d, const T* a, int64_t n, T shift, T constant) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) d[i] += exp_of(a[i] - shift) * constant;
}

template <class T>
void add_tile(T* to, const T* from, int64_t n) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template <class Z, class T>
void store_tile(const T* d, const T* chain, T slope, int64_t n, Z* out) {
  if (chain) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) out[i] = store<Z>(d[i] * chain[i]);
  } else {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) out[i] = store<Z>(d[i] * slope);
  }
}

// The largest |out| of a tile as float bits, which for numbers without a sign are in order, NaN
// last.
PAD_HD uint32_t magnitude_bits(float z) { return bits_as<uint32_t>(z) & 0x7fffffffu; }
PAD_HD uint32_t magnitude_bits(double z) { return magnitude_bits(float(z)); }
PAD_HD uint32_t magnitude_bits(bfloat16 z) { return magnitude_bits(load(z)); }
template <class Z>
uint32_t tile_magnitude(const Z* out, int64_t n) {
  uint32_t most = 0;
  PAD_SIMD_MAX(most)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = magnitude_bits(out[i]);
    most = bits > most ? bits : most;
  }
  return most;
}

// Rows of several threads meet in one tile. A maximum is the same in any order, so this is exact.
void raise_to(float* shared, uint32_t bits) {
  uint32_t* target = reinterpret_cast<uint32_t*>(shared);
#if defined(__GNUC__)
  uint32_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (bits > seen && !__atomic_compare_exchange_n(target, &seen, bits, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
#else
#pragma omp critical(pad_raise_to)
  *target = bits > *target ? bits : *target;
#endif
}

template <class Z>
struct GradientPlan {
  using T = typename Accumulator<Z>::type;
  const GradientArgs& args;
  Head<T> head[kMaxStreams];
  bool simple;      // c0 + s_0 (c1 + q_0 x_0), of the student alone
  bool own_share;   // any of c1 and q, but for what a divergence's loop adds
  int pair;         // the teacher j of s_0 c1 + s_j p_j with logits as they are stored; 0 for none
  int factors = 0;  // how many of the first streams make c0 + s_0 (c1 + sum q_j x_j), as stored
  bool diverges;    // nothing but a divergence of logits as they are stored, c0 and s_0 c1

  explicit GradientPlan(const GradientArgs& arguments) : args(arguments) {
    make_heads(args, head);
    simple = !args.outside_value && args.divergence.teacher == 0;
    own_share = !args.divergence.teacher && (args.c1 || args.p[0]);
    for (int j = 0; j < args.streams; ++j) {
      own_share = own_share || args.q[j];
      if (j > 0 && (args.q[j] || args.p[j])) simple = false;
    }
    pair = pair_of();
    factors = factors_of();
    diverges = diverges_alone();
  }

  // Whether one loop makes the gradient of several streams.
  bool several() const { return pair || factors || diverges; }

  bool diverges_alone() const {
    const int teacher = args.divergence.teacher;
    if (!teacher || args.outside_value || own_share) return false;
    for (int j = 1; j < args.streams; ++j)
      if (args.p[j]) return false;
    return Rows<Z>::raw(args.stream[0], head[0]) &&
           Rows<Z>::raw(args.stream[teacher], head[teacher]);
  }

  int pair_of() const {
    if (args.c0 || args.outside_value || args.divergence.teacher) return 0;
    int found = 0;
    for (int j = 0; j < args.streams; ++j) {
      if (args.q[j] || (j > 0 && args.p[j] && found)) return 0;
      if (j > 0 && args.p[j]) found = j;
    }
    const bool raw = Rows<Z>::raw(args.stream[0], head[0]) &&
                     (!found || Rows<Z>::raw(args.stream[found], head[found]));
    return raw ? found : 0;
  }

  int factors_of() const {
    if (simple || args.outside_value || args.divergence.teacher) return 0;
    int found = 0;
    for (int j = 0; j < args.streams; ++j) {
      if (j > 0 && args.p[j]) return 0;
      if (!reads(j)) continue;
      if (j > found || !Rows<Z>::raw(args.stream[j], head[j])) return 0;
      found = j + 1;
    }
    return found == 2 || found == 3 ? found : 0;
  }
  static T at(const double* column, int64_t row) { return column ? T(column[row]) : T(0); }
  // The same of what is multiplied by something less its mean over the student's distribution.
  T weight(const double* column, int64_t row) const {
    return certain<T>(args.sum[0][row]) ? T(0) : at(column, row);
  }
  T shift(int j, int64_t row) const { return shift_of(at(args.maximum[j], row)); }
  T inverse(int j, int64_t row) const { return T(inverse_of(args.sum[j][row])); }
  // Whether the gradient reads a stream.
  bool reads(int j) const {
    return j == 0 || args.q[j] || args.p[j] || j == args.divergence.teacher;
  }
};

// The lists of one row.
struct GradientCursors {
  IdsCursor sparse, outside;
};

// d of a tile from the slopes and the student's exponentials that a walk kept.
template <class O, class T>
void kept_divergence_gradient(const T* exps, const T* slopes, int64_t n, T c0, T weight, T own,
                              O* out) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = store<O>(c0 + weight * slopes[i] + exps[i] * own);
}

// What the loops over a divergence's gradient need of one row.
template <class Z, class T>
DivergenceRow<T> divergence_row(const GradientPlan<Z>& plan, int64_t row,
                                const RowCoefficients<T>& student) {
  const GradientArgs& args = plan.args;
  const T weight = plan.weight(args.divergence_weight, row);
  const T mean = plan.at(args.divergence_slope, row);
  return {outcome_row<T>(args.maximum, args.sum, args.divergence.teacher, row),
          Mixing<T>(args.divergence.alpha), student.c0, weight, student.c1 - weight * mean};
}

// d of one tile in full generality: every stream, every coefficient, one loop for each term.
template <class Z, class T>
void many_streams_gradient(const GradientPlan<Z>& plan, int64_t row, int64_t col, int64_t n,
                           const RowCoefficients<T>& student, IdsCursor& outside, T* d, T* chain) {
  if (n <= 0) return;  // so that a compiler sees every buffer written
  const GradientArgs& args = plan.args;
  alignas(64) T a[kMaxStreams][kTile];
  alignas(64) T factors[kTile];
  for (int j = 0; j < args.streams; ++j) {
    if (!plan.reads(j)) continue;
    const StreamArgs& stream = args.stream[j];
    transform_tile<T, Z>(Rows<Z>::logits(stream, row, col), Rows<Z>::bias(stream, col),
                         plan.head[j], n, a[j], j == 0 ? chain : nullptr);
  }
  if (const int teacher = args.divergence.teacher)
    divergence_gradient(args.divergence.kind, a[0], a[teacher], n,
                        divergence_row(plan, row, student), d);
  else
    fill_tile(d, n, student.c0);
  if (plan.own_share) {
    fill_tile(factors, n, T(0));
    for (int j = 0; j < args.streams; ++j) {
      const T q = plan.weight(args.q[j], row);
      if (q != T(0)) add_shifted(factors, a[j], n, q, plan.shift(j, row));
    }
    // A divergence's loop has added c1 already.
    add_share_times(d, a[0], factors, n, student.shift, student.inverse,
                    args.divergence.teacher ? T(0) : student.c1);
  }
  for (int j = 1; j < args.streams; ++j)
    if (args.p[j])
      add_share(d, a[j], n, plan.shift(j, row), plan.at(args.p[j], row) * plan.inverse(j, row));
  if (args.outside_value) {
    fill_tile(factors, n, T(0));
    add_share(factors, a[0], n, shift_of(plan.at(args.outside_maximum, row)),
              plan.at(args.outside_value, row));
    const int64_t first = args.vocab_offset + col;
    for (; outside.below(first + n); ++outside.next)
      factors[outside.ids[outside.next] - first] = T(0);
    add_tile(d, factors, n);
  }
}

// d of a tile of several streams as they are stored, and of what a walk kept of them, if it did.
template <class O, class Z, class T>
void several_gradient(const GradientPlan<Z>& plan, int64_t row, int64_t col, int64_t n,
                      const RowCoefficients<T>& student, const Kept<T>* kept, O* out) {
  const GradientArgs& args = plan.args;
  const auto logits = [&](int j) { return Rows<Z>::logits(args.stream[j], row, col); };
  const auto scale = [&](int j) { return kept->scale(j, col, plan.at(args.maximum[j], row)); };
  if (const int j = plan.pair) {
    const T own = student.inverse * student.c1;
    const T other = plan.inverse(j, row) * plan.at(args.p[j], row);
    if (!kept)
      return pair_gradient(logits(0), logits(j), n, student.shift, own, plan.shift(j, row), other,
                           out);
    return kept_pair_gradient(kept->exps(0, col), kept->exps(1, col), n, own * scale(0),
                              other * scale(1), out);
  }
  if (plan.diverges) {
    const int j = args.divergence.teacher;
    const DivergenceRow<T> divergence = divergence_row(plan, row, student);
    if (!kept)
      return divergence_gradient(args.divergence.kind, logits(0), logits(j), n, divergence, out);
    const T own = divergence.own * divergence.outcome.inverse_s * scale(0);
    return kept_divergence_gradient(kept->exps(0, col), kept->exps(1, col), n, divergence.c0,
                                    divergence.weight, own, out);
  }
  FactorRow<T> factors = {student.c0, student.c1, student.inverse, {}, {}};
  const Z* streams[3];
  for (int j = 0; j < plan.factors; ++j) {
    streams[j] = logits(j);
    factors.q[j] = plan.weight(args.q[j], row);
    factors.shift[j] = plan.shift(j, row);
  }
  plan.factors == 3 ? factor_gradient<3>(streams, n, factors, out)
                    : factor_gradient<2>(streams, n, factors, out);
}

// One tile: the short way where only the student's logits matter and nothing must be added before
// rounding, else through d in accumulator precision.
template <class Z, class T>
void gradient_tile(const GradientPlan<Z>& plan, int64_t row, int64_t col, int64_t n,
                   const RowCoefficients<T>& student, GradientCursors& cursors, const Kept<T>* kept,
                   Z* out) {
  const GradientArgs& args = plan.args;
  const StreamArgs& stream = args.stream[0];
  const Head<T>& head = plan.head[0];
  const int64_t first = args.vocab_offset + col;
  const bool with_q = args.q[0] != nullptr;
  const Z* z = Rows<Z>::logits(stream, row, col);
  alignas(64) T a[kTile];
  alignas(64) T d[kTile];
  alignas(64) T chain_tile[kTile];
  T* chain = head.capped ? chain_tile : nullptr;
  IdsCursor& sparse = cursors.sparse;
  if (plan.several()) {
    if (!sparse.below(first + n)) return several_gradient(plan, row, col, n, student, kept, out);
    several_gradient(plan, row, col, n, student, kept, d);
  } else if (!plan.simple) {
    many_streams_gradient<Z, T>(plan, row, col, n, student, cursors.outside, d, chain);
  } else if (Rows<Z>::raw(stream, head)) {
    if (!sparse.below(first + n)) {
      one_stream_gradient<Z>(z, n, student, T(1), with_q, out);
      return;
    }
    one_stream_gradient<T>(z, n, student, T(1), with_q, d);
  } else {
    transform_tile<T, Z>(z, Rows<Z>::bias(stream, col), head, n, a, chain);
    if (!chain && !sparse.below(first + n)) {
      one_stream_gradient<Z>(a, n, student, head.slope, with_q, out);
      return;
    }
    one_stream_gradient<T>(a, n, student, T(1), with_q, d);
  }
  const double* values = args.sparse_values + row * args.sparse.k;
  for (; sparse.below(first + n); ++sparse.next)
    d[sparse.ids[sparse.next] - first] += T(values[sparse.next]);
  store_tile(d, chain, head.slope, n, out);
}

// `kept`: what a walk kept of the row, or null.
template <class Z, class T>
void segment_gradient(const GradientPlan<Z>& plan, int64_t row, int64_t begin, int64_t end,
                      const Kept<T>* kept) {
  const GradientArgs& args = plan.args;
  RowCoefficients<T> student;
  student.shift = plan.shift(0, row);
  student.inverse = plan.inverse(0, row);
  student.c0 = plan.at(args.c0, row);
  student.c1 = plan.at(args.c1, row) + plan.at(args.p[0], row);
  student.q0 = plan.at(args.q[0], row);
  const int64_t from = args.vocab_offset + begin;
  GradientCursors cursors{IdsCursor(args.sparse, row, from), IdsCursor(args.outside, row, from)};
  Z* out = static_cast<Z*>(args.out) + row * args.out_ld;
  for (int64_t col = begin; col < end;) {
    int64_t n = smaller(kTile, end - col);
    if (args.tile_absmax) n = smaller(n, args.tile - col % args.tile);
    const int64_t next = col + n, ahead = smaller(n, end - next);
    for (int j = 0; j < args.streams; ++j)
      if (plan.reads(j)) prefetch_tile<false>(Rows<Z>::logits(args.stream[j], row, next), ahead);
    prefetch_tile<true>(out + next, ahead);
    gradient_tile<Z, T>(plan, row, col, n, student, cursors, kept, out + col);
    if (args.tile_absmax)
      raise_to(args.tile_absmax + col / args.tile, tile_magnitude(out + col, n));
    col += n;
  }
}

inline void forget_magnitudes(const GradientArgs& args) {
  if (args.tile_absmax)
    for (int64_t t = 0; t * args.tile < args.cols; ++t) args.tile_absmax[t] = 0;
}

template <class Z>
void gradient(const GradientArgs& args) {
  using T = typename Accumulator<Z>::type;
  const GradientPlan<Z> plan(args);
  forget_magnitudes(args);
  const int64_t width = segment_width(args.cols);
  const int64_t segments = (args.cols + width - 1) / width;
  const int64_t items = args.rows * segments;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t begin = item % segments * width;
    segment_gradient<Z, T>(plan, item / segments, begin, smaller(args.cols, begin + width),
                           nullptr);
  }
}

}  // namespace
}  // namespace PAD_ISA
}  // namespace pad
