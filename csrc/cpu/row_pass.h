// The entry points of the CPU row passes.
#pragma once

#include "../row_args.h"

namespace pad {

// One set of entry points per instruction set.
#define PAD_DECLARE_ROW_PASS(isa)             \
  namespace isa {                             \
  void row_statistics(const StatisticsArgs&); \
  void row_outcomes(const OutcomeArgs&);      \
  void row_gradient(const GradientArgs&);     \
  void row_walk(const WalkArgs&);             \
  void head_transform(const TransformArgs&);  \
  }
PAD_DECLARE_ROW_PASS(portable)
PAD_DECLARE_ROW_PASS(avx2)
PAD_DECLARE_ROW_PASS(avx512)

}  // namespace pad
