// Which row-pass kernel a call needs, for one stored type.
#pragma once

#include "launch.h"
#include "row_gradient.h"
#include "row_pass.h"
#include "row_statistics.h"

namespace pad {
namespace PAD_ISA {

// Kernels for one, two and up to kMaxStreams streams; the last skips those that are not there.
template <class Call>
void with_streams(int streams, Call call) {
  if (streams == 1) return call.template of<1>();
  if (streams == 2) return call.template of<2>();
  call.template of<kMaxStreams>();
}

template <class Z>
struct LaunchStatistics {
  const StatisticsArgs& args;
  template <int S>
  void of() const {
    const Launch grid = statistics_grid(args, kLanes<Z>, args.tail_sum != nullptr);
    launch<StatisticsKernel<Z, S>>("row_statistics", grid, args.queue, statistics_launch(args));
  }
};
template <class Z>
void launch_statistics(const StatisticsArgs& args) {
  with_streams(args.streams, LaunchStatistics<Z>{args});
}

template <DivergenceKind kKind, class Z>
void launch_outcomes_of(const OutcomeArgs& args) {
  const Launch grid = statistics_grid(args, kLanes<Z>, false);
  const OutcomeLaunch in = {args, make_heads(args)};
  launch<OutcomeKernel<kKind, Z>>("row_outcomes", grid, args.queue, in);
}
template <class Z>
void launch_outcomes(const OutcomeArgs& args) {
  switch (args.divergence.kind) {
    case DivergenceKind::jsd:
      return launch_outcomes_of<DivergenceKind::jsd, Z>(args);
    case DivergenceKind::skew_forward_kl:
      return launch_outcomes_of<DivergenceKind::skew_forward_kl, Z>(args);
    case DivergenceKind::skew_reverse_kl:
      return launch_outcomes_of<DivergenceKind::skew_reverse_kl, Z>(args);
    case DivergenceKind::tvd:
      return launch_outcomes_of<DivergenceKind::tvd, Z>(args);
  }
}

template <class Z>
struct LaunchGradient {
  const GradientArgs& args;
  template <int S, Terms kTerms>
  void run() const {
    GradientLaunch in = gradient_launch(args);
    const Launch grid = gradient_grid(in, kLanes<Z>);
    launch<GradientKernel<Z, S, kTerms>>("row_gradient", grid, args.queue, in);
  }
  template <int S>
  void of() const {
    // As many registers for two streams as for four: one kernel.
    if (args.divergence.teacher) return run<kMaxStreams, Terms::everything>();
    args.outside_value ? run<S, Terms::outside>() : run<S, Terms::plain>();
  }
};
template <class Z>
void launch_gradient(const GradientArgs& args) {
  with_streams(args.streams, LaunchGradient<Z>{args});
}

#define PAD_DEFINE_STORED(name, type)                                                          \
  namespace cuda {                                                                             \
  void row_statistics_##name(const StatisticsArgs& args) {                                     \
    PAD_ISA::launch_statistics<type>(args);                                                    \
  }                                                                                            \
  void row_outcomes_##name(const OutcomeArgs& args) { PAD_ISA::launch_outcomes<type>(args); }  \
  void row_gradient_##name(const GradientArgs& args) { PAD_ISA::launch_gradient<type>(args); } \
  }

}  // namespace PAD_ISA
}  // namespace pad
