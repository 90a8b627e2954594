// The arguments of the row passes, on a CPU and on a GPU alike. Plain data only: this header is
// shared by objects compiled for different instruction sets.
#pragma once

#include <stdint.h>

#include "row_functionals.h"

namespace pad {

enum class DType { float32, float64, bfloat16, float16 };

// One stream of raw logits; null for a stream that these rows do not use. `acc` below is float, or
// double for float64 logits. What there is one of per row is always double.
struct StreamArgs {
  const void* logits;  // (rows, cols), leading dimension ld
  int64_t ld;
  const void* bias;                    // (cols,) acc, or null
  double scale, softcap, temperature;  // softcap 0: none
};

// The block that a pass works on.
struct BlockArgs {
  DType dtype;
  int streams;
  StreamArgs stream[kMaxStreams];
  int64_t rows, cols, vocab_offset;
  int threads;  // of a CPU
  void* queue;  // of a GPU: its stream
};

// Token ids of each row, ascending: (rows, k); null for none.
struct IdsArgs {
  const int64_t* ids;
  int64_t k;
};

struct MomentArgs {
  int weight;
  double coefficients[kMaxStreams];
  double* value;  // (rows,)
};

struct StatisticsArgs : BlockArgs {
  double* maximum[kMaxStreams];  // (rows,)
  double* sum[kMaxStreams];      // (rows,)
  int moments;
  MomentArgs moment[kMaxMoments];
  double* total;    // (rows,), or null
  int64_t* argmax;  // (rows,), or null; with best
  double* best;     // (rows,)
  IdsArgs tail;     // maximum and sum of the student's entries outside these ids
  double* tail_maximum;
  double* tail_sum;
};

// A divergence of two sweeps between the student and the teacher of stream `teacher`.
struct DivergenceArgs {
  DivergenceKind kind;
  double alpha;
  int teacher;  // 0: no divergence
};

// The second sweep: sums of value and slope, once the normalisers are known.
struct OutcomeArgs : BlockArgs {
  const double* maximum[kMaxStreams];
  const double* sum[kMaxStreams];
  DivergenceArgs divergence;
  double* value;  // (rows,), added to
  double* slope;
};

struct GradientArgs : BlockArgs {
  const double* maximum[kMaxStreams];
  const double* sum[kMaxStreams];
  void* out;  // (rows, cols), leading dimension out_ld; may be stream 0
  int64_t out_ld;
  const double* c0;  // per-row coefficients (rows,), or null
  const double* c1;
  const double* q[kMaxStreams];
  const double* p[kMaxStreams];
  IdsArgs sparse;
  const double* sparse_values;    // (rows, sparse.k)
  IdsArgs outside;                // where v is not among these ids:
  const double* outside_value;    // (rows,), plus this
  const double* outside_maximum;  // times exp(a_0 - this)
  DivergenceArgs divergence;
  const double* divergence_weight;  // (rows,), of its gradient
  const double* divergence_slope;   // (rows,), the sum of slopes
  int64_t tile;
  float* tile_absmax;  // (ceil(cols / tile),), or null
};

// All of the above for a block of whole rows: the first sweep, the second if there is a
// second.value, and the gradient. Logits may be overwritten, and so may what is between their rows.
struct WalkArgs {
  StatisticsArgs first;
  OutcomeArgs second;
  GradientArgs gradient;
  // Where the gradient has s_0 times a moment of stream 0 less its mean: what that is multiplied by
  // (rows,), or null; c1 is gradient.c1, from which the means are taken off.
  const double* centred[kMaxMoments];
  double* c1;
};

// Raw logits (count,) in acc behind their head transform, in place: the very numbers that the row
// passes see.
struct TransformArgs {
  DType dtype;
  void* values;
  int64_t count;
  double scale, softcap, temperature;
  void* queue;  // of a GPU: its stream
};

}  // namespace pad
