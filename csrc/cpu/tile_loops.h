// Loops over one tile of a row: reading stored logits, exponentials, sums, chain factors. Each is
// one plain loop that the compiler vectorises. For row_pass.cpp alone, once per instruction set.
#pragma once

#include "../stored.h"
#include "row_pass.h"

namespace pad {
namespace PAD_ISA {
namespace {

// 2048 floats are 8 KiB: three streams, a chain factor and two temporaries fit beside the logits.
constexpr int kTile = 2048;

// Logits that are read as they are need no room beside them. A longer tile halves what the end of
// each one costs, which is 32 additions in a row and a merge.
template <class Z>
constexpr int kRawTile = 16384 / sizeof(Z);

// A row is summed in segments whose bounds depend on its length alone, so the bits of a result do
// not depend on how many threads shared the work.
constexpr int64_t kSegment = 16384;
constexpr int64_t kMaxSegments = 64;

int64_t segment_width(int64_t cols) {
  const int64_t even = (cols + kMaxSegments - 1) / kMaxSegments;
  const int64_t width = (even + kTile - 1) / kTile * kTile;
  return width > kSegment ? width : kSegment;
}

int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

// Signed integers in the order of the numbers, so that a maximum needs no floating-point
// comparison: compilers vectorise an integer maximum without being allowed to forget NaN.
// Every map is its own inverse.
PAD_HD int32_t ordered(float z) {
  const int32_t bits = bits_as<int32_t>(z);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
PAD_HD int64_t ordered(double z) {
  const int64_t bits = bits_as<int64_t>(z);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffffll);
}
PAD_HD int16_t ordered(bfloat16 z) {
  const int16_t bits = bits_as<int16_t>(z.bits);
  return int16_t(bits ^ ((bits >> 15) & 0x7fff));
}
PAD_HD float number(int32_t key) { return bits_as<float>(key ^ ((key >> 31) & 0x7fffffff)); }
PAD_HD double number(int64_t key) {
  return bits_as<double>(key ^ ((key >> 63) & 0x7fffffffffffffffll));
}
PAD_HD float number(int16_t key) { return load(bfloat16{uint16_t(key ^ ((key >> 15) & 0x7fff))}); }

// ---------------------------------------------------------------- loops over one tile

// Ask for the next tile while this one is worked on: the hardware's own prefetching stops at every
// page, and a tile of bfloat16 is one. `kWrite`: it will be written to.
template <bool kWrite, class Z>
void prefetch_tile(const Z* z, int64_t n) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(Z))) __builtin_prefetch(z + i, kWrite, 3);
#else
  (void)z, (void)n;
#endif
}

// The largest entry; a NaN with its sign bit set may be missed, the sum never misses one.
template <class Z>
auto tile_maximum(const Z* z, int64_t n) -> decltype(load(*z)) {
  auto key = ordered(z[0]);
  PAD_SIMD_MAX(key)
  for (int64_t i = 1; i < n; ++i) {
    const auto other = ordered(z[i]);
    key = other > key ? other : key;
  }
  return number(key);
}

// One stream's tile behind its head transform: a, and da/dz if `chain` is given.
template <class T, class Z>
void transform_tile(const Z* z, const T* bias, const Head<T>& head, int64_t n, T* a, T* chain) {
  if (bias) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) a[i] = load(z[i]) + bias[i];
  } else {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) a[i] = load(z[i]);
  }
  if (head.identity) return;
  const T scale = head.scale, softcap = head.softcap, temperature = head.temperature;
  const T slope = head.slope;
  if (scale != T(1)) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) a[i] *= scale;
  }
  if (chain) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const TanhSlope<T> cap = tanh_of(a[i] / softcap);
      a[i] = softcap * cap.value;
      chain[i] = slope * cap.slope;
    }
  } else if (head.capped) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) a[i] = softcap * tanh_of(a[i] / softcap).value;
  }
  if (temperature != T(1)) {
    PAD_SIMD
    for (int64_t i = 0; i < n; ++i) a[i] /= temperature;
  }
}

// A sum of floats is cut after so many: next to a sum of 1 a long row of terms below 6e-8 would be
// lost one by one, which at 8192 of them cost 4e-6. Chunks add up in double.
constexpr int64_t kChunk = 512;

// The sum over chunks [i, i + m) of [0, n) of what `chunk(i, m)` returns.
template <class Chunk>
inline double over_chunks(int64_t n, Chunk chunk) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kChunk) total += chunk(i, smaller(kChunk, n - i));
  return total;
}

template <class Z, class T>
T chunk_sum(const Z* z, int64_t n, T shift) {
  T sum = 0;
  PAD_SIMD_SUM(sum)
  for (int64_t i = 0; i < n; ++i) sum += exp_below(load(z[i]) - shift);
  return sum;
}
template <class Z, class T>
double tile_sum(const Z* z, int64_t n, T shift) {
  return over_chunks(n, [&](int64_t i, int64_t m) { return chunk_sum(z + i, m, shift); });
}

