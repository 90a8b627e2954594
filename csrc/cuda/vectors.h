// Sixteen bytes of stored logits at a time, and which columns of a row can be read that way.
#pragma once

#include "../stored.h"
#include "team.h"

namespace pad {
namespace PAD_ISA {

constexpr int kVectorBytes = 16;

template <class Z>
constexpr int kLanes = kVectorBytes / int(sizeof(Z));

struct alignas(kVectorBytes) Vector {
  uint32_t word[4];
};

PAD_DEVICE uint32_t stored_bits(float z) { return bits_as<uint32_t>(z); }
template <class Z>
PAD_DEVICE uint32_t stored_bits(Z z) {
  return z.bits;
}
template <class Z>
PAD_DEVICE Z from_stored_bits(uint32_t bits) {
  if constexpr (sizeof(Z) == 4)
    return bits_as<Z>(bits);
  else
    return Z{uint16_t(bits)};
}

// What lies at z, a whole vector or one number, on its way into registers.
template <int kCount, class Z>
PAD_DEVICE Vector fetch(const Z* z) {
  if constexpr (kCount > 1) {
    return *reinterpret_cast<const Vector*>(z);
  } else {
    Vector vector = {};
    vector.word[0] = stored_bits(*z);
    return vector;
  }
}

// Numbers are worked on in groups of four: those of a whole vector of half precision, for several
// streams, would not fit into registers.
constexpr int kGroup = 4;
template <class Z>
constexpr int kGroups = kLanes<Z> / kGroup;

// The numbers of one group of what was fetched, or the only number.
template <class Z, int kCount>
PAD_DEVICE void unpack(const Vector& vector, int group, float (&a)[kCount]) {
  static_assert(kCount == 1 || kCount == kGroup, "one number, or a group");
  if constexpr (sizeof(Z) == 4) {
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) a[i] = bits_as<float>(vector.word[i]);
  } else {
    // By comparison: registers have no index.
    const uint32_t words[2] = {group ? vector.word[2] : vector.word[0],
                               group ? vector.word[3] : vector.word[1]};
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i)
      a[i] = load(Z{uint16_t(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu)});
  }
}

// Two numbers in one word, the first in its lower half.
template <class Z>
PAD_DEVICE uint32_t store_pair(float low, float high) {
  return store<Z>(low).bits | uint32_t(store<Z>(high).bits) << 16;
}
#if defined(__CUDA_ARCH__)
template <>
PAD_DEVICE uint32_t store_pair<bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
PAD_DEVICE uint32_t store_pair<float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

// The inverse of unpack.
template <class Z, int kCount>
PAD_DEVICE void pack(const float (&a)[kCount], int group, Vector& vector) {
  if constexpr (sizeof(Z) == 4) {
    PAD_UNROLL
    for (int i = 0; i < kCount; ++i) vector.word[i] = bits_as<uint32_t>(a[i]);
  } else if constexpr (kCount == 1) {
    vector.word[0] = store<Z>(a[0]).bits;
  } else {
    const uint32_t low = store_pair<Z>(a[0], a[1]), high = store_pair<Z>(a[2], a[3]);
    vector.word[0] = group ? vector.word[0] : low;
    vector.word[1] = group ? vector.word[1] : high;
    vector.word[2] = group ? low : vector.word[2];
    vector.word[3] = group ? high : vector.word[3];
  }
}

// The inverse of fetch.
template <int kCount, class Z>
PAD_DEVICE void put(Z* out, const Vector& vector) {
  if constexpr (kCount > 1)
    *reinterpret_cast<Vector*>(out) = vector;
  else
    *out = from_stored_bits<Z>(vector.word[0]);
}

// Columns [begin, end) of a row: up to `head` one by one, then vectors up to `tail`, the rest one
// by one. Without pointers that are aligned alike there are no vectors.
struct Columns {
  int64_t begin, head, tail, end;
};

// `first` is where the columns from `begin` on lie in one array; `alike`, whether all the others
// that are read or written with it lie the same number of bytes before a multiple of 16.
template <class Z>
PAD_HD Columns make_columns(const Z* first, bool alike, int64_t begin, int64_t end) {
  if (!alike) return {begin, end, end, end};
  const int64_t past = int64_t(reinterpret_cast<uintptr_t>(first) % kVectorBytes / sizeof(Z));
  const int64_t lead = (kLanes<Z> - past) % kLanes<Z>;
  const int64_t head = end - begin < lead ? end : begin + lead;
  return {begin, head, head + (end - head) / kLanes<Z> * kLanes<Z>, end};
}

