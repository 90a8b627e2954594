// The first sweep: a block of threads reads a row once and merges what it finds into the row's
// running statistics.
//
// A thread adds in float within a group of columns and in double between them, so that nearly equal
// streams keep the digits that their divergence is made of. Its exponentials are relative to a
// reference that trails the maximum by at most kSlack: it is moved, and the sums with it, only
// where a logit is further above, which after the first few vectors of a row hardly happens.
#pragma once

#include "row_streams.h"

namespace pad {
namespace PAD_ISA {

constexpr float kSlack = 16;               // exp(16) times the columns of a row is a float
constexpr int64_t kListedColumns = 65536;  // of a row at a time, where ids are left out: 8 KiB

struct StatisticsLaunch {
  StatisticsArgs args;
  Heads heads;
  Moment<double> moment[kMaxMoments];
  float coefficient[kMaxMoments][kMaxStreams];
};

inline StatisticsLaunch statistics_launch(const StatisticsArgs& args) {
  StatisticsLaunch in = {args, make_heads(args), {}, {}};
  for (int k = 0; k < args.moments; ++k) {
    in.moment[k].weight = args.moment[k].weight;
    in.moment[k].over = in.moment[k].under = -1;
    for (int j = 0; j < args.streams; ++j)
      in.coefficient[k][j] = float(in.moment[k].coefficients[j] = args.moment[k].coefficients[j]);
  }
  return in;
}

// A warp for every 8 vectors of each thread, at least one and at most a whole block's: a short row
// should not spend its time on joining what many threads found.
inline int row_threads(int64_t columns, int lanes) {
  int threads = kWarp;
  while (threads < kRowThreads && columns > int64_t(threads) * lanes * 8) threads *= 2;
  return threads;
}

inline Launch statistics_grid(const BlockArgs& args, int lanes, bool with_tail) {
  const int64_t columns = args.cols < kListedColumns ? args.cols : kListedColumns;
  const size_t shared = with_tail ? listed_words(columns) * sizeof(uint32_t) : 0;
  return {args.rows, row_threads(args.cols, lanes), shared};
}

struct Best {
  float value;
  int32_t col;  // of the block; -1 for none
};
// The larger one, a NaN above all, the lower index among equals.
struct BetterOf {
  PAD_DEVICE Best operator()(const Best& left, const Best& right) const {
    if (left.col < 0 || right.col < 0) return left.col < 0 ? right : left;
    const bool left_nan = left.value != left.value, right_nan = right.value != right.value;
    const bool level = left.value == right.value || (left_nan && right_nan);
    if (level) return left.col < right.col ? left : right;
    return left_nan || (!right_nan && left.value > right.value) ? left : right;
  }
};

template <int N>
struct Maxima {
  float value[N];
};
template <int N>
struct LargerMaxima {
  PAD_DEVICE Maxima<N> operator()(const Maxima<N>& left, const Maxima<N>& right) const {
    Maxima<N> most;
    PAD_UNROLL
    for (int i = 0; i < N; ++i) most.value[i] = fmaxf(left.value[i], right.value[i]);
    return most;
  }
};

// What one thread knows of its columns. Sums are relative to `reference`.
template <class Z, int S>
struct StatisticsThread {
  static constexpr bool kAhead = S == 1;  // several streams are several loads at a time already
  const StatisticsLaunch& in;
  int64_t row;
  Listed listed;  // the columns that the tail leaves out

  float maximum[S], reference[S];
  double sum[S], moment[kMaxMoments], total = 0;
  float tail_maximum = -INFINITY, tail_reference = -INFINITY;
  double tail_sum = 0;
  Best best = {-INFINITY, -1};

  PAD_DEVICE StatisticsThread(const StatisticsLaunch& launch, int64_t of_row)
      : in(launch), row(of_row), listed{nullptr, 0} {
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      maximum[j] = reference[j] = -INFINITY;
      sum[j] = 0;
    }
    PAD_UNROLL
    for (int k = 0; k < kMaxMoments; ++k) moment[k] = 0;
  }

  // Whether a stream is there. The first always is.
  PAD_DEVICE bool has(int j) const { return j == 0 || in.args.stream[j].logits; }

