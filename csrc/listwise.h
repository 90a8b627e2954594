// Divergences between the Plackett-Luce distributions of two reward vectors, and their gradient
// with respect to the student's rewards; host and device. One call handles one group of n
// responses, with a workspace that the caller provides, so that a CPU thread or a GPU block can run
// it.
//
// A set of responses is a bit mask. The distribution over rankings chooses i from the set R still
// to be ranked with probability softmax_R(x)_i; sources: docs/math.md.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "pad.h"

namespace pad {
namespace PAD_ISA {

constexpr int kMaxExactKl = 16;  // 2^n sets: 2.1 MiB of workspace at 16
constexpr int kMaxExactJsd = 8;  // n! rankings are evaluated, 40320 at 8, though never stored
constexpr int kMaxHalf = 4;      // the longer half of a ranking of kMaxExactJsd responses
constexpr int kMaxOrders = 24;   // kMaxHalf!

enum class Listwise { kl, reverse_kl, jsd, jsd_released };

PAD_HD int lowest_bit(uint32_t mask) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return __ffs(mask) - 1;
#elif defined(__GNUC__) || defined(__clang__)
  return __builtin_ctz(mask);
#else
  int bit = 0;
  while (!(mask >> bit & 1u)) ++bit;
  return bit;
#endif
}

PAD_HD int count_bits(uint32_t mask) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return __popc(mask);
#else
  int count = 0;
  for (; mask; mask &= mask - 1) ++count;
  return count;
#endif
}

// Softmax over every subset, without an exponential per subset: a subset keeps which member is
// largest and the sum of exp(x_i - x_top), and n^2 ratios exp(x_i - x_j) are made beforehand. So
// rewards of any size neither overflow nor lose the small sets, where every member is small.
template <class T>
struct Pools {
  T* ratio;      // (n, n): ratio[top * n + i] = exp(x_i - x_top), read only where x_i <= x_top
  T* sum;        // (2^n,)
  uint8_t* top;  // (2^n,)
};

template <class T>
PAD_HD void fill_pools(const T* x, int n, Pools<T> pools) {
  for (int top = 0; top < n; ++top)
    for (int i = 0; i < n; ++i)
      pools.ratio[top * n + i] = x[i] <= x[top] ? exp(x[i] - x[top]) : T(0);
  pools.sum[0] = T(0);
  pools.top[0] = 0;
  for (uint32_t set = 1; set < (1u << n); ++set) {
    const uint32_t rest = set & (set - 1);
    const int low = lowest_bit(set), top = pools.top[rest];
    if (rest == 0 || x[low] > x[top]) {
      pools.top[set] = static_cast<uint8_t>(low);
      pools.sum[set] = T(1) + (rest ? pools.sum[rest] * pools.ratio[low * n + top] : T(0));
    } else {
      pools.top[set] = static_cast<uint8_t>(top);
      pools.sum[set] = pools.sum[rest] + pools.ratio[top * n + low];
    }
  }
}

// The subset recursions' workspace; every array but the tops is T. See kl_words.
template <class T>
struct KlSpace {
  Pools<T> student, teacher;
  T* flow;   // (2^n,): the probability that a set is what is left to rank at some point
  T* to_go;  // (2^n,): reverse KL only, the divergence that a set still has ahead of it
};

// Elements of T that `kl_space` carves up for one group.
template <class T>
PAD_HD size_t kl_words(int n, bool reverse) {
  const size_t sets = size_t(1) << n, tops = 2 * sets;
  return 2 * size_t(n) * n + (reverse ? 4 : 3) * sets + (tops + sizeof(T) - 1) / sizeof(T);
}

template <class T>
PAD_HD KlSpace<T> kl_space(T* words, int n, bool reverse) {
  const size_t sets = size_t(1) << n, pairs = size_t(n) * n;
  KlSpace<T> space;
  space.student.ratio = words;
  space.teacher.ratio = words + pairs;
  words += 2 * pairs;
  space.student.sum = words;
  space.teacher.sum = words + sets;
  space.flow = words + 2 * sets;
  space.to_go = reverse ? words + 3 * sets : nullptr;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words + (reverse ? 4 : 3) * sets);
  space.student.top = bytes;
  space.teacher.top = bytes + sets;
  return space;
}

