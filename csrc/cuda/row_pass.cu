// The row passes by stored type, and the head transform of a few logits.
#include "row_pass.h"

#include "launch.h"
#include "row_streams.h"

namespace pad {
namespace PAD_ISA {
namespace {

struct TransformLaunch {
  float* values;
  int64_t count;
  StreamArgs stream;
  Head<float> head;
};

struct TransformKernel {
  using Args = TransformLaunch;
  static constexpr int kThreads = kRowThreads, kBlocks = 4;

  template <class Team>
  static PAD_DEVICE void run(Team& team, int64_t block, const Args& in) {
    const int64_t begin = block * kThreads;
    const int64_t end = in.count - begin < kThreads ? in.count : begin + kThreads;
    for (int64_t i = begin + team.rank(); i < end; i += team.size()) {
      float a[1] = {in.values[i]};
      transform_lanes(in.stream, in.head, 0, a, nullptr);
      in.values[i] = a[0];
    }
  }
};

}  // namespace
}  // namespace PAD_ISA

namespace cuda {
namespace {

// One of three functions, by stored type; there is none for float64, see the bindings.
template <class Args>
void by_type(const Args& args, void (*float32)(const Args&), void (*bfloat16)(const Args&),
             void (*float16)(const Args&)) {
  if (args.rows <= 0 || args.cols <= 0) return;
  if (args.dtype == DType::float32) return float32(args);
  if (args.dtype == DType::bfloat16) return bfloat16(args);
  float16(args);
}

}  // namespace

void row_statistics(const StatisticsArgs& args) {
  by_type(args, row_statistics_float32, row_statistics_bfloat16, row_statistics_float16);
}
void row_outcomes(const OutcomeArgs& args) {
  by_type(args, row_outcomes_float32, row_outcomes_bfloat16, row_outcomes_float16);
}
void row_gradient(const GradientArgs& args) {
  by_type(args, row_gradient_float32, row_gradient_bfloat16, row_gradient_float16);
}

void head_transform(const TransformArgs& args) {
  using namespace PAD_ISA;
  TransformLaunch in = {};
  in.values = static_cast<float*>(args.values);
  in.count = args.count;
  in.head = make_head<float>(args.scale, args.softcap, args.temperature);
  const int64_t blocks = (args.count + kRowThreads - 1) / kRowThreads;
  launch<TransformKernel>("head_transform", {blocks, kRowThreads, 0}, args.queue, in);
}

}  // namespace cuda
}  // namespace pad