  // Sums and moments relative to other references.
  PAD_DEVICE void move_to(const float (&target)[S]) {
    RowState<double> side = empty_state<double>();
    double aim[kMaxStreams] = {};
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      side.maximum[j] = reference[j];
      side.sum[j] = sum[j];
      aim[j] = target[j];
    }
    PAD_UNROLL
    for (int k = 0; k < kMaxMoments; ++k)
      if (k < in.args.moments) moment[k] = merged_moment(side, moment[k], aim, in.moment[k], S);
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      if (reference[j] != target[j]) sum[j] *= merge_scale(side.maximum[j], aim[j]);
      reference[j] = target[j];
    }
  }
  PAD_DEVICE void move_tail_to(float target) {
    tail_sum *= merge_scale(double(tail_reference), double(target));
    tail_reference = target;
  }

  template <int kCount>
  PAD_DEVICE Fetched<S> fetch(int64_t col) const {
    Fetched<S> found;
    PAD_UNROLL
    for (int j = 0; j < S; ++j)
      if (has(j))
        found.of[j] = pad::PAD_ISA::fetch<kCount>(logits_at<Z>(in.args.stream[j], row, col));
    return found;
  }

  template <int kCount>
  PAD_DEVICE void use(int64_t col, int group, const Fetched<S>& stored) {
    float a[S][kCount];
    bool above = false;
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      if (!has(j)) continue;
      unpack<Z>(stored.of[j], group, a[j]);
      transform_lanes(in.args.stream[j], in.heads.of[j], col, a[j], nullptr);
      float most = a[j][0];
      PAD_UNROLL
      for (int i = 1; i < kCount; ++i) most = fmaxf(most, a[j][i]);
      maximum[j] = fmaxf(maximum[j], most);
      above = above || maximum[j] > reference[j] + kSlack;
    }
    if (above) move_to(maximum);
    if (in.args.total) {
      float part = 0;
      PAD_UNROLL
      for (int i = 0; i < kCount; ++i) part += a[0][i];
      total += part;
    }
    if (in.args.tail_sum) add_tail(col, a[0]);
    if (in.args.argmax) find_best(col, a[0]);
    add_exponentials(a);
  }

  template <int kCount>
  PAD_DEVICE void finish(int64_t, const Fetched<S>&) {}

  // Exponentials of the logits become sums and moments.
  template <int kCount>
  PAD_DEVICE void add_exponentials(float (&a)[S][kCount]) {
    float exps[S][kCount];
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      if (!has(j)) {
        PAD_UNROLL
        for (int i = 0; i < kCount; ++i) exps[j][i] = a[j][i] = 0;
        continue;
      }
      const float shift = shift_of(reference[j]);
      float part = 0;
      PAD_UNROLL
      for (int i = 0; i < kCount; ++i) {
        a[j][i] -= shift;
        exps[j][i] = exp_of(a[j][i]);
        part += exps[j][i];
      }
      sum[j] += part;
    }
    PAD_UNROLL
    for (int k = 0; k < kMaxMoments; ++k)
      if (k < in.args.moments) moment[k] += moment_part(k, a, exps);
  }

  template <int kCount>
  PAD_DEVICE float moment_part(int k, const float (&x)[S][kCount],
                               const float (&exps)[S][kCount]) const {
    float factor[kCount], weight[kCount];
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      factor[i] = 0;
      weight[i] = exps[0][i];
    }
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      const float c = in.coefficient[k][j];
      if (j > 0 && in.moment[k].weight == j) {
        PAD_UNROLL
        for (int i = 0; i < kCount; ++i) weight[i] = exps[j][i];
      }
      if (c != 0) {
        PAD_UNROLL
        for (int i = 0; i < kCount; ++i) factor[i] += c * x[j][i];
      }
    }
    float part = 0;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) part += weighted(weight[i], factor[i]);
    return part;
  }

  // The largest of the student's logits and its column; rarely more than a comparison.
  template <int kCount>
  PAD_DEVICE void find_best(int64_t col, const float (&a)[kCount]) {
    bool found = best.col < 0 || maximum[0] > best.value;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) found = found || a[i] != a[i];
    if (!found) return;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) best = BetterOf()(best, Best{a[i], int32_t(col) + i});
  }

  // The student's logits that are not listed.
  template <int kCount>
  PAD_DEVICE void add_tail(int64_t col, const float (&a)[kCount]) {
    const uint32_t out = listed.bits(col, kCount);
    float most = -INFINITY;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) most = fmaxf(most, out >> i & 1u ? -INFINITY : a[i]);
    tail_maximum = fmaxf(tail_maximum, most);
    if (tail_maximum > tail_reference + kSlack) move_tail_to(tail_maximum);
    const float shift = shift_of(tail_reference);
    float part = 0;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) part += out >> i & 1u ? 0.0f : exp_of(a[i] - shift);
    tail_sum += part;
  }
};

