// The row passes: statistics of a block of logits, and the gradient with respect to them.
//
// A row is walked in tiles that stay in the first-level cache. Each step over a tile is one plain
// loop that the compiler vectorises; this file is compiled once per instruction set, with PAD_ISA
// naming the copy. It uses no standard library: an inline function shared between copies would let
// the linker pick the wrong one.
#include "row_pass.h"

#include "tile_loops.h"

namespace pad {
namespace PAD_ISA {
namespace {

// ---------------------------------------------------------------- statistics

template <class Z>
struct Rows {
  using T = typename Accumulator<Z>::type;

  static const Z* logits(const StreamArgs& stream, int64_t row, int64_t col) {
    return static_cast<const Z*>(stream.logits) + row * stream.ld + col;
  }
  static const T* bias(const StreamArgs& stream, int64_t col) {
    return stream.bias ? static_cast<const T*>(stream.bias) + col : nullptr;
  }
  // Whether the stored logits can be read as they are.
  static bool raw(const StreamArgs& stream, const Head<T>& head) {
    return head.identity && !stream.bias;
  }
};

template <class T>
void make_heads(const BlockArgs& args, Head<T>* head) {
  for (int j = 0; j < args.streams; ++j) {
    const StreamArgs& stream = args.stream[j];
    head[j] = make_head<T>(stream.scale, stream.softcap, stream.temperature);
  }
}

template <class Z>
void prefetch_streams(const BlockArgs& args, int64_t row, int64_t col, int64_t n) {
  for (int j = 0; j < args.streams; ++j)
    if (args.stream[j].logits) prefetch_tile<false>(Rows<Z>::logits(args.stream[j], row, col), n);
}

// The token ids of one row, consumed from left to right.
struct IdsCursor {
  const int64_t* ids;
  int64_t next, count;

  IdsCursor(const IdsArgs& args, int64_t row, int64_t first)
      : ids(args.ids ? args.ids + row * args.k : nullptr), next(0), count(args.ids ? args.k : 0) {
    int64_t high = count;  // skip the ids below `first`
    while (next < high) {
      const int64_t middle = next + (high - next) / 2;
      if (ids[middle] < first)
        next = middle + 1;
      else
        high = middle;
    }
  }
  bool below(int64_t end) const { return next < count && ids[next] < end; }
};

// What is known of a row, or of part of one.
struct Summary {
  RowState<double> whole = empty_state<double>(), tail = empty_state<double>();
};

// What one call needs of its arguments, in the types of the loops.
template <class Z>
struct StatisticsPlan {
  using T = typename Accumulator<Z>::type;
  const StatisticsArgs& args;
  Head<T> head[kMaxStreams];
  Moment<double> moment[kMaxMoments];

  explicit StatisticsPlan(const StatisticsArgs& arguments) : args(arguments) {
    make_heads(args, head);
    for (int k = 0; k < args.moments; ++k) {
      moment[k].weight = args.moment[k].weight;
      moment[k].over = moment[k].under = -1;
      int others = 0;
      for (int j = 0; j < args.streams; ++j) {
        const double c = args.moment[k].coefficients[j];
        moment[k].coefficients[j] = c;
        if (c == 1) moment[k].over = j;
        if (c == -1) moment[k].under = j;
        if (c != 0 && c != 1 && c != -1) others = 3;
        if (c != 0) ++others;
      }
      if (others != 2 || moment[k].over < 0 || moment[k].under < 0)
        moment[k].over = moment[k].under = -1;
    }
  }

