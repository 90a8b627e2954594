// Rewards of packed or padded sequences, a block for each, and their gradient.
#include "launch.h"
#include "tokens.h"

namespace pad {
namespace PAD_ISA {
namespace {

constexpr int kRewardThreads = 256;

struct RewardsKernel {
  using Args = RewardsArgs;
  static constexpr int kThreads = kRewardThreads, kBlocks = 4;

  template <class Team>
  static PAD_DEVICE void run(Team& team, int64_t sequence, const Args& args) {
    const Reward reward = reward_of(team, args.tokens, sequence);
    if (team.rank() > 0) return;
    write_number(args.reward, args.result, sequence, reward.value);
    args.inverse_count[sequence] = reward.inverse_count;
  }
};

// A block for each sequence, and one for the tokens that no sequence has: the space before the
// first boundary and behind the last.
struct RewardsGradientKernel {
  using Args = RewardsGradientArgs;
  static constexpr int kThreads = kRewardThreads, kBlocks = 4;

  template <class Team>
  static PAD_DEVICE void run(Team& team, int64_t sequence, const Args& args) {
    if (sequence == args.sequences) return fill_rest(team, args);
    const Span span = tokens_of(args.tokens, sequence);
    double factor = args.inverse_count[sequence] *
                    read_number(args.upstream, sequence / args.per * args.upstream_step);
    if (args.gradient.at) factor *= read_number(args.gradient, sequence);
    for (int64_t token = span.begin + team.rank(); token < span.end; token += team.size())
      write_number(args.out, args.result, token, counts(args.tokens, token) ? factor : 0.0);
  }

  template <class Team>
  static PAD_DEVICE void fill_rest(Team& team, const Args& args) {
    const int64_t total = args.tokens.total;
    const int64_t first = args.sequences ? tokens_of(args.tokens, 0).begin : total;
    const int64_t last = args.sequences ? tokens_of(args.tokens, args.sequences - 1).end : total;
    for (int64_t token = team.rank(); token < first; token += team.size())
      write_number(args.out, args.result, token, 0.0);
    for (int64_t token = last + team.rank(); token < total; token += team.size())
      write_number(args.out, args.result, token, 0.0);
  }
};

}  // namespace
}  // namespace PAD_ISA

namespace cuda {

void rewards(const RewardsArgs& args) {
  using namespace PAD_ISA;
  launch<RewardsKernel>("rewards", {args.sequences, kRewardThreads, 0}, args.queue, args);
}

void rewards_gradient(const RewardsGradientArgs& args) {
  using namespace PAD_ISA;
  const Launch grid = {args.sequences + 1, kRewardThreads, 0};
  launch<RewardsGradientKernel>("rewards_gradient", grid, args.queue, args);
}

}  // namespace cuda
}  // namespace pad
