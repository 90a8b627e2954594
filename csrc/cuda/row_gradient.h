// The second sweep of a divergence, and the gradient with respect to the student's logits.
#pragma once

#include <utility>

#include "row_streams.h"

namespace pad {
namespace PAD_ISA {

// ---------------------------------------------------------------- divergences of two sweeps

struct OutcomeLaunch {
  OutcomeArgs args;
  Heads heads;
};

// One row's constants. The logarithm is taken in double: equal models have to come out equal.
PAD_DEVICE OutcomeRow<float> outcome_row(const double* const* maximum, const double* const* sum,
                                         int teacher, int64_t row) {
  const double sum_s = sum[0][row], sum_t = sum[teacher][row];
  return {shift_of(float(maximum[0][row])), shift_of(float(maximum[teacher][row])),
          float(inverse_of(sum_s)), float(inverse_of(sum_t)), float(log(sum_t / sum_s))};
}

// The kind asked for inside the loop over columns: around it, their arrays would be in memory.
PAD_DEVICE Outcome<float> outcome_by_kind(DivergenceKind kind, float a_s, float a_t,
                                          const OutcomeRow<float>& row, const Mixing<float>& mix) {
  if (kind == DivergenceKind::jsd) return outcome_of<DivergenceKind::jsd>(a_s, a_t, row, mix);
  if (kind == DivergenceKind::skew_forward_kl)
    return outcome_of<DivergenceKind::skew_forward_kl>(a_s, a_t, row, mix);
  if (kind == DivergenceKind::skew_reverse_kl)
    return outcome_of<DivergenceKind::skew_reverse_kl>(a_s, a_t, row, mix);
  return outcome_of<DivergenceKind::tvd>(a_s, a_t, row, mix);
}

template <DivergenceKind kKind, class Z>
struct OutcomeThread {
  static constexpr bool kAhead = false;
  const OutcomeLaunch& in;
  int64_t row;
  OutcomeRow<float> constants;
  double value = 0, slope = 0;

  PAD_DEVICE const StreamArgs& stream(int j) const {
    return in.args.stream[j ? in.args.divergence.teacher : 0];
  }

  template <int kCount>
  PAD_DEVICE Fetched<2> fetch(int64_t col) const {
    Fetched<2> found;
    PAD_UNROLL
    for (int j = 0; j < 2; ++j)
      found.of[j] = pad::PAD_ISA::fetch<kCount>(logits_at<Z>(stream(j), row, col));
    return found;
  }
  template <int kCount>
  PAD_DEVICE void use(int64_t col, int group, const Fetched<2>& stored) {
    float a[2][kCount];
    PAD_UNROLL
    for (int j = 0; j < 2; ++j) {
      unpack<Z>(stored.of[j], group, a[j]);
      const Head<float>& head = in.heads.of[j ? in.args.divergence.teacher : 0];
      transform_lanes(stream(j), head, col, a[j], nullptr);
    }
    float values = 0, slopes = 0;
    const Mixing<float> mix(in.args.divergence.alpha);
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const Outcome<float> found = outcome_of<kKind>(a[0][i], a[1][i], constants, mix);
      values += found.value;
      slopes += found.slope;
    }
    value += values;
    slope += slopes;
  }
  template <int kCount>
  PAD_DEVICE void finish(int64_t, const Fetched<2>&) {}
};

template <DivergenceKind kKind, class Z>
struct OutcomeKernel {
  using Args = OutcomeLaunch;
  static constexpr int kThreads = kRowThreads, kBlocks = 3;