  void merge_into(Summary& into, const Summary& other) const {
    merge(into.whole, other.whole, args.streams, moment, args.moments);
    if (args.tail_sum) merge(into.tail, other.tail, 1, moment, 0);
  }
};

// The argmax of a tile, searched only where the tile can change the row's.
template <class Z, class T>
void tile_argmax(const Z* z, int64_t n, int64_t first, T maximum, bool has_nan,
                 const RowState<double>& so_far, RowState<double>& tile) {
  if (!has_nan && so_far.best_index >= 0 && !(double(maximum) > so_far.best)) return;
  for (int64_t i = 0; i < n; ++i) {
    const T a = load(z[i]);
    if (has_nan ? a != a : a == maximum) {
      tile.best = a;
      tile.best_index = first + i;
      return;
    }
  }
}

// A row of one stream, identity head or not: maximum, exponential sum, at most a second look.
template <class A, class Z>
void one_stream_tile(const StatisticsPlan<Z>& plan, const A* a, int64_t n, int64_t first,
                     const RowState<double>& so_far, RowState<double>& tile) {
  using T = typename Accumulator<Z>::type;
  const StatisticsArgs& args = plan.args;
  const T tile_max = tile_maximum(a, n);
  const T maximum = larger(T(so_far.maximum[0]), tile_max);
  const T shift = shift_of(maximum);
  double sum, moment = 0;
  sum = args.moments ? tile_sum_and_moment(a, n, shift, &moment) : tile_sum(a, n, shift);
  tile.maximum[0] = maximum;
  tile.sum[0] = sum;
  for (int k = 0; k < args.moments; ++k) {
    const double c = plan.moment[k].coefficients[0];
    tile.moment[k] = c == 0 ? 0 : c * moment;
  }
  if (args.total) tile.total = tile_total(a, n);
  if (args.argmax) tile_argmax(a, n, first, tile_max, sum != sum, so_far, tile);
}

// One moment of a tile, from the exponentials and the sums of the streams.
template <class T, int kSize>
double moment_of(const Moment<double>& moment, const T (&a)[kMaxStreams][kSize],
                 const T (&exps)[kMaxStreams][kSize], const T* shift, const double* sum,
                 int streams, int64_t n) {
  const int w = moment.weight;
  if (moment.over < 0) {
    alignas(64) T factors[kSize];
    fill_tile(factors, n, T(0));
    for (int j = 0; j < streams; ++j) {
      const T c = T(moment.coefficients[j]);
      if (c != T(0)) add_shifted(factors, a[j], n, c, shift[j]);
    }
    return tile_weighted_sum(exps[w], factors, n);
  }
  const int over = moment.over, under = moment.under;
  if (over != w) return tile_log_ratio(exps[w], a[over], shift[over], a[under], shift[under], n);
  return tile_own_log_ratio(exps[w], exps[under], a[over], shift[over], a[under], shift[under],
                            sum[w], sum[under] - sum[w], n);
}

// The student's entries outside a few ids: maximum and sum.
template <class T>
void tail_of_tile(T* a, int64_t n, int64_t first, IdsCursor& ids, const RowState<double>& so_far,
                  RowState<double>& tile) {
  for (; ids.below(first + n); ++ids.next) a[ids.ids[ids.next] - first] = -T(INFINITY);
  tile.maximum[0] = larger(T(so_far.maximum[0]), tile_maximum(a, n));
  tile.sum[0] = tile_sum(a, n, shift_of(T(tile.maximum[0])));
}

// Whether a pass is over two streams as they are stored, with the mean of one's log-ratio to the
// other as its only moment.
template <class Z>
bool is_pair(const StatisticsPlan<Z>& plan) {
  const StatisticsArgs& args = plan.args;
  if (args.streams != 2 || args.moments != 1 || args.total || args.argmax || args.tail_sum)
    return false;
  for (int j = 0; j < 2; ++j)
    if (!args.stream[j].logits || !Rows<Z>::raw(args.stream[j], plan.head[j])) return false;
  return plan.moment[0].over >= 0 && plan.moment[0].over == plan.moment[0].weight;
}

template <class Z>
void pair_tile(const StatisticsPlan<Z>& plan, int64_t row, int64_t col, int64_t n,
               const RowState<double>& so_far, RowState<double>& tile) {
  using T = typename Accumulator<Z>::type;
  const StatisticsArgs& args = plan.args;
  const int own = plan.moment[0].over, other = plan.moment[0].under;
  const Z* z[2];
  T shift[2];
  for (int j = 0; j < 2; ++j) {
    z[j] = Rows<Z>::logits(args.stream[j], row, col);
    const T maximum = larger(T(so_far.maximum[j]), tile_maximum(z[j], n));
    tile.maximum[j] = maximum;
    shift[j] = shift_of(maximum);
  }
  const PairSums sums = tile_pair(z[own], z[other], n, shift[own], shift[other]);
  const double gap = sums.over < 0 ? -sums.over : sums.over;
  const bool alike = gap < 0.25 * sums.own;
  tile.sum[own] = sums.own;
  tile.sum[other] = alike ? sums.own + sums.over : sums.other;
  tile.moment[0] = alike ? sums.balanced - sums.over : sums.ratio;
}

template <class Z>
void many_streams_tile(const StatisticsPlan<Z>& plan, int64_t row, int64_t col, int64_t n,
                       IdsCursor& tail, const Summary& so_far, Summary& found) {
  using T = typename Accumulator<Z>::type;
  const StatisticsArgs& args = plan.args;
  alignas(64) T a[kMaxStreams][kTile];
  alignas(64) T exps[kMaxStreams][kTile];
  T shift[kMaxStreams];
  T first_maximum = 0;
  RowState<double>& tile = found.whole;
  for (int j = 0; j < args.streams; ++j) {
    const StreamArgs& stream = args.stream[j];
    if (!stream.logits) continue;
    const Z* z = Rows<Z>::logits(stream, row, col);
    transform_tile<T, Z>(z, Rows<Z>::bias(stream, col), plan.head[j], n, a[j], nullptr);
    const T tile_max = tile_maximum(a[j], n);
    if (j == 0) first_maximum = tile_max;
    const T maximum = larger(T(so_far.whole.maximum[j]), tile_max);
    shift[j] = shift_of(maximum);
    tile.maximum[j] = maximum;
    tile.sum[j] = tile_exponentials(a[j], n, shift[j], exps[j], j ? exps[0] : nullptr, tile.sum[0]);
  }
  for (int k = 0; k < args.moments; ++k)
    tile.moment[k] = moment_of(plan.moment[k], a, exps, shift, tile.sum, args.streams, n);
  if (args.total) tile.total = tile_total(a[0], n);
  const int64_t first = args.vocab_offset + col;
  if (args.argmax) {
    const bool has_nan = tile.sum[0] != tile.sum[0];
    tile_argmax(a[0], n, first, first_maximum, has_nan, so_far.whole, tile);
  }
  if (args.tail_sum) tail_of_tile(a[0], n, first, tail, so_far.tail, found.tail);
}

// The state of columns [begin, end) of one row. Tile sums are float, their sum is double.
template <class Z>
Summary segment_statistics(const StatisticsPlan<Z>& plan, int64_t row, int64_t begin, int64_t end) {
  using T = typename Accumulator<Z>::type;
  const StatisticsArgs& args = plan.args;
  const StreamArgs& stream = args.stream[0];
  const bool many = args.streams > 1 || args.tail_sum;
  const bool raw = !many && Rows<Z>::raw(stream, plan.head[0]);
  const bool pair = is_pair(plan);
  const int64_t step = raw || pair ? kRawTile<Z> : kTile;
  IdsCursor tail(args.tail, row, args.vocab_offset + begin);
  Summary state;
  for (int64_t col = begin; col < end; col += step) {
    const int64_t n = smaller(step, end - col);
    const int64_t first = args.vocab_offset + col;
    Summary tile;
    const Z* z = Rows<Z>::logits(stream, row, col);
    prefetch_streams<Z>(args, row, col + n, smaller(step, end - col - n));
    if (raw) {
      one_stream_tile(plan, z, n, first, state.whole, tile.whole);
    } else if (pair) {
      pair_tile(plan, row, col, n, state.whole, tile.whole);
    } else if (many) {
      many_streams_tile(plan, row, col, n, tail, state, tile);
    } else {
      alignas(64) T a[kTile];
      transform_tile<T, Z>(z, Rows<Z>::bias(stream, col), plan.head[0], n, a, nullptr);
      one_stream_tile(plan, a, n, first, state.whole, tile.whole);
    }
    plan.merge_into(state, tile);
  }
  return state;
}

// Joins a block's state with the running one in the caller's arrays.
template <class Z>
void write_state(const StatisticsPlan<Z>& plan, int64_t row, const Summary& block) {
  const StatisticsArgs& args = plan.args;
  Summary state;
  for (int j = 0; j < args.streams; ++j) {
    if (!args.stream[j].logits) continue;
    state.whole.maximum[j] = args.maximum[j][row];
    state.whole.sum[j] = args.sum[j][row];
  }
  for (int k = 0; k < args.moments; ++k) state.whole.moment[k] = args.moment[k].value[row];
  if (args.total) state.whole.total = args.total[row];
  if (args.argmax) {
    state.whole.best = args.best[row];
    state.whole.best_index = args.argmax[row];
  }
  if (args.tail_sum) {
    state.tail.maximum[0] = args.tail_maximum[row];
    state.tail.sum[0] = args.tail_sum[row];
  }
  plan.merge_into(state, block);
  for (int j = 0; j < args.streams; ++j) {
    if (!args.stream[j].logits) continue;
    args.maximum[j][row] = state.whole.maximum[j];
    args.sum[j][row] = state.whole.sum[j];
  }
  for (int k = 0; k < args.moments; ++k) args.moment[k].value[row] = state.whole.moment[k];
  if (args.total) args.total[row] = state.whole.total;
  if (args.argmax) {
    args.best[row] = state.whole.best;
    args.argmax[row] = state.whole.best_index;
  }
  if (args.tail_sum) {
    args.tail_maximum[row] = state.tail.maximum[0];
    args.tail_sum[row] = state.tail.sum[0];
  }
}

// The segments of every row, shared out to the threads: `segment(row, begin, end)` returns what is
// known of one, `join` adds another, `finish(row, whole)` takes the row's.
template <class Part, class Segment, class Join, class Finish>
void over_rows(const BlockArgs& args, Segment segment, Join join, Finish finish) {
  const int64_t width = segment_width(args.cols);
  const int64_t segments = (args.cols + width - 1) / width;
  // Few rows: the threads share the segments of each.
  const bool share = args.threads > 1 && segments > 1 && args.rows < 8 * args.threads;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1 && !share)
  for (int64_t row = 0; row < args.rows; ++row) {
    Part part[kMaxSegments];
#pragma omp parallel for schedule(static) num_threads(args.threads) if (share)
    for (int64_t s = 0; s < segments; ++s)
      part[s] = segment(row, s * width, smaller(args.cols, (s + 1) * width));
    for (int64_t s = 1; s < segments; ++s) join(part[0], part[s]);
    finish(row, part[0]);
  }
}

template <class Z>
void statistics(const StatisticsArgs& args) {
  const StatisticsPlan<Z> plan(args);
  over_rows<Summary>(
      args,
      [&](int64_t row, int64_t begin, int64_t end) {
        return segment_statistics(plan, row, begin, end);
      },
      [&](Summary& into, const Summary& other) { plan.merge_into(into, other); },
      [&](int64_t row, const Summary& whole) { write_state(plan, row, whole); });
}

// ---------------------------------------------------------------- second sweep

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
};

template <DivergenceKind kKind, class A, class T>
T chunk_outcomes(const A* a_s, const A* a_t, int64_t n, const OutcomeRow<T>& constants, T alpha,
                 T* slope_out) {
  const OutcomeRow<T> row = constants;
  T value = 0, slope = 0;
  PAD_SIMD_SUM(value, slope)
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<T> found = outcome_of<kKind>(load(a_s[i]), load(a_t[i]), row, alpha);
    value += found.value;
    slope += found.slope;
  }
  *slope_out = slope;
  return value;
}
template <DivergenceKind kKind, class A, class T>
OutcomeSums tile_outcomes(const A* a_s, const A* a_t, int64_t n, const OutcomeRow<T>& row,
                          T alpha) {
  OutcomeSums sums;
  sums.value = over_chunks(n, [&](int64_t i, int64_t m) {
    T slope;
    const T value = chunk_outcomes<kKind>(a_s + i, a_t + i, m, row, alpha, &slope);
    sums.slope += slope;
    return value;
  });
  return sums;
}

