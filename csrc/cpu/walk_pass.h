// Statistics, second sweep and gradient in one walk over each row, which stays in the second-level
// cache meanwhile. For row_pass.cpp alone, once per instruction set.
#pragma once

#include "gradient_pass.h"
#include "outcomes_pass.h"
#include "statistics_pass.h"

namespace pad {
namespace PAD_ISA {
namespace {

// What is known of a whole row, segment by segment as over_rows does it: the same bits.
template <class Part, class Segment, class Join>
Part join_segments(int64_t cols, Segment segment, Join join) {
  const int64_t width = segment_width(cols);
  Part whole = segment(0, smaller(cols, width));
  for (int64_t begin = width; begin < cols; begin += width)
    join(whole, segment(begin, smaller(cols, begin + width)));
  return whole;
}

// Takes the means of centred moments off the gradient's coefficient.
inline void centre(const WalkArgs& args, int64_t row) {
  for (int k = 0; k < args.first.moments; ++k)
    if (args.centred[k]) {
      const double mean = args.first.moment[k].value[row] / args.first.sum[0][row];
      args.c1[row] -= args.centred[k][row] * mean;
    }
}

// `kept` has room for the slopes of the second sweep, or is null: then they are computed twice.
template <class Z>
void walk_row(const WalkArgs& args, const StatisticsPlan<Z>& first, const GradientPlan<Z>& last,
              int64_t row, char* kept) {
  const OutcomeArgs& second = args.second;
  const Summary whole = join_segments<Summary>(
      second.cols,
      [&](int64_t begin, int64_t end) { return segment_statistics(first, row, begin, end); },
      [&](Summary& into, const Summary& other) { first.merge_into(into, other); });
  write_state(first, row, whole);
  centre(args, row);
  if (second.value) {
    const OutcomeSums sums = join_segments<OutcomeSums>(
        second.cols,
        [&](int64_t begin, int64_t end) {
          return segment_outcomes<Z>(second, last.head, row, begin, end, kept);
        },
        [](OutcomeSums& into, const OutcomeSums& other) { into.add(other); });
    second.value[row] += sums.value;
    second.slope[row] += sums.slope;
  }
  segment_gradient(last, row, 0, second.cols, kept);
}

// Slopes are kept where the teacher's logits were, in the precision of sums: for half precision
// they take the row before, too, which is done with, but for the first of every few rows.
constexpr int64_t kWalkRows = 16;

template <class Z>
void walk(const WalkArgs& args) {
  using T = typename Accumulator<Z>::type;
  const OutcomeArgs& second = args.second;
  const int64_t rows = args.gradient.rows;
  const int threads = args.gradient.threads;
  if (rows < 2 * kWalkRows * threads) {  // each pass shares out a row's columns, too
    statistics<Z>(args.first);
    for (int64_t row = 0; row < rows; ++row) centre(args, row);
    if (second.value) outcomes<Z>(second);
    return gradient<Z>(args.gradient);
  }
  const StatisticsPlan<Z> first(args.first);
  const GradientPlan<Z> last(args.gradient);
  forget_magnitudes(args.gradient);
  const StreamArgs& teacher = second.stream[second.divergence.teacher];
  char* room = last.diverges ? static_cast<char*>(const_cast<void*>(teacher.logits)) : nullptr;
  const int64_t stride = teacher.ld * int64_t(sizeof(Z));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t begin = 0; begin < rows; begin += kWalkRows)
    for (int64_t row = begin; row < smaller(rows, begin + kWalkRows); ++row) {
      const int64_t from = sizeof(T) == sizeof(Z) ? row : row - 1;
      char* kept = room && from >= begin ? room + from * stride : nullptr;
      walk_row(args, first, last, row, kept);
    }
}

}  // namespace
}  // namespace PAD_ISA
}  // namespace pad