// The sum, and sum exp(x) x with x = a - max: the moment of one stream with itself.
template <class Z, class T>
T chunk_sum_and_moment(const Z* z, int64_t n, T shift, T* moment_out) {
  T sum = 0, moment = 0;
  PAD_SIMD_SUM(sum, moment)
  for (int64_t i = 0; i < n; ++i) {
    const T x = load(z[i]) - shift;
    const T exp = exp_below(x);
    sum += exp;
    moment += weighted(exp, x);
  }
  *moment_out = moment;
  return sum;
}
template <class Z, class T>
double tile_sum_and_moment(const Z* z, int64_t n, T shift, double* moment) {
  *moment = 0;
  return over_chunks(n, [&](int64_t i, int64_t m) {
    T part;
    const T sum = chunk_sum_and_moment(z + i, m, shift, &part);
    *moment += part;
    return sum;
  });
}

// As chunk_sum, keeping the exponentials.
template <class T>
T chunk_exponentials(const T* a, int64_t n, T shift, T* exps) {
  T sum = 0;
  PAD_SIMD_SUM(sum)
  for (int64_t i = 0; i < n; ++i) {
    exps[i] = exp_below(a[i] - shift);
    sum += exps[i];
  }
  return sum;
}

// The same, and the sum less that of `base`.
template <class T>
T chunk_exponentials_over(const T* a, const T* base, int64_t n, T shift, T* exps, T* over_out) {
  T sum = 0, over = 0;
  PAD_SIMD_SUM(sum, over)
  for (int64_t i = 0; i < n; ++i) {
    exps[i] = exp_below(a[i] - shift);
    sum += exps[i];
    over += exps[i] - base[i];
  }
  *over_out = over;
  return sum;
}

// The sum of a stream from its own and from that of `base` and their difference, whichever is
// exact: the sums of two nearly equal streams agree to seven digits, and a divergence is made of
// the rest.
inline double refined_sum(double sum, double base, double difference) {
  const double size = difference < 0 ? -difference : difference;
  return size < 0.25 * sum ? base + difference : sum;
}

// The exponentials of a tile and their sum. `base` are those of another stream, whose sum is
// `base_sum`, or null.
template <class T>
double tile_exponentials(const T* a, int64_t n, T shift, T* exps, const T* base, double base_sum) {
  if (!base)
    return over_chunks(
        n, [&](int64_t i, int64_t m) { return chunk_exponentials(a + i, m, shift, exps + i); });
  double difference = 0;
  const double sum = over_chunks(n, [&](int64_t i, int64_t m) {
    T over;
    const T part = chunk_exponentials_over(a + i, base + i, m, shift, exps + i, &over);
    difference += over;
    return part;
  });
  return refined_sum(sum, base_sum, difference);
}

// sum exps (x_over - x_under), with x = a - shift and exps those of any stream.
template <class T>
T chunk_log_ratio(const T* exps, const T* over, T shift_over, const T* under, T shift_under,
                  int64_t n) {
  T sum = 0;
  PAD_SIMD_SUM(sum)
  for (int64_t i = 0; i < n; ++i)
    sum += weighted(exps[i], (over[i] - shift_over) - (under[i] - shift_under));
  return sum;
}
template <class T>
double tile_log_ratio(const T* exps, const T* over, T shift_over, const T* under, T shift_under,
                      int64_t n) {
  return over_chunks(n, [&](int64_t i, int64_t m) {
    return chunk_log_ratio(exps + i, over + i, shift_over, under + i, shift_under, m);
  });
}

// The same plus the sum of rest - exps, where exps are those of `over` and rest those of `under`:
// every summand is then positive, and small where the two are nearly equal.
template <class T>
T chunk_balanced(const T* exps, const T* rest, const T* over, T shift_over, const T* under,
                 T shift_under, int64_t n) {
  T sum = 0;
  PAD_SIMD_SUM(sum)
  for (int64_t i = 0; i < n; ++i)
    sum +=
        (rest[i] - exps[i]) + weighted(exps[i], (over[i] - shift_over) - (under[i] - shift_under));
  return sum;
}
// `sum` is that of exps, `gap` what the sum of rest has more.
template <class T>
double tile_own_log_ratio(const T* exps, const T* rest, const T* over, T shift_over, const T* under,
                          T shift_under, double sum, double gap, int64_t n) {
  const double size = gap < 0 ? -gap : gap;
  if (!(size < 0.25 * sum)) return tile_log_ratio(exps, over, shift_over, under, shift_under, n);
  const double balanced = over_chunks(n, [&](int64_t i, int64_t m) {
    return chunk_balanced(exps + i, rest + i, over + i, shift_over, under + i, shift_under, m);
  });
  return balanced - gap;
}