PAD_HD bool aligned_alike(const void* left, const void* right) {
  return (reinterpret_cast<uintptr_t>(left) - reinterpret_cast<uintptr_t>(right)) % kVectorBytes ==
         0;
}

template <class Body>
PAD_DEVICE void one_column(Body& body, int64_t col) {
  auto here = body.template fetch<1>(col);
  body.template use<1>(col, 0, here);
  body.template finish<1>(col, here);
}

template <class Z, class Body, class Fetched>
PAD_DEVICE void one_vector(Body& body, int64_t col, Fetched& here) {
  PAD_NO_UNROLL
  for (int group = 0; group < kGroups<Z>; ++group)
    body.template use<kGroup>(col + group * kGroup, group, here);
  body.template finish<kLanes<Z>>(col, here);
}

// This thread's share of the columns, from left to right within each of the three parts:
// `body.fetch<count>(col)` reads, `body.use<count>(col, group, read)` works on a group of what was
// read, `body.finish<count>(col, read)` takes its leave of it. With `kAhead` the next vector is on
// its way while one is worked on.
template <class Z, class Team, class Body>
PAD_DEVICE void over_columns(const Team& team, const Columns& columns, Body& body) {
  constexpr int lanes = kLanes<Z>;
  for (int64_t col = columns.begin + team.rank(); col < columns.head; col += team.size())
    one_column(body, col);
  const int64_t step = int64_t(team.size()) * lanes;
  int64_t col = columns.head + team.rank() * lanes;
  if constexpr (Body::kAhead) {
    if (col < columns.tail) {
      auto next = body.template fetch<lanes>(col);
      for (; col < columns.tail; col += step) {
        auto here = next;
        if (col + step < columns.tail) next = body.template fetch<lanes>(col + step);
        one_vector<Z>(body, col, here);
      }
    }
  } else {
    for (; col < columns.tail; col += step) {
      auto here = body.template fetch<lanes>(col);
      one_vector<Z>(body, col, here);
    }
  }
  for (int64_t last = columns.tail + team.rank(); last < columns.end; last += team.size())
    one_column(body, last);
}

// ---------------------------------------------------------------- listed columns

// A bit for each of some columns, in shared memory: whether it is among a row's token ids.
struct Listed {
  uint32_t* words;
  int64_t first;  // column of the first bit

  // Of columns [col, col + count), count <= 16, the lowest bit first.
  PAD_DEVICE uint32_t bits(int64_t col, int count) const {
    const int64_t bit = col - first;
    const uint64_t both = words[bit / 32] | uint64_t(words[bit / 32 + 1]) << 32;
    return uint32_t(both >> (bit % 32)) & ((1u << count) - 1);
  }
};

// Words for the bits of that many columns, and one to read beyond.
PAD_HD size_t listed_words(int64_t columns) { return size_t(columns + 31) / 32 + 1; }

// Mark the ids (k,) that fall into columns [begin, end) of a block at vocabulary `offset`.
template <class Team>
PAD_DEVICE Listed mark_listed(Team& team, uint32_t* words, const int64_t* ids, int64_t k,
                              int64_t offset, int64_t begin, int64_t end) {
  const int count = int(listed_words(end - begin));
  for (int i = team.rank(); i < count; i += team.size()) words[i] = 0;
  team.sync();
  for (int64_t i = team.rank(); i < k; i += team.size()) {
    const int64_t bit = ids[i] - offset - begin;
    if (bit >= 0 && bit < end - begin) or_into(words + bit / 32, 1u << (bit % 32));
  }
  team.sync();
  return {words, begin};
}

// The values (k,) at an id, which may be there several times; ids ascend.
PAD_DEVICE double listed_value(const int64_t* ids, const double* values, int64_t k, int64_t id) {
  int64_t low = 0, high = k;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ids[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  double sum = 0;
  for (; low < k && ids[low] == id; ++low) sum += values[low];
  return sum;
}

}  // namespace PAD_ISA
}  // namespace pad
