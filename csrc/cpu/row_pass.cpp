// The row passes: statistics of a block of logits, and the gradient with respect to them.
//
// A row is walked in tiles that stay in the first-level cache. Each step over a tile is one plain
// loop that the compiler vectorises; this file is compiled once per instruction set, with PAD_ISA
// naming the copy. It uses no standard library: an inline function shared between copies would let
// the linker pick the wrong one.
#include "row_pass.h"

#include "gradient_pass.h"
#include "outcomes_pass.h"
#include "statistics_pass.h"
#include "walk_pass.h"

namespace pad {
namespace PAD_ISA {
namespace {

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

void row_walk(const WalkArgs& args) {
  if (args.gradient.rows <= 0 || args.gradient.cols <= 0) return;
  switch (args.gradient.dtype) {
    case DType::float32:
      return walk<float>(args);
    case DType::float64:
      return walk<double>(args);
    case DType::bfloat16:
      return walk<bfloat16>(args);
    case DType::float16:
      return;
  }
}

}  // namespace PAD_ISA
}  // namespace pad
