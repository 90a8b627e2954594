// The arguments of the CPU row passes. Plain data only: this header is shared by objects compiled
// for different instruction sets.
#pragma once

#include <stdint.h>

#include "../row_functionals.h"

namespace pad {

enum class DType { float32, float64, bfloat16 };

// One stream of raw logits. `acc` below is float, or double for float64 logits.
struct StreamArgs {
  const void* logits;  // (rows, cols), leading dimension ld
  int64_t ld;
  const void* bias;                    // (cols,) acc, or null
  double scale, softcap, temperature;  // softcap 0: none
};

struct MomentArgs {
  int weight;
  double coefficients[kMaxStreams];
  void* value;  // (rows,) acc
};

struct StatisticsArgs {
  DType dtype;
  int streams;
  StreamArgs stream[kMaxStreams];
  int64_t rows, cols, vocab_offset;
  void* maximum[kMaxStreams];  // (rows,) acc
  void* sum[kMaxStreams];      // (rows,) acc
  int moments;
  MomentArgs moment[kMaxMoments];
  void* total;      // (rows,) acc, or null
  int64_t* argmax;  // (rows,), or null; with best
  void* best;       // (rows,) acc
  int threads;
};

struct GradientArgs {
  DType dtype;
  int streams;
  StreamArgs stream[kMaxStreams];
  int64_t rows, cols, vocab_offset;
  const void* maximum[kMaxStreams];  // (rows,) acc
  const void* sum[kMaxStreams];      // (rows,) acc
  void* out;                         // (rows, cols), leading dimension out_ld; may be stream 0
  int64_t out_ld;
  const void* c0;  // per-row coefficients (rows,) acc, or null
  const void* c1;
  const void* q[kMaxStreams];
  const void* p[kMaxStreams];
  const int64_t* sparse_ids;  // (rows, sparse_k), ascending in a row
  const void* sparse_values;  // (rows, sparse_k) acc
  int64_t sparse_k;
  int64_t tile;
  float* tile_absmax;  // (ceil(cols / tile),), or null
  int threads;
};

// Raw logits (count,) in acc behind their head transform, in place: the very numbers that the row
// passes see.
struct TransformArgs {
  DType dtype;
  void* values;
  int64_t count;
  double scale, softcap, temperature;
};

// One set of entry points per instruction set.
#define PAD_DECLARE_ROW_PASS(isa)             \
  namespace isa {                             \
  void row_statistics(const StatisticsArgs&); \
  void row_gradient(const GradientArgs&);     \
  void head_transform(const TransformArgs&);  \
  }
PAD_DECLARE_ROW_PASS(portable)
PAD_DECLARE_ROW_PASS(avx2)
PAD_DECLARE_ROW_PASS(avx512)

}  // namespace pad
