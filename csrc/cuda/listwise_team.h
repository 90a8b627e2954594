// Plackett-Luce divergences by a team of threads: the recursions and enumerations of listwise.h
// with every set, order or ranking that does not wait for another given to a thread of its own.
// Nothing is added up by atomics: a set pulls what larger or smaller sets have left for it.
#pragma once

#include "../listwise.h"
#include "team.h"

namespace pad {
namespace PAD_ISA {

constexpr int kMaxRanked = kMaxExactKl;

// Loss, then its gradient by each reward.
using Solution = Numbers<1 + kMaxRanked>;

// ---------------------------------------------------------------- over sets

// Largest member of a set and the sum of exp(x_i - x_top) over the set.
struct Pool {
  int top;
  double sum;
};
// ratio[top * n + i] = exp(x_i - x_top), as in listwise.h; sums are made anew instead of kept.
PAD_DEVICE Pool pool_of(const double* x, const double* ratio, int n, uint32_t set) {
  Pool pool = {lowest_bit(set), 0};
  for (uint32_t left = set; left; left &= left - 1) {
    const int i = lowest_bit(left);
    if (x[i] > x[pool.top]) pool.top = i;
  }
  for (uint32_t left = set; left; left &= left - 1)
    pool.sum += ratio[pool.top * n + lowest_bit(left)];
  return pool;
}

// The probability that a set is what is left to rank at some point, from the sets with one member
// more: unit[larger] is theirs over the sum of their pool.
template <class Word>
PAD_DEVICE double flow_into(const double* x, const double* ratio, int n, uint32_t set, int top,
                            const Word* unit) {
  const uint32_t full = (1u << n) - 1;
  if (set == full) return 1;
  double flow = 0;
  for (uint32_t left = full ^ set; left; left &= left - 1) {
    const int i = lowest_bit(left);
    const int larger_top = x[i] > x[top] ? i : top;
    flow += double(unit[set | 1u << i]) * ratio[larger_top * n + i];
  }
  return flow;
}

// Shared memory of the recursions: rewards and ratios, then a Word for each set unless those are in
// global memory. Doubles.
PAD_HD size_t ratio_words(int n) { return 2 * size_t(n) * n; }

template <class Team>
PAD_DEVICE void fill_ratios(Team& team, const double* x, int n, double* ratio) {
  for (int k = team.rank(); k < n * n; k += team.size()) {
    const int top = k / n, i = k % n;
    ratio[k] = x[i] <= x[top] ? exp(x[i] - x[top]) : 0.0;
  }
}

template <class Word>
struct Sets {
  const double *s, *t;  // (n,) rewards
  double *ratio_s, *ratio_t;
  Word* word;  // (2^n,)
  int n;

  // Call body(set) for this thread's sets of so many members, and wait for the others.
  template <class Team, class Body>
  PAD_DEVICE void over_level(Team& team, int members, Body body) const {
    for (uint32_t set = uint32_t(team.rank()); set < 1u << n; set += uint32_t(team.size()))
      if (count_bits(set) == members) body(set);
    team.sync();
  }

  // KL(P_teacher || P_student), from the set of all downwards. As kl_group.
  template <class Team>
  PAD_DEVICE Solution kl(Team& team) const {
    Solution found = {};
    for (int members = n; members >= 2; --members)
      over_level(team, members, [&](uint32_t set) {
        const Pool of_s = pool_of(s, ratio_s, n, set), of_t = pool_of(t, ratio_t, n, set);
        const double flow = flow_into(t, ratio_t, n, set, of_t.top, word);
        const double unit_s = flow / of_s.sum, unit_t = flow / of_t.sum;
        word[set] = Word(unit_t);
        if (flow == 0) return;
        double shifted = 0;
        PAD_UNROLL
        for (int i = 0; i < kMaxRanked; ++i) {
          if (!(set >> i & 1u)) continue;
          const double chosen = ratio_t[of_t.top * n + i] * unit_t;
          shifted += chosen * ((t[i] - t[of_t.top]) - (s[i] - s[of_s.top]));
          found.value[1 + i] += ratio_s[of_s.top * n + i] * unit_s - chosen;
        }
        found.value[0] += shifted + flow * log(of_s.sum / of_t.sum);
      });
    return team.reduce(found, AddNumbers<1 + kMaxRanked>());
  }