// All of the above for two streams that are read as they are stored, in one loop: the way of a
// divergence without soft caps, where loads and stores of temporaries would take longer than the
// arithmetic. `kRatio`: the mean log-ratio is wanted, not only the sums. `kKeep`: the exponentials
// are, too.
struct PairSums {
  double own = 0, other = 0;  // sums of exponentials
  double over = 0;            // other - own, added up by itself
  double ratio = 0;           // sum exp(x_own) (x_own - x_other)
  double balanced = 0;        // ratio + over, every summand positive
};
template <bool kRatio, bool kKeep, class Z, class T>
void chunk_pair(const Z* own_z, const Z* other_z, int64_t n, T own_shift, T other_shift,
                T* own_exps, T* other_exps, PairSums* sums) {
  T own = 0, other = 0, over = 0, ratio = 0, balanced = 0;
  PAD_SIMD_SUM(own, other, over, ratio, balanced)
  for (int64_t i = 0; i < n; ++i) {
    const T x = load(own_z[i]) - own_shift, y = load(other_z[i]) - other_shift;
    const T e = exp_below(x), f = exp_below(y);
    if (kKeep) {
      own_exps[i] = e;
      other_exps[i] = f;
    }
    const T more = f - e;
    own += e;
    other += f;
    over += more;
    if (kRatio) {
      const T mean = weighted(e, x - y);
      ratio += mean;
      balanced += more + mean;
    }
  }
  sums->own += own;
  sums->other += other;
  sums->over += over;
  sums->ratio += ratio;
  sums->balanced += balanced;
}
template <bool kRatio, bool kKeep, class Z, class T>
PairSums tile_pair(const Z* own, const Z* other, int64_t n, T own_shift, T other_shift, T* own_exps,
                   T* other_exps) {
  PairSums sums;
  for (int64_t i = 0; i < n; i += kChunk)
    chunk_pair<kRatio, kKeep>(own + i, other + i, smaller(kChunk, n - i), own_shift, other_shift,
                              kKeep ? own_exps + i : nullptr, kKeep ? other_exps + i : nullptr,
                              &sums);
  return sums;
}

// Likewise for three: the mean log-ratio of the two others under the first.
struct TripleSums {
  double own = 0, over = 0, under = 0;  // sums of exponentials
  double gap = 0;                       // over - under, added up by itself
  double ratio = 0;                     // sum exp(x_own) (x_over - x_under)
};
template <class Z, class T>
void chunk_triple(const Z* const* z, int64_t n, const T* shifts, TripleSums* sums) {
  const Z *own_z = z[0], *over_z = z[1], *under_z = z[2];
  const T own_shift = shifts[0], over_shift = shifts[1], under_shift = shifts[2];
  T own = 0, over = 0, under = 0, gap = 0, ratio = 0;
  PAD_SIMD_SUM(own, over, under, gap, ratio)
  for (int64_t i = 0; i < n; ++i) {
    const T x = load(over_z[i]) - over_shift, y = load(under_z[i]) - under_shift;
    const T e = exp_below(load(own_z[i]) - own_shift), f = exp_below(x), g = exp_below(y);
    own += e;
    over += f;
    under += g;
    gap += f - g;
    ratio += weighted(e, x - y);
  }
  sums->own += own;
  sums->over += over;
  sums->under += under;
  sums->gap += gap;
  sums->ratio += ratio;
}
template <class Z, class T>
TripleSums tile_triple(const Z* const* z, int64_t n, const T* shifts) {
  TripleSums sums;
  for (int64_t i = 0; i < n; i += kChunk) {
    const Z* at[3] = {z[0] + i, z[1] + i, z[2] + i};
    chunk_triple(at, smaller(kChunk, n - i), shifts, &sums);
  }
  return sums;
}

template <class T>
T chunk_weighted_sum(const T* exps, const T* factors, int64_t n) {
  T sum = 0;
  PAD_SIMD_SUM(sum)
  for (int64_t i = 0; i < n; ++i) sum += weighted(exps[i], factors[i]);
  return sum;
}
template <class T>
double tile_weighted_sum(const T* exps, const T* factors, int64_t n) {
  return over_chunks(
      n, [&](int64_t i, int64_t m) { return chunk_weighted_sum(exps + i, factors + i, m); });
}

template <class Z>
auto chunk_total(const Z* z, int64_t n) -> decltype(load(*z)) {
  decltype(load(*z)) total = 0;
  PAD_SIMD_SUM(total)
  for (int64_t i = 0; i < n; ++i) total += load(z[i]);
  return total;
}
template <class Z>
double tile_total(const Z* z, int64_t n) {
  return over_chunks(n, [&](int64_t i, int64_t m) { return chunk_total(z + i, m); });
}

template <class T>
void fill_tile(T* to, int64_t n, T value) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// to += coefficient * (a - shift)
template <class T>
void add_shifted(T* to, const T* a, int64_t n, T coefficient, T shift) {
  PAD_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] += coefficient * (a[i] - shift);
}

}  // namespace
}  // namespace PAD_ISA
}  // namespace pad