  template <class Team>
  static PAD_DEVICE void run(Team& team, int64_t row, const Args& in) {
    const OutcomeArgs& args = in.args;
    const int teacher = args.divergence.teacher;
    OutcomeThread<kKind, Z> mine{in, row, outcome_row(args.maximum, args.sum, teacher, row)};
    const Z* first = logits_at<Z>(args.stream[0], row, 0);
    const bool alike = aligned_alike(first, logits_at<Z>(args.stream[teacher], row, 0));
    over_columns<Z>(team, make_columns(first, alike, 0, args.cols), mine);
    const Numbers<2> both = team.reduce(Numbers<2>{{mine.value, mine.slope}}, AddNumbers<2>());
    if (team.rank() > 0) return;
    args.value[row] += both.value[0];
    args.slope[row] += both.value[1];
  }
};

// ---------------------------------------------------------------- gradient

constexpr int kVectorsPerThread =
    4;  // of a gradient's block: enough to hide what a row begins with

// Which terms of a gradient a kernel has: registers for all of them would slow the usual ones down.
enum class Terms { plain, outside, everything };

// The stream of the divergence's teacher. Known to the compiler: registers have no index, so
// streams chosen by a number that a kernel is given would lie in memory.
constexpr int kTeacher = 1;

struct GradientLaunch {
  GradientArgs args;
  Heads heads;
  int64_t segment, segments;  // columns of a block, blocks of a row
};

// The bits that a block marks: columns with sparse values, and columns that `outside` leaves out.
// Then the tiles that its columns touch, for the largest magnitudes.
PAD_HD int64_t touched_tiles(int64_t segment, int64_t tile) { return (segment - 1) / tile + 2; }

// The same gradient with the divergence's teacher as stream kTeacher.
inline GradientArgs with_teacher_in_place(GradientArgs args) {
  const int teacher = args.divergence.teacher;
  if (!teacher) return args;
  std::swap(args.stream[teacher], args.stream[kTeacher]);
  std::swap(args.maximum[teacher], args.maximum[kTeacher]);
  std::swap(args.sum[teacher], args.sum[kTeacher]);
  std::swap(args.q[teacher], args.q[kTeacher]);
  std::swap(args.p[teacher], args.p[kTeacher]);
  args.divergence.teacher = kTeacher;
  return args;
}

inline GradientLaunch gradient_launch(const GradientArgs& given) {
  const GradientArgs args = with_teacher_in_place(given);
  return {args, make_heads(args), 0, 0};
}
inline Launch gradient_grid(GradientLaunch& in, int lanes) {
  const GradientArgs& args = in.args;
  int threads = kWarp;
  while (threads < kRowThreads && args.cols > int64_t(threads) * lanes * kVectorsPerThread)
    threads *= 2;
  in.segment = int64_t(threads) * lanes * kVectorsPerThread;
  in.segments = (args.cols + in.segment - 1) / in.segment;
  size_t words = 2 * listed_words(in.segment);
  if (args.tile_absmax) words += size_t(touched_tiles(in.segment, args.tile));
  return {args.rows * in.segments, threads, words * sizeof(uint32_t)};
}

template <class Z, int S, Terms kTerms>
struct GradientThread {
  static constexpr bool kAhead = S == 1;
  const GradientLaunch& in;
  int64_t row;
  Listed sparse, outside;
  uint32_t* peaks;     // of the tiles from first_tile on, or null
  int64_t first_tile;  // tile of the block's first column
  float shift[S], inverse[S], q[S], p[S];
  float c0, c1, outside_shift, outside_value, weight, mean;
  OutcomeRow<float> constants;

  static PAD_DEVICE float at(const double* column, int64_t row) {
    return column ? float(column[row]) : 0.0f;
  }

  PAD_DEVICE GradientThread(const GradientLaunch& launch, int64_t of_row)
      : in(launch), row(of_row) {
    const GradientArgs& args = in.args;
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      if (!reads(j)) continue;
      shift[j] = shift_of(float(args.maximum[j][row]));
      inverse[j] = inverse_of(float(args.sum[j][row]));
      q[j] = at(args.q[j], row);
      p[j] = at(args.p[j], row) * inverse[j];
    }
    c0 = at(args.c0, row);
    c1 = at(args.c1, row) + at(args.p[0], row);
    if constexpr (kTerms != Terms::plain) {
      outside_shift = shift_of(at(args.outside_maximum, row));
      outside_value = at(args.outside_value, row);
    }
    if constexpr (kTerms == Terms::everything) {
      constants = outcome_row(args.maximum, args.sum, kTeacher, row);
      weight = at(args.divergence_weight, row);
      mean = at(args.divergence_slope, row);
    }
  }