  // KL(P_student || P_teacher): first `word` is the divergence that a set has ahead of it, upwards;
  // then, downwards, it is overwritten set by set with the flow. As reverse_kl_group.
  template <class Team>
  PAD_DEVICE Solution reverse_kl(Team& team, bool with_gradient) const {
    const uint32_t full = (1u << n) - 1;
    if (team.rank() == 0) word[0] = 0;
    team.sync();
    for (int members = 1; members <= n; ++members)
      over_level(team, members, [&](uint32_t set) {
        const Pool of_s = pool_of(s, ratio_s, n, set), of_t = pool_of(t, ratio_t, n, set);
        double value = 0;
        for (uint32_t left = set; left; left &= left - 1) {
          const int i = lowest_bit(left);
          const double shifted = (s[i] - s[of_s.top]) - (t[i] - t[of_t.top]);
          value += ratio_s[of_s.top * n + i] * (shifted + double(word[set ^ 1u << i]));
        }
        word[set] = Word(value / of_s.sum + log(of_t.sum / of_s.sum));
      });
    Solution found = {};
    if (team.rank() == 0) found.value[0] = word[full];
    team.sync();
    for (int members = n; with_gradient && members >= 2; --members)
      over_level(team, members, [&](uint32_t set) {
        const Pool of_s = pool_of(s, ratio_s, n, set), of_t = pool_of(t, ratio_t, n, set);
        const double unit = flow_into(s, ratio_s, n, set, of_s.top, word) / of_s.sum;
        const double centre = double(word[set]) - log(of_t.sum / of_s.sum);
        PAD_UNROLL
        for (int i = 0; i < kMaxRanked; ++i) {
          if (!(set >> i & 1u)) continue;
          const double shifted = (s[i] - s[of_s.top]) - (t[i] - t[of_t.top]);
          found.value[1 + i] +=
              ratio_s[of_s.top * n + i] * unit * (shifted + double(word[set ^ 1u << i]) - centre);
        }
        word[set] = Word(unit);
      });
    return team.reduce(found, AddNumbers<1 + kMaxRanked>());
  }
};

// ---------------------------------------------------------------- over rankings

constexpr int kSplits = 7;  // ways to split in two that are worked on at a time: 4032 rankings
constexpr int kMaxSplits = 70;
constexpr int kHalves = 2 * kMaxOrders;  // orders of both halves of a split

// Shared memory of an enumeration.
struct Rankings {
  double lse_s[1 << kMaxExactJsd], lse_t[1 << kMaxExactJsd];
  double softmax[1 << kMaxExactJsd][kMaxExactJsd];  // of the student, over each set
  // The orders of the first half of each split, then those of the last.
  double p[kSplits][kHalves], q[kSplits][kHalves], log_p[kSplits][kHalves], log_q[kSplits][kHalves];
  double weight[kSplits][kMaxOrders][kMaxOrders];  // of the rankings
  uint32_t splits[kMaxSplits];                     // the last half of each
};

PAD_HD int orders_of(int members) {
  return members < 2 ? 1 : members == 2 ? 2 : members == 3 ? 6 : 24;
}

// Visit the members in the order of that number, each with the set that it is chosen from.
template <class Visit>
PAD_DEVICE void walk_order(uint32_t members, uint32_t set, int order, Visit visit) {
  int count = count_bits(members), orders = orders_of(count);
  for (; count > 0; --count) {
    orders /= count;
    uint32_t left = members;
    for (int place = order / orders; place > 0; --place) left &= left - 1;
    order %= orders;
    const int i = lowest_bit(left);
    visit(i, set);
    members ^= 1u << i;
    set ^= 1u << i;
  }
}

struct Enumeration {
  const double *s, *t;
  Rankings* shared;
  int n;
  bool released;

  PAD_DEVICE uint32_t full() const { return (1u << n) - 1; }
  PAD_DEVICE int first_orders() const { return orders_of(n - n / 2); }
  PAD_DEVICE int last_orders() const { return orders_of(n / 2); }

  static PAD_DEVICE double lse_of(const double* x, uint32_t set) {
    double most = x[lowest_bit(set)], sum = 0;
    for (uint32_t left = set; left; left &= left - 1) most = fmax(most, x[lowest_bit(left)]);
    for (uint32_t left = set; left; left &= left - 1) sum += exp(x[lowest_bit(left)] - most);
    return most + log(sum);
  }