// Join the block's row with the running one in the caller's arrays; for one thread.
template <class Z, int S>
PAD_DEVICE void write_statistics(const StatisticsThread<Z, S>& found) {
  const StatisticsLaunch& in = found.in;
  const StatisticsArgs& args = in.args;
  const int64_t row = found.row;
  RowState<double> whole = empty_state<double>(), block = empty_state<double>();
  PAD_UNROLL
  for (int j = 0; j < S; ++j) {
    if (!found.has(j)) continue;
    whole.maximum[j] = args.maximum[j][row];
    whole.sum[j] = args.sum[j][row];
    block.maximum[j] = found.sum[j] != found.sum[j] ? found.sum[j] : double(found.maximum[j]);
    block.sum[j] = found.sum[j];
  }
  PAD_UNROLL
  for (int k = 0; k < kMaxMoments; ++k) {
    if (k < args.moments) whole.moment[k] = args.moment[k].value[row];
    block.moment[k] = found.moment[k];
  }
  whole.total = args.total ? args.total[row] : 0.0;
  block.total = found.total;
  if (args.argmax) {
    whole.best = args.best[row];
    whole.best_index = args.argmax[row];
    block.best = found.best.value;
    block.best_index = found.best.col < 0 ? -1 : args.vocab_offset + found.best.col;
  }
  merge(whole, block, S, in.moment, args.moments);
  PAD_UNROLL
  for (int j = 0; j < S; ++j) {
    if (!found.has(j)) continue;
    args.maximum[j][row] = whole.maximum[j];
    args.sum[j][row] = whole.sum[j];
  }
  PAD_UNROLL
  for (int k = 0; k < kMaxMoments; ++k)
    if (k < args.moments) args.moment[k].value[row] = whole.moment[k];
  if (args.total) args.total[row] = whole.total;
  if (args.argmax) {
    args.best[row] = whole.best;
    args.argmax[row] = whole.best_index;
  }
  if (args.tail_sum) {
    RowState<double> tail = empty_state<double>(), more = empty_state<double>();
    tail.maximum[0] = args.tail_maximum[row];
    tail.sum[0] = args.tail_sum[row];
    more.maximum[0] = found.tail_maximum;
    more.sum[0] = found.tail_sum;
    merge(tail, more, 1, in.moment, 0);
    args.tail_maximum[row] = tail.maximum[0];
    args.tail_sum[row] = tail.sum[0];
  }
}

template <class Z, int S>
struct StatisticsKernel {
  using Args = StatisticsLaunch;
  // Blocks on a multiprocessor to have registers for; one more would spill.
  static constexpr int kThreads = kRowThreads, kBlocks = S == 1 ? 3 : 2;

  template <class Team>
  static PAD_DEVICE void run(Team& team, int64_t row, const Args& in) {
    const StatisticsArgs& args = in.args;
    StatisticsThread<Z, S> mine(in, row);
    const bool alike = streams_alike<Z, S>(args, row);
    const bool tail = args.tail_sum != nullptr;
    const int64_t width = tail ? kListedColumns : args.cols;
    for (int64_t begin = 0; begin < args.cols; begin += width) {
      const int64_t end = args.cols - begin < width ? args.cols : begin + width;
      if (tail) {
        team.sync();  // the bits before these have been read
        mine.listed = mark_listed(team, static_cast<uint32_t*>(team.shared()),
                                  args.tail.ids + row * args.tail.k,
                                  args.tail.ids ? args.tail.k : 0, args.vocab_offset, begin, end);
      }
      const Z* first = logits_at<Z>(args.stream[0], row, begin);
      over_columns<Z>(team, make_columns(first, alike, begin, end), mine);
    }
    join(team, mine);
    if (team.rank() == 0) write_statistics(mine);
  }

  // The whole row's numbers, in every thread.
  template <class Team>
  static PAD_DEVICE void join(Team& team, StatisticsThread<Z, S>& mine) {
    Maxima<S + 1> maxima;
    PAD_UNROLL
    for (int j = 0; j < S; ++j) maxima.value[j] = mine.maximum[j];
    maxima.value[S] = mine.tail_maximum;
    maxima = team.reduce(maxima, LargerMaxima<S + 1>());
    PAD_UNROLL
    for (int j = 0; j < S; ++j) mine.maximum[j] = maxima.value[j];
    mine.move_to(mine.maximum);
    mine.tail_maximum = maxima.value[S];
    mine.move_tail_to(mine.tail_maximum);
    Numbers<S + kMaxMoments + 2> sums;
    PAD_UNROLL
    for (int j = 0; j < S; ++j) sums.value[j] = mine.sum[j];
    PAD_UNROLL
    for (int k = 0; k < kMaxMoments; ++k) sums.value[S + k] = mine.moment[k];
    sums.value[S + kMaxMoments] = mine.total;
    sums.value[S + kMaxMoments + 1] = mine.tail_sum;
    sums = team.reduce(sums, AddNumbers<S + kMaxMoments + 2>());
    PAD_UNROLL
    for (int j = 0; j < S; ++j) mine.sum[j] = sums.value[j];
    PAD_UNROLL
    for (int k = 0; k < kMaxMoments; ++k) mine.moment[k] = sums.value[S + k];
    mine.total = sums.value[S + kMaxMoments];
    mine.tail_sum = sums.value[S + kMaxMoments + 1];
    if (mine.in.args.argmax) mine.best = team.reduce(mine.best, BetterOf());
  }
};

}  // namespace PAD_ISA
}  // namespace pad
