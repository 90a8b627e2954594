// The first sweep: statistics of a block of logits. For row_pass.cpp alone, once per
// instruction set.
#pragma once

#include "kept.h"
#include "row_pass.h"
#include "tile_loops.h"

namespace pad {
namespace PAD_ISA {
namespace {

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

// How many streams one loop over logits as they are stored takes: two with at most the mean of
// one's log-ratio to the other, or three with the mean of two's log-ratio under the first. 0 for
// neither.
template <class Z>
int streams_of_one_loop(const StatisticsPlan<Z>& plan) {
  const StatisticsArgs& args = plan.args;
  const Moment<double>& moment = plan.moment[0];
  if (args.total || args.argmax || args.tail_sum || args.moments > 1) return 0;
  for (int j = 0; j < args.streams; ++j)
    if (!args.stream[j].logits || !Rows<Z>::raw(args.stream[j], plan.head[j])) return 0;
  if (args.streams == 2)
    return !args.moments || (moment.over >= 0 && moment.over == moment.weight) ? 2 : 0;
  const bool under_first =
      args.moments && moment.weight == 0 && moment.over > 0 && moment.under > 0;
  return args.streams == 3 && under_first ? 3 : 0;
}

template <bool kKeep, class Z, class T>
void pair_tile(const StatisticsPlan<Z>& plan, const Z* const* z, const T* shift, int64_t n,
               T* const* exps, RowState<double>& tile) {
  if (!plan.args.moments) {
    const PairSums sums =
        tile_pair<false, kKeep>(z[0], z[1], n, shift[0], shift[1], exps[0], exps[1]);
    tile.sum[0] = sums.own;
    tile.sum[1] = refined_sum(sums.other, sums.own, sums.over);
    return;
  }
  const int own = plan.moment[0].over, other = plan.moment[0].under;
  const PairSums sums =
      tile_pair<true, kKeep>(z[own], z[other], n, shift[own], shift[other], exps[own], exps[other]);
  const double gap = sums.over < 0 ? -sums.over : sums.over;
  const bool alike = gap < 0.25 * sums.own;
  tile.sum[own] = sums.own;
  tile.sum[other] = alike ? sums.own + sums.over : sums.other;
  tile.moment[0] = alike ? sums.balanced - sums.over : sums.ratio;
}

// A tile of all streams in one loop over logits as they are stored.
template <class Z, class T>
void one_loop_tile(const StatisticsPlan<Z>& plan, int64_t row, int64_t col, int64_t n,
                   const RowState<double>& so_far, Kept<T>* kept, RowState<double>& tile) {
  const StatisticsArgs& args = plan.args;
  const Z* z[3];
  T shift[3];
  T* exps[2] = {};
  for (int j = 0; j < args.streams; ++j) {
    z[j] = Rows<Z>::logits(args.stream[j], row, col);
    const T maximum = larger(T(so_far.maximum[j]), tile_maximum(z[j], n));
    tile.maximum[j] = maximum;
    shift[j] = shift_of(maximum);
    if (kept) exps[j] = kept->start(j, col, n, maximum);
  }
  if (args.streams == 2)
    return kept ? pair_tile<true>(plan, z, shift, n, exps, tile)
                : pair_tile<false>(plan, z, shift, n, exps, tile);
  const int over = plan.moment[0].over, under = plan.moment[0].under;
  const Z* ordered_z[3] = {z[0], z[over], z[under]};
  const T ordered_shift[3] = {shift[0], shift[over], shift[under]};
  const TripleSums sums = tile_triple(ordered_z, n, ordered_shift);
  tile.sum[0] = sums.own;
  tile.sum[over] = sums.over;
  tile.sum[under] = refined_sum(sums.under, sums.over, -sums.gap);
  tile.moment[0] = sums.ratio;
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

// The state of columns [begin, end) of one row. Tile sums are float, their sum is double. `kept`
// takes the exponentials of two streams that one loop reads, or is null.
template <class Z, class T>
Summary segment_statistics(const StatisticsPlan<Z>& plan, int64_t row, int64_t begin, int64_t end,
                           Kept<T>* kept) {
  const StatisticsArgs& args = plan.args;
  const StreamArgs& stream = args.stream[0];
  const bool many = args.streams > 1 || args.tail_sum;
  const bool raw = !many && Rows<Z>::raw(stream, plan.head[0]);
  const bool one_loop = many && streams_of_one_loop(plan);
  const int64_t step = raw || one_loop ? kRawTile<Z> : kTile;
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
    } else if (one_loop) {
      one_loop_tile(plan, row, col, n, state.whole, kept, tile.whole);
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

// What is known of a row, from its segments; `share`: the threads share them.
template <class Part, class Segment, class Join>
Part over_segments(const BlockArgs& args, int64_t row, bool share, Segment segment, Join join) {
  const int64_t width = segment_width(args.cols);
  const int64_t segments = (args.cols + width - 1) / width;
  Part part[kMaxSegments];
#pragma omp parallel for schedule(static) num_threads(args.threads) if (share)
  for (int64_t s = 0; s < segments; ++s)
    part[s] = segment(row, s * width, smaller(args.cols, (s + 1) * width));
  for (int64_t s = 1; s < segments; ++s) join(part[0], part[s]);
  return part[0];
}

// The segments of every row, shared out to the threads: `segment(row, begin, end)` returns what is
// known of one, `join` adds another, `finish(row, whole)` takes the row's. The inner loop is in a
// function of its own: behind a nested one GCC writes variables back that other threads read.
template <class Part, class Segment, class Join, class Finish>
void over_rows(const BlockArgs& args, Segment segment, Join join, Finish finish) {
  // Few rows: the threads share the segments of each.
  const bool several = args.threads > 1, short_rows = args.cols <= segment_width(args.cols);
  const bool share = several && !short_rows && args.rows < 8 * args.threads;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (several && !share)
  for (int64_t row = 0; row < args.rows; ++row)
    finish(row, over_segments<Part>(args, row, share, segment, join));
}

template <class Z>
void statistics(const StatisticsArgs& args) {
  const StatisticsPlan<Z> plan(args);
  over_rows<Summary>(
      args,
      [&](int64_t row, int64_t begin, int64_t end) {
        return segment_statistics<Z, typename Accumulator<Z>::type>(plan, row, begin, end, nullptr);
      },
      [&](Summary& into, const Summary& other) { plan.merge_into(into, other); },
      [&](int64_t row, const Summary& whole) { write_state(plan, row, whole); });
}

}  // namespace
}  // namespace PAD_ISA
}  // namespace pad