  // Tables over sets, and the list of splits, by their number.
  template <class Team>
  PAD_DEVICE void prepare(Team& team) const {
    for (uint32_t set = 1 + uint32_t(team.rank()); set <= full(); set += uint32_t(team.size())) {
      const double lse = lse_of(s, set);
      shared->lse_s[set] = lse;
      shared->lse_t[set] = lse_of(t, set);
      for (int i = 0; i < n; ++i) shared->softmax[set][i] = set >> i & 1u ? exp(s[i] - lse) : 0.0;
      if (count_bits(set) != n / 2) continue;
      int number = 0;
      for (uint32_t before = 1; before < set; ++before) number += count_bits(before) == n / 2;
      shared->splits[number] = set;
    }
    team.sync();
  }

  // Where order k of a split starts, orders of the first half counted before those of the last.
  struct Place {
    uint32_t members, set;
    int order;
  };
  PAD_DEVICE Place place_of(int split, int k) const {
    const uint32_t last = shared->splits[split];
    const bool in_first = k < first_orders();
    return {in_first ? full() ^ last : last, in_first ? full() : last,
            in_first ? k : k - first_orders()};
  }

  // Probabilities of the orders of both halves.
  template <class Team>
  PAD_DEVICE void fill_halves(Team& team, int start, int count) const {
    const int orders = first_orders() + last_orders();
    for (int item = team.rank(); item < count * orders; item += team.size()) {
      const int split = item / orders, k = item % orders;
      const Place place = place_of(start + split, k);
      double log_p = 0, log_q = 0;
      walk_order(place.members, place.set, place.order, [&](int i, uint32_t set) {
        log_p += s[i] - shared->lse_s[set];
        log_q += t[i] - shared->lse_t[set];
      });
      shared->log_p[split][k] = log_p;
      shared->log_q[split][k] = log_q;
      shared->p[split][k] = exp(log_p);
      shared->q[split][k] = exp(log_q);
    }
    team.sync();
  }

  // Every ranking of the splits: what it adds to the loss is returned, its weight kept.
  template <class Team>
  PAD_DEVICE double visit_rankings(Team& team, int count) const {
    const int firsts = first_orders(), lasts = last_orders();
    double loss = 0;
    for (int item = team.rank(); item < count * firsts * lasts; item += team.size()) {
      const int b = item % lasts, a = item / lasts % firsts, split = item / lasts / firsts;
      const int k = firsts + b;
      const Leaf<double> leaf = jsd_leaf(
          shared->p[split][a] * shared->p[split][k], shared->q[split][a] * shared->q[split][k],
          shared->log_p[split][a] + shared->log_p[split][k],
          shared->log_q[split][a] + shared->log_q[split][k], released);
      loss += leaf.value;
      shared->weight[split][a][b] = leaf.weight;
    }
    team.sync();
    return loss;
  }

  // The weights of the rankings that each order is a half of, along the sets that it meets.
  template <class Team>
  PAD_DEVICE void add_gradient(Team& team, int start, int count, Solution& found) const {
    const int firsts = first_orders(), lasts = last_orders(), orders = firsts + lasts;
    for (int item = team.rank(); item < count * orders; item += team.size()) {
      const int split = item / orders, k = item % orders;
      const bool in_first = k < firsts;
      double weight = 0;
      for (int other = 0; other < (in_first ? lasts : firsts); ++other)
        weight +=
            in_first ? shared->weight[split][k][other] : shared->weight[split][other][k - firsts];
      const Place place = place_of(start + split, k);
      double through[kMaxExactJsd] = {};
      walk_order(place.members, place.set, place.order, [&](int, uint32_t set) {
        PAD_UNROLL
        for (int i = 0; i < kMaxExactJsd; ++i)
          if (i < n) through[i] += shared->softmax[set][i];
      });
      PAD_UNROLL
      for (int i = 0; i < kMaxExactJsd; ++i)
        if (i < n) found.value[1 + i] += weight * ((in_first ? 1.0 : 0.0) - through[i]);
    }
    team.sync();
  }

  // As jsd_group.
  template <class Team>
  PAD_DEVICE Solution jsd(Team& team, bool with_gradient) const {
    prepare(team);
    int splits = 1;  // n choose n / 2
    for (int k = 1; k <= n / 2; ++k) splits = splits * (n - n / 2 + k) / k;
    Solution found = {};
    for (int start = 0; start < splits; start += kSplits) {
      const int count = splits - start < kSplits ? splits - start : kSplits;
      fill_halves(team, start, count);
      found.value[0] += visit_rankings(team, count);
      if (with_gradient) add_gradient(team, start, count, found);
    }
    return team.reduce(found, AddNumbers<1 + kMaxRanked>());
  }
};

}  // namespace PAD_ISA
}  // namespace pad