// d += weight * (slope - s * mean), the gradient of a divergence.
template <DivergenceKind kKind, class T>
void add_divergence(T* d, const T* a_s, const T* a_t, int64_t n, const OutcomeRow<T>& constants,
                    T alpha, T weight, T mean) {
  const OutcomeRow<T> row = constants;
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<T> found = outcome_of<kKind>(a_s[i], a_t[i], row, alpha);
    d[i] += weight * (found.slope - found.s * mean);
  }
}

template <class A, class T>
OutcomeSums outcomes_of(DivergenceKind kind, const A* a_s, const A* a_t, int64_t n,
                        const OutcomeRow<T>& row, T alpha) {
  switch (kind) {
    case DivergenceKind::jsd:
      return tile_outcomes<DivergenceKind::jsd>(a_s, a_t, n, row, alpha);
    case DivergenceKind::skew_forward_kl:
      return tile_outcomes<DivergenceKind::skew_forward_kl>(a_s, a_t, n, row, alpha);
    case DivergenceKind::skew_reverse_kl:
      return tile_outcomes<DivergenceKind::skew_reverse_kl>(a_s, a_t, n, row, alpha);
    case DivergenceKind::tvd:
      return tile_outcomes<DivergenceKind::tvd>(a_s, a_t, n, row, alpha);
  }
  return {};
}