// KL(P_teacher || P_student): a sum over the sets R of P(R is met) KL(softmax_R(t) ||
// softmax_R(s)). `gradient` (n,) may be null. Each set's term is written with both maxima taken
// out, so that two large log-probabilities are never subtracted.
template <class T>
PAD_HD T kl_group(const T* s, const T* t, int n, KlSpace<T> space, T* gradient) {
  const uint32_t full = (1u << n) - 1;
  fill_pools(s, n, space.student);
  fill_pools(t, n, space.teacher);
  for (uint32_t set = 0; set < full; ++set) space.flow[set] = T(0);
  space.flow[full] = T(1);
  for (int i = 0; gradient && i < n; ++i) gradient[i] = T(0);
  T loss = T(0);
  // Removing a member makes the number smaller: in this order a set's flow is complete when met.
  for (uint32_t set = full; set > 0; --set) {
    const T flow = space.flow[set];
    if (flow == T(0) || (set & (set - 1)) == 0) continue;
    const int top_s = space.student.top[set], top_t = space.teacher.top[set];
    const T sum_s = space.student.sum[set], sum_t = space.teacher.sum[set];
    const T unit_s = flow / sum_s, unit_t = flow / sum_t;
    T shifted = T(0);
    for (uint32_t left = set; left; left &= left - 1) {
      const int i = lowest_bit(left);
      const T chosen = space.teacher.ratio[top_t * n + i] * unit_t;
      space.flow[set ^ (1u << i)] += chosen;
      shifted += chosen * ((t[i] - t[top_t]) - (s[i] - s[top_s]));
      if (gradient) gradient[i] += space.student.ratio[top_s * n + i] * unit_s - chosen;
    }
    loss += shifted + flow * log(sum_s / sum_t);
  }
  return loss;
}

// KL(P_student || P_teacher), by the value-to-go recursion
// U(R) = sum_i softmax_R(s)_i (log softmax_R(s)_i / softmax_R(t)_i + U(R without i)),
// and its gradient by one pass of the flow in the other direction.
template <class T>
PAD_HD T reverse_kl_group(const T* s, const T* t, int n, KlSpace<T> space, T* gradient) {
  const uint32_t full = (1u << n) - 1;
  fill_pools(s, n, space.student);
  fill_pools(t, n, space.teacher);
  space.to_go[0] = T(0);
  for (uint32_t set = 1; set <= full; ++set) {
    const int top_s = space.student.top[set], top_t = space.teacher.top[set];
    const T sum_s = space.student.sum[set];
    T value = T(0);
    for (uint32_t left = set; left; left &= left - 1) {
      const int i = lowest_bit(left);
      const T shifted = (s[i] - s[top_s]) - (t[i] - t[top_t]);
      value += space.student.ratio[top_s * n + i] * (shifted + space.to_go[set ^ (1u << i)]);
    }
    space.to_go[set] = value / sum_s + log(space.teacher.sum[set] / sum_s);
  }
  if (!gradient) return space.to_go[full];
  for (uint32_t set = 0; set < full; ++set) space.flow[set] = T(0);
  space.flow[full] = T(1);
  for (int i = 0; i < n; ++i) gradient[i] = T(0);
  for (uint32_t set = full; set > 0; --set) {
    const T flow = space.flow[set];
    if (flow == T(0) || (set & (set - 1)) == 0) continue;
    const int top_s = space.student.top[set], top_t = space.teacher.top[set];
    const T sum_s = space.student.sum[set], unit_s = flow / sum_s;
    const T centre = space.to_go[set] - log(space.teacher.sum[set] / sum_s);
    for (uint32_t left = set; left; left &= left - 1) {
      const int i = lowest_bit(left);
      const T chosen = space.student.ratio[top_s * n + i] * unit_s;
      const T shifted = (s[i] - s[top_s]) - (t[i] - t[top_t]);
      gradient[i] += chosen * (shifted + space.to_go[set ^ (1u << i)] - centre);
      space.flow[set ^ (1u << i)] += chosen;
    }
  }
  return space.to_go[full];
}

// Lexicographic successor of order[0..count); false after the last.
PAD_HD bool next_order(int* order, int count) {
  int i = count - 2;
  while (i >= 0 && order[i] > order[i + 1]) --i;
  if (i < 0) return false;
  int j = count - 1;
  while (order[j] < order[i]) --j;
  const int pivot = order[i];
  order[i] = order[j];
  order[j] = pivot;
  for (int a = i + 1, b = count - 1; a < b; ++a, --b) {
    const int swap = order[a];
    order[a] = order[b];
    order[b] = swap;
  }
  return true;
}

// What one ranking adds to the loss, and what multiplies the gradient of its log-probability.
template <class T>
struct Leaf {
  T value, weight;
};

// p, q: probabilities of the ranking under student and teacher; log_p, log_q: their logarithms,
// which stay finite where the probabilities underflow.
template <class T>
PAD_HD Leaf<T> jsd_leaf(T p, T q, T log_p, T log_q, bool released) {
  const T mean = T(0.5) * (p + q);
  if (mean == T(0)) return Leaf<T>{T(0), T(0)};
  const T log_mean = log(mean);
  if (!released) {
    const T part = T(0.5) * p * (log_p - log_mean);
    return Leaf<T>{part + T(0.5) * q * (log_q - log_mean), part};
  }
  const T gap = T(0.5) * (log_mean - log_p) + T(0.5) * (log_mean - log_q);
  return Leaf<T>{mean * gap, T(0.5) * (p * gap - mean)};
}

// The orders of one half of a ranking: probability and its logarithm under both, summed weights.
template <class T>
struct Half {
  int count;
  T p[kMaxOrders], q[kMaxOrders], log_p[kMaxOrders], log_q[kMaxOrders], weight[kMaxOrders];
};