  PAD_DEVICE bool reads(int j) const {
    const GradientArgs& args = in.args;
    return j == 0 || (args.stream[j].logits &&
                      (args.q[j] || args.p[j] || (kTerms == Terms::everything && j == kTeacher)));
  }
  PAD_DEVICE Z* out() const { return static_cast<Z*>(in.args.out) + row * in.args.out_ld; }

  template <int kCount>
  PAD_DEVICE Fetched<S> fetch(int64_t col) const {
    Fetched<S> found;
    PAD_UNROLL
    for (int j = 0; j < S; ++j)
      if (reads(j))
        found.of[j] = pad::PAD_ISA::fetch<kCount>(logits_at<Z>(in.args.stream[j], row, col));
    return found;
  }

  template <int kCount>
  PAD_DEVICE void use(int64_t col, int group, Fetched<S>& stored) {
    const GradientArgs& args = in.args;
    float a[S][kCount], d[kCount], chain[kCount];
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      if (!reads(j)) continue;
      unpack<Z>(stored.of[j], group, a[j]);
      transform_lanes(args.stream[j], in.heads.of[j], col, a[j], j == 0 ? chain : nullptr);
    }
    add_shares(a, d);
    if constexpr (kTerms != Terms::plain)
      if (args.outside_value) add_outside(col, a[0], d);
    if constexpr (kTerms == Terms::everything) add_divergence(a[0], a[kTeacher], d);
    if (args.sparse.k > 0) add_sparse(col, d);
    const Head<float>& head = in.heads.of[0];
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) d[i] *= head.capped ? chain[i] : head.slope;
    pack<Z>(d, group, stored.of[0]);  // nobody reads the student's logits of this group again
    if (peaks) raise_peaks(col, d);
  }
  template <int kCount>
  PAD_DEVICE void finish(int64_t col, const Fetched<S>& stored) {
    put<kCount>(out() + col, stored.of[0]);
  }

  // d = c0 + s_0 (sum_j q_j x_j + c1) + sum_j p_j s_j, c1 last: it may cancel the rest.
  template <int kCount>
  PAD_DEVICE void add_shares(const float (&a)[S][kCount], float (&d)[kCount]) const {
    const GradientArgs& args = in.args;
    float factor[kCount];
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) factor[i] = 0;
    PAD_UNROLL
    for (int j = 0; j < S; ++j) {
      if (!reads(j) || !args.q[j] || q[j] == 0) continue;
      PAD_UNROLL
      for (int i = 0; i < kCount; ++i) factor[i] += q[j] * (a[j][i] - shift[j]);
    }
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i)
      d[i] = c0 + weighted(exp_of(a[0][i] - shift[0]) * inverse[0], factor[i] + c1);
    PAD_UNROLL
    for (int j = 1; j < S; ++j) {
      if (!reads(j) || !args.p[j]) continue;
      PAD_UNROLL
      for (int i = 0; i < kCount; ++i) d[i] += exp_of(a[j][i] - shift[j]) * p[j];
    }
  }

  template <int kCount>
  PAD_DEVICE void add_outside(int64_t col, const float (&a)[kCount], float (&d)[kCount]) const {
    const uint32_t listed = outside.bits(col, kCount);
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i)
      d[i] += listed >> i & 1u ? 0.0f : exp_of(a[i] - outside_shift) * outside_value;
  }

  template <int kCount>
  PAD_DEVICE void add_divergence(const float (&a_s)[kCount], const float (&a_t)[kCount],
                                 float (&d)[kCount]) const {
    const DivergenceArgs& divergence = in.args.divergence;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const Outcome<float> found = outcome_by_kind(divergence.kind, a_s[i], a_t[i], constants,
                                                   Mixing<float>(divergence.alpha));
      d[i] += weight * (found.slope - found.s * mean);
    }
  }

  // The listed values, where a vector has some: few have.
  template <int kCount>
  PAD_DEVICE void add_sparse(int64_t col, float (&d)[kCount]) const {
    const uint32_t listed = sparse.bits(col, kCount);
    if (!listed) return;
    const IdsArgs& from = in.args.sparse;
    const int64_t id = in.args.vocab_offset + col;
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (listed >> i & 1u)
        d[i] += float(listed_value(from.ids + row * from.k, in.args.sparse_values + row * from.k,
                                   from.k, id + i));
  }

  // The largest magnitude of what is stored, in each of the at most two tiles that it lies in. As
  // bits, which for numbers without a sign are in order, NaN last.
  template <int kCount>
  PAD_DEVICE void raise_peaks(int64_t col, const float (&d)[kCount]) const {
    const int64_t tile = in.args.tile, low = col / tile, boundary = (low + 1) * tile;
    uint32_t most[2] = {0, 0};
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bits = bits_as<uint32_t>(load(store<Z>(d[i]))) & 0x7fffffffu;
      const bool beyond = col + i >= boundary;
      if (beyond)
        most[1] = bits > most[1] ? bits : most[1];
      else
        most[0] = bits > most[0] ? bits : most[0];
    }
    raise_to(peaks + (low - first_tile), most[0]);
    if (most[1]) raise_to(peaks + (low - first_tile) + 1, most[1]);
  }
};