template <class Z>
OutcomeSums segment_outcomes(const OutcomeArgs& args,
                             const Head<typename Accumulator<Z>::type>* head, int64_t row,
                             int64_t begin, int64_t end) {
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
      tile = outcomes_of(divergence.kind, z[0], z[1], n, constants, alpha);
    } else {
      alignas(64) T a[2][kTile];
      for (int k = 0; k < 2; ++k)
        transform_tile<T, Z>(z[k], Rows<Z>::bias(args.stream[stream[k]], col), head[stream[k]], n,
                             a[k], nullptr);
      tile = outcomes_of<T, T>(divergence.kind, a[0], a[1], n, constants, alpha);
    }
    total.value += tile.value;
    total.slope += tile.slope;
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
        return segment_outcomes<Z>(args, head, row, begin, end);
      },
      [](OutcomeSums& into, const OutcomeSums& other) {
        into.value += other.value;
        into.slope += other.slope;
      },
      [&](int64_t row, const OutcomeSums& whole) {
        args.value[row] += whole.value;
        args.slope[row] += whole.slope;
      });
}

// ---------------------------------------------------------------- gradient

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

// d of a tile of several streams: the student's share times a sum over their logits.
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
    T factor = row.c1 + row.q[0] * x + row.q[1] * (load(z[1][i]) - row.shift[1]);
    if (kStreams == 3) factor += row.q[2] * (load(z[2][i]) - row.shift[2]);
    out[i] = store<O>(row.c0 + weighted(exp_of(x) * row.inverse, factor));
  }
}