// Visit every order of `members`, chosen one by one while `set` is what is left. With `visits` null
// the half is filled; otherwise its weights are added to the sets that each order meets.
template <class T>
PAD_HD void walk_half(const T* s, const T* t, const T* lse_s, const T* lse_t, uint32_t members,
                      uint32_t set, Half<T>* half, T* visits) {
  int order[kMaxHalf];
  int count = 0;
  for (uint32_t left = members; left; left &= left - 1) order[count++] = lowest_bit(left);
  int k = 0;
  do {
    uint32_t left = set;
    T log_p = T(0), log_q = T(0);
    for (int j = 0; j < count; ++j) {
      if (visits) {
        visits[left] += half->weight[k];
      } else {
        log_p += s[order[j]] - lse_s[left];
        log_q += t[order[j]] - lse_t[left];
      }
      left ^= 1u << order[j];
    }
    if (!visits) {
      half->log_p[k] = log_p;
      half->log_q[k] = log_q;
      half->p[k] = exp(log_p);
      half->q[k] = exp(log_q);
      half->weight[k] = T(0);
    }
    ++k;
  } while (next_order(order, count));
  half->count = k;
}

template <class T>
struct JsdSpace {
  T lse_s[1 << kMaxExactJsd], lse_t[1 << kMaxExactJsd], visits[1 << kMaxExactJsd];
  Half<T> first, last;
};

// log(sum exp) of every subset, the largest member taken out.
template <class T>
PAD_HD void subset_lse(const T* x, int n, T* lse) {
  for (uint32_t set = 1; set < (1u << n); ++set) {
    const uint32_t rest = set & (set - 1);
    const T low = x[lowest_bit(set)];
    if (rest == 0) {
      lse[set] = low;
      continue;
    }
    const T high = low > lse[rest] ? low : lse[rest];
    lse[set] = high + log1p(exp(-fabs(low - lse[rest])));
  }
}

// Jensen-Shannon divergence over the n! rankings. A ranking is an order of its first half and an
// order of the second; the log-probability of either depends only on which responses are in which
// half. So for each of the (n choose n/2) ways to split, the orders of both halves meet in a small
// table: one logarithm a ranking, and no array larger than kMaxOrders beside the 2^n sets. A
// ranking's weight reaches the gradient as weight * (1 - sum over the sets R that it meets of
// softmax_R(s)), so it is enough to add up the weights that pass through each set.
template <class T>
PAD_HD T jsd_group(const T* s, const T* t, int n, JsdSpace<T>* space, bool released, T* gradient) {
  const uint32_t full = (1u << n) - 1;
  subset_lse(s, n, space->lse_s);
  subset_lse(t, n, space->lse_t);
  for (uint32_t set = 0; set <= full; ++set) space->visits[set] = T(0);
  Half<T>& first = space->first;
  Half<T>& last = space->last;
  T loss = T(0);
  for (uint32_t set = 1; set <= full; ++set) {
    if (count_bits(set) != n / 2) continue;
    walk_half(s, t, space->lse_s, space->lse_t, full ^ set, full, &first, static_cast<T*>(nullptr));
    walk_half(s, t, space->lse_s, space->lse_t, set, set, &last, static_cast<T*>(nullptr));
    for (int a = 0; a < first.count; ++a) {
      for (int b = 0; b < last.count; ++b) {
        const Leaf<T> leaf =
            jsd_leaf(first.p[a] * last.p[b], first.q[a] * last.q[b], first.log_p[a] + last.log_p[b],
                     first.log_q[a] + last.log_q[b], released);
        loss += leaf.value;
        first.weight[a] += leaf.weight;
        last.weight[b] += leaf.weight;
      }
    }
    if (!gradient) continue;
    walk_half(s, t, space->lse_s, space->lse_t, full ^ set, full, &first, space->visits);
    walk_half(s, t, space->lse_s, space->lse_t, set, set, &last, space->visits);
  }
  for (int i = 0; gradient && i < n; ++i) {
    T through = T(0);
    for (uint32_t set = 1; set <= full; ++set)
      if (set >> i & 1u) through += space->visits[set] * exp(s[i] - space->lse_s[set]);
    gradient[i] = space->visits[full] - through;
  }
  return loss;
}

// Elements of T of workspace for one group of n responses.
template <class T>
PAD_HD size_t listwise_words(Listwise kind, int n) {
  if (kind == Listwise::kl || kind == Listwise::reverse_kl)
    return kl_words<T>(n, kind == Listwise::reverse_kl);
  return sizeof(JsdSpace<T>) / sizeof(T);
}

// Loss of one group and, unless null, its gradient (n,). `words` holds listwise_words elements.
template <class T>
PAD_HD T listwise_group(Listwise kind, const T* s, const T* t, int n, T* words, T* gradient) {
  switch (kind) {
    case Listwise::kl:
      return kl_group(s, t, n, kl_space(words, n, false), gradient);
    case Listwise::reverse_kl:
      return reverse_kl_group(s, t, n, kl_space(words, n, true), gradient);
    default:
      return jsd_group(s, t, n, reinterpret_cast<JsdSpace<T>*>(words),
                       kind == Listwise::jsd_released, gradient);
  }
}

}  // namespace PAD_ISA
}  // namespace pad
