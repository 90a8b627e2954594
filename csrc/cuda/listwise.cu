// Listwise losses, a block for each group: rewards from token log-probs, the divergence and its
// gradient by the rewards in one launch.
#include "launch.h"
#include "listwise_team.h"
#include "tokens.h"

namespace pad {
namespace PAD_ISA {
namespace {

using cuda::ListwisePlan;
using cuda::Storage;

constexpr int kListwiseThreads = 512;

// What a block's shared memory begins with: the rewards of the responses that are ranked.
struct Ranked {
  double s[kMaxRanked], t[kMaxRanked];
  int index[kMaxRanked];  // in the group
};
static_assert(sizeof(Ranked) % sizeof(double) == 0, "doubles follow");

struct ListwiseLaunch {
  ListwiseArgs args;
  Storage storage;
};

PAD_HD bool over_sets(Listwise kind) {
  return kind == Listwise::kl || kind == Listwise::reverse_kl;
}

// Loss and gradient of n responses by their recursion over sets.
template <class Word>
struct SetsSolver {
  template <class Team>
  static PAD_DEVICE Solution solve(Team& team, const ListwiseLaunch& in, int64_t group,
                                   Ranked& ranked, int n) {
    double* ratio = reinterpret_cast<double*>(&ranked + 1);
    Word* word = in.storage == Storage::global64
                     ? static_cast<Word*>(in.args.workspace) + (group << in.args.subset)
                     : reinterpret_cast<Word*>(ratio + ratio_words(in.args.subset));
    const Sets<Word> sets = {ranked.s, ranked.t, ratio, ratio + n * n, word, n};
    fill_ratios(team, ranked.s, n, sets.ratio_s);
    fill_ratios(team, ranked.t, n, sets.ratio_t);
    team.sync();
    if (in.args.kind == Listwise::kl) return sets.kl(team);
    return sets.reverse_kl(team, in.args.gradient != nullptr);
  }
};

// The same by enumeration.
struct RankingsSolver {
  template <class Team>
  static PAD_DEVICE Solution solve(Team& team, const ListwiseLaunch& in, int64_t, Ranked& ranked,
                                   int n) {
    Rankings* shared = reinterpret_cast<Rankings*>(&ranked + 1);
    const bool released = in.args.kind == Listwise::jsd_released;
    const Enumeration all = {ranked.s, ranked.t, shared, n, released};
    return all.jsd(team, in.args.gradient != nullptr);
  }
};

template <class Solver>
struct ListwiseKernel {
  using Args = ListwiseLaunch;
  static constexpr int kThreads = kListwiseThreads, kBlocks = 1;

  static PAD_DEVICE bool valid(const ListwiseArgs& args, int64_t group, int i) {
    return !args.valid || args.valid[group * args.n + i];
  }

  // Whether a number is one.
  static PAD_DEVICE bool finite(double x) { return x - x == 0; }

  // The valid responses of [begin, end), scaled, side by side; how many there are. `bad` is raised
  // where a reward is no number.
  template <class Team>
  static PAD_DEVICE int gather(Team& team, const ListwiseArgs& args, int64_t group, int begin,
                               int end, Ranked& ranked, bool& bad) {
    int count = 0;
    team.sync();  // nobody reads the responses before these any more
    for (int i = begin; i < end; ++i) {
      const int64_t at = group * args.n + i;
      Reward reward = {0, 0};
      if (valid(args, group, i))
        reward = args.student.at ? Reward{read_number(args.student, at), 1}
                                 : reward_of(team, args.tokens, at);
      if (args.inverse_count && team.rank() == 0) args.inverse_count[at] = reward.inverse_count;
      if (!valid(args, group, i)) continue;
      const double target = read_number(args.teacher, at);
      bad = bad || !finite(reward.value) || !finite(target);
      if (team.rank() == 0) {
        ranked.s[count] = args.beta * reward.value;
        ranked.t[count] = args.beta * target;
        ranked.index[count] = i;
      }
      ++count;
    }
    team.sync();
    return count;
  }