// d += s * factor, with the share s = exp(a - shift) * inverse
template <class T>
void add_share_times(T* d, const T* a, const T* factors, int64_t n, T shift, T inverse) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) d[i] += weighted(exp_of(a[i] - shift) * inverse, factors[i]);
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
  bool own_share;   // any of c1 and q
  int pair;         // the teacher j of s_0 c1 + s_j p_j with logits as they are stored; 0 for none
  int factors = 0;  // how many of the first streams make c0 + s_0 (c1 + sum q_j x_j), as stored

  explicit GradientPlan(const GradientArgs& arguments) : args(arguments) {
    make_heads(args, head);
    simple = !args.outside_value && args.divergence.teacher == 0;
    own_share = args.c1 || args.p[0];
    for (int j = 0; j < args.streams; ++j) {
      own_share = own_share || args.q[j];
      if (j > 0 && (args.q[j] || args.p[j])) simple = false;
    }
    pair = pair_of();
    factors = factors_of();
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

// The gradient of the divergence, if there is one.
template <class Z, class T>
void add_divergence_of_row(const GradientPlan<Z>& plan, int64_t row, const T* a_s, const T* a_t,
                           int64_t n, T* d) {
  const GradientArgs& args = plan.args;
  const OutcomeRow<T> constants =
      outcome_row<T>(args.maximum, args.sum, args.divergence.teacher, row);
  const T alpha = T(args.divergence.alpha);
  const T weight = plan.at(args.divergence_weight, row), mean = plan.at(args.divergence_slope, row);
  switch (args.divergence.kind) {
    case DivergenceKind::jsd:
      return add_divergence<DivergenceKind::jsd>(d, a_s, a_t, n, constants, alpha, weight, mean);
    case DivergenceKind::skew_forward_kl:
      return add_divergence<DivergenceKind::skew_forward_kl>(d, a_s, a_t, n, constants, alpha,
                                                             weight, mean);
    case DivergenceKind::skew_reverse_kl:
      return add_divergence<DivergenceKind::skew_reverse_kl>(d, a_s, a_t, n, constants, alpha,
                                                             weight, mean);
    case DivergenceKind::tvd:
      return add_divergence<DivergenceKind::tvd>(d, a_s, a_t, n, constants, alpha, weight, mean);
  }
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
  fill_tile(d, n, student.c0);
  if (plan.own_share) {
    fill_tile(factors, n, student.c1);
    for (int j = 0; j < args.streams; ++j) {
      const T q = plan.at(args.q[j], row);
      if (q != T(0)) add_shifted(factors, a[j], n, q, plan.shift(j, row));
    }
    add_share_times(d, a[0], factors, n, student.shift, student.inverse);
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
  if (const int teacher = args.divergence.teacher)
    add_divergence_of_row(plan, row, a[0], a[teacher], n, d);
}

// One tile: the short way where only the student's logits matter and nothing must be added before
// rounding, else through d in accumulator precision.
template <class Z, class T>
void gradient_tile(const GradientPlan<Z>& plan, int64_t row, int64_t col, int64_t n,
                   const RowCoefficients<T>& student, GradientCursors& cursors, Z* out) {
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
  if (const int j = plan.pair) {
    const Z* other = Rows<Z>::logits(args.stream[j], row, col);
    const T own_part = student.inverse * student.c1, shift = plan.shift(j, row);
    const T part = plan.inverse(j, row) * plan.at(args.p[j], row);
    if (!sparse.below(first + n)) {
      pair_gradient(z, other, n, student.shift, own_part, shift, part, out);
      return;
    }
    pair_gradient(z, other, n, student.shift, own_part, shift, part, d);
  } else if (const int factors = plan.factors) {
    FactorRow<T> coefficients = {student.c0, student.c1, student.inverse, {}, {}};
    const Z* streams[3];
    for (int j = 0; j < factors; ++j) {
      streams[j] = Rows<Z>::logits(args.stream[j], row, col);
      coefficients.q[j] = plan.at(args.q[j], row);
      coefficients.shift[j] = plan.shift(j, row);
    }
    const bool last = !sparse.below(first + n);
    if (factors == 3)
      last ? factor_gradient<3>(streams, n, coefficients, out)
           : factor_gradient<3>(streams, n, coefficients, d);
    else
      last ? factor_gradient<2>(streams, n, coefficients, out)
           : factor_gradient<2>(streams, n, coefficients, d);
    if (last) return;
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

template <class Z>
void segment_gradient(const GradientPlan<Z>& plan, int64_t row, int64_t begin, int64_t end) {
  using T = typename Accumulator<Z>::type;
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
    gradient_tile<Z, T>(plan, row, col, n, student, cursors, out + col);
    if (args.tile_absmax)
      raise_to(args.tile_absmax + col / args.tile, tile_magnitude(out + col, n));
    col += n;
  }
}

template <class Z>
void gradient(const GradientArgs& args) {
  const GradientPlan<Z> plan(args);
  if (args.tile_absmax)
    for (int64_t t = 0; t * args.tile < args.cols; ++t) args.tile_absmax[t] = 0;
  const int64_t width = segment_width(args.cols);
  const int64_t segments = (args.cols + width - 1) / width;
  const int64_t items = args.rows * segments;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t begin = item % segments * width;
    segment_gradient(plan, item / segments, begin, smaller(args.cols, begin + width));
  }
}

template <class T>
void transform(const TransformArgs& args) {
  const Head<T> head = make_head<T>(args.scale, args.softcap, args.temperature);
  T* values = static_cast<T*>(args.values);
  for (int64_t i = 0; i < args.count; i += kTile)
    transform_tile<T, T>(values + i, nullptr, head, smaller(kTile, args.count - i), values + i,
                         nullptr);
}

}  // namespace

void head_transform(const TransformArgs& args) {
  args.dtype == DType::float64 ? transform<double>(args) : transform<float>(args);
}

void row_statistics(const StatisticsArgs& args) {
  if (args.rows <= 0 || args.cols <= 0) return;
  switch (args.dtype) {
    case DType::float32:
      return statistics<float>(args);
    case DType::float64:
      return statistics<double>(args);
    case DType::bfloat16:
      return statistics<bfloat16>(args);
    case DType::float16:
      return;  // see Cpu::has
  }
}

void row_outcomes(const OutcomeArgs& args) {
  if (args.rows <= 0 || args.cols <= 0) return;
  switch (args.dtype) {
    case DType::float32:
      return outcomes<float>(args);
    case DType::float64:
      return outcomes<double>(args);
    case DType::bfloat16:
      return outcomes<bfloat16>(args);
    case DType::float16:
      return;
  }
}

void row_gradient(const GradientArgs& args) {
  if (args.cols <= 0) return;
  switch (args.dtype) {
    case DType::float32:
      return gradient<float>(args);
    case DType::float64:
      return gradient<double>(args);
    case DType::bfloat16:
      return gradient<bfloat16>(args);
    case DType::float16:
      return;
  }
}

}  // namespace PAD_ISA
}  // namespace pad