template <class Z, int S, Terms kTerms>
struct GradientKernel {
  using Args = GradientLaunch;
  static constexpr int kThreads = kRowThreads;
  static constexpr int kBlocks = S == 1 ? 4 : (S == 2 ? 3 : 2);

  template <class Team>
  static PAD_DEVICE void run(Team& team, int64_t block, const Args& in) {
    const GradientArgs& args = in.args;
    const int64_t row = block / in.segments, begin = block % in.segments * in.segment;
    const int64_t end = args.cols - begin < in.segment ? args.cols : begin + in.segment;
    GradientThread<Z, S, kTerms> mine(in, row);
    uint32_t* words = static_cast<uint32_t*>(team.shared());
    const size_t count = listed_words(in.segment);
    if (args.sparse.k > 0)
      mine.sparse = mark_listed(team, words, args.sparse.ids + row * args.sparse.k, args.sparse.k,
                                args.vocab_offset, begin, end);
    if (kTerms != Terms::plain && args.outside_value)
      mine.outside = mark_listed(team, words + count, args.outside.ids + row * args.outside.k,
                                 args.outside.k, args.vocab_offset, begin, end);
    mine.peaks = args.tile_absmax ? words + 2 * count : nullptr;
    const int64_t tiles = args.tile_absmax ? touched_tiles(in.segment, args.tile) : 0;
    mine.first_tile = args.tile_absmax ? begin / args.tile : 0;
    for (int64_t i = team.rank(); i < tiles; i += team.size()) mine.peaks[i] = 0;
    if (tiles) team.sync();
    const Z* first = logits_at<Z>(args.stream[0], row, begin);
    const bool alike = alike_with_out(mine, row);
    over_columns<Z>(team, make_columns(first, alike, begin, end), mine);
    if (!tiles) return;
    team.sync();
    uint32_t* absmax = reinterpret_cast<uint32_t*>(args.tile_absmax) + mine.first_tile;
    for (int64_t i = team.rank(); i < tiles; i += team.size())
      if (mine.peaks[i]) raise_to(absmax + i, mine.peaks[i]);
  }

  static PAD_DEVICE bool alike_with_out(const GradientThread<Z, S, kTerms>& mine, int64_t row) {
    const BlockArgs& args = mine.in.args;
    const Z* first = logits_at<Z>(args.stream[0], row, 0);
    bool alike = aligned_alike(first, mine.out());
    PAD_UNROLL
    for (int j = 1; j < S; ++j)
      if (mine.reads(j))
        alike = alike && aligned_alike(first, logits_at<Z>(args.stream[j], row, 0));
    return alike;
  }
};

}  // namespace PAD_ISA
}  // namespace pad
