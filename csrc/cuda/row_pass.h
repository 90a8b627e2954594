// The entry points of the GPU row passes. Everything is launched on the given queue (a stream) and
// nothing is waited for.
#pragma once

#include "../row_args.h"

namespace pad {
namespace cuda {

void row_statistics(const StatisticsArgs&);
void row_outcomes(const OutcomeArgs&);
// Largest magnitudes are raised, so `tile_absmax` has to hold zeros.
void row_gradient(const GradientArgs&);
void head_transform(const TransformArgs&);

// The same for one stored type: one translation unit each, so that they compile side by side.
#define PAD_DECLARE_STORED(type)                     \
  void row_statistics_##type(const StatisticsArgs&); \
  void row_outcomes_##type(const OutcomeArgs&);      \
  void row_gradient_##type(const GradientArgs&);
PAD_DECLARE_STORED(float32)
PAD_DECLARE_STORED(bfloat16)
PAD_DECLARE_STORED(float16)

}  // namespace cuda
}  // namespace pad