  // Subsets in which there is something to rank.
  static PAD_DEVICE int ranked_subsets(const ListwiseArgs& args, int64_t group) {
    int found = 0;
    for (int begin = 0; begin < args.n; begin += args.subset) {
      int count = 0;
      for (int i = begin; i < args.n && i < begin + args.subset; ++i)
        count += valid(args, group, i);
      found += count >= 2;
    }
    return found;
  }

  template <class Team>
  static PAD_DEVICE void run(Team& team, int64_t group, const Args& in) {
    const ListwiseArgs& args = in.args;
    Ranked& ranked = *static_cast<Ranked*>(team.shared());
    const int subsets = ranked_subsets(args, group);
    const double share = subsets > 1 ? 1.0 / subsets : 1.0;
    double loss = 0;
    bool bad = false;
    if (args.gradient) fill(team, args, group, 0.0);
    for (int begin = 0; begin < args.n; begin += args.subset) {
      const int end = args.n - begin < args.subset ? args.n : begin + args.subset;
      const int count = gather(team, args, group, begin, end, ranked, bad);
      if (bad || count < 2) continue;
      const Solution found = Solver::solve(team, in, group, ranked, count);
      loss += fmax(found.value[0], 0.0);  // none is negative but by rounding
      if (!args.gradient || team.rank() > 0) continue;
      PAD_UNROLL
      for (int k = 0; k < kMaxRanked; ++k)
        if (k < count)
          write_number(args.gradient, args.result, group * args.n + ranked.index[k],
                       found.value[1 + k] * args.beta * share);
    }
    team.sync();
    if (bad && args.gradient) fill(team, args, group, NAN);
    if (team.rank() == 0) write_number(args.loss, args.result, group, bad ? NAN : loss * share);
  }

  template <class Team>
  static PAD_DEVICE void fill(Team& team, const ListwiseArgs& args, int64_t group, double value) {
    for (int i = team.rank(); i < args.n; i += team.size())
      write_number(args.gradient, args.result, group * args.n + i, value);
    team.sync();
  }
};

}  // namespace
}  // namespace PAD_ISA

namespace cuda {

using namespace PAD_ISA;

ListwisePlan listwise_plan(Listwise kind, int n, int64_t groups, bool wide, size_t limit) {
  if (!over_sets(kind))
    return {Storage::shared64, kListwiseThreads, sizeof(Ranked) + sizeof(Rankings), 0};
  // A thread for every other set of the largest level, about a quarter of all.
  int threads = kWarp;
  while (threads < kListwiseThreads && threads < (1 << n) / 8) threads *= 2;
  const size_t sets = size_t(1) << n, rest = sizeof(Ranked) + ratio_words(n) * sizeof(double);
  if (rest + sets * sizeof(double) <= limit)
    return {Storage::shared64, threads, rest + sets * sizeof(double), 0};
  if (!wide && rest + sets * sizeof(float) <= limit)
    return {Storage::shared32, threads, rest + sets * sizeof(float), 0};
  return {Storage::global64, threads, rest, size_t(groups) * sets * sizeof(double)};
}

void listwise(const ListwiseArgs& args) {
  const ListwisePlan plan = listwise_plan(args.kind, args.subset, args.groups,
                                          args.result == DType::float64, args.shared_limit);
  const ListwiseLaunch in = {args, plan.storage};
  const Launch grid = {args.groups, plan.threads, plan.shared};
  if (!over_sets(args.kind))
    return launch<ListwiseKernel<RankingsSolver>>("listwise", grid, args.queue, in);
  if (plan.storage == Storage::shared32)
    return launch<ListwiseKernel<SetsSolver<float>>>("listwise", grid, args.queue, in);
  launch<ListwiseKernel<SetsSolver<double>>>("listwise", grid, args.queue, in);
}

}  // namespace cuda
}  // namespace pad
