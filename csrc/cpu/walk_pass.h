// Statistics, second sweep and gradient in one walk over each row, which stays in the second-level
// cache meanwhile. For row_pass.cpp alone, once per instruction set.
#pragma once

#include "gradient_pass.h"
#include "outcomes_pass.h"
#include "statistics_pass.h"

namespace pad {
namespace PAD_ISA {
namespace {

// What is known of a whole row, segment by segment as over_rows does it.
template <class Part, class Segment, class Join>
Part join_segments(int64_t cols, Segment segment, Join join) {
  const int64_t width = segment_width(cols);
  Part whole = segment(0, smaller(cols, width));
  for (int64_t begin = width; begin < cols; begin += width)
    join(whole, segment(begin, smaller(cols, begin + width)));
  return whole;
}

// Takes the means of centred moments off the gradient's coefficient.
template <class T>
void centre(const WalkArgs& args, int64_t row) {
  for (int k = 0; k < args.first.moments; ++k)
    if (args.centred[k] && !certain<T>(args.first.sum[0][row])) {
      const double mean = args.first.moment[k].value[row] / args.first.sum[0][row];
      args.c1[row] -= args.centred[k][row] * mean;
    }
}

// `kept` has room for the row's exponentials, or is null: then they are computed in every sweep.
template <class Z, class T>
void walk_row(const WalkArgs& args, const StatisticsPlan<Z>& first, const GradientPlan<Z>& last,
              int64_t row, Kept<T>* kept) {
  const OutcomeArgs& second = args.second;
  const Summary whole = join_segments<Summary>(
      second.cols,
      [&](int64_t begin, int64_t end) { return segment_statistics(first, row, begin, end, kept); },
      [&](Summary& into, const Summary& other) { first.merge_into(into, other); });
  write_state(first, row, whole);
  centre<T>(args, row);
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

// Rows that one thread takes together. What it keeps of the later ones lies where the teacher's
// logits of the first ones were, which are done with.
constexpr int64_t kWalkRows = 16;

// Whether each sweep reads two streams in one loop: those keep and take exponentials.
template <class Z>
bool keeps(const StatisticsPlan<Z>& first, const GradientPlan<Z>& last) {
  return streams_of_one_loop(first) == 2 && (last.pair || last.diverges) && !last.args.tile_absmax;
}

// Memory for what is kept of a row, in the place of a stream's logits of rows before `end`.
struct Room {
  void* memory;
  int64_t end;
};
template <class Z>
Room room_from(const StreamArgs& stream, int64_t row, int64_t cols) {
  using T = typename Accumulator<Z>::type;
  const uintptr_t start = reinterpret_cast<uintptr_t>(Rows<Z>::logits(stream, row, 0));
  const uintptr_t aligned = (start + sizeof(T) - 1) / sizeof(T) * sizeof(T);
  const int64_t bytes = int64_t(aligned - start) + Kept<T>::bytes(cols);
  const int64_t stride = stream.ld * int64_t(sizeof(Z));
  return {reinterpret_cast<void*>(aligned), row + (bytes + stride - 1) / stride};
}

template <class Z>
void walk(const WalkArgs& args) {
  using T = typename Accumulator<Z>::type;
  const OutcomeArgs& second = args.second;
  const int64_t rows = args.gradient.rows, cols = args.gradient.cols;
  const int threads = args.gradient.threads;
  if (rows < 2 * kWalkRows * threads) {  // each pass shares out a row's columns, too
    statistics<Z>(args.first);
    for (int64_t row = 0; row < rows; ++row) centre<T>(args, row);
    if (second.value) outcomes<Z>(second);
    return gradient<Z>(args.gradient);
  }
  const StatisticsPlan<Z> first(args.first);
  const GradientPlan<Z> last(args.gradient);
  forget_magnitudes(args.gradient);
  const bool wanted = keeps(first, last);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t begin = 0; begin < rows; begin += kWalkRows) {
    const int64_t end = smaller(rows, begin + kWalkRows);
    const Room room = wanted ? room_from<Z>(args.first.stream[1], begin, cols) : Room{nullptr, end};
    int64_t row = begin;
    for (; row < smaller(end, room.end); ++row) walk_row<Z, T>(args, first, last, row, nullptr);
    if (row == end) continue;
    Kept<T> kept(room.memory, cols);
    for (; row < end; ++row) walk_row(args, first, last, row, &kept);
  }
}

}  // namespace
}  // namespace PAD_ISA
}  // namespace pad
