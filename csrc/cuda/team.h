// A team is the threads of one block, which share memory and wait for each other.
//
// A kernel is a struct with `template <class Team> run(Team&, int64_t block, const Args&)`. It asks
// its team who it is, never the hardware, so the very same code also runs on a CPU, where a team is
// a few ordinary threads with a barrier: that is how it is tested on machines without a GPU.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../pad.h"

#if defined(__CUDACC__)
#define PAD_DEVICE __device__ __forceinline__
#else
#define PAD_DEVICE inline
#include <barrier>
#endif

namespace pad {
namespace PAD_ISA {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;  // of a block: no kernel here wants more than 512 threads

#if defined(__CUDACC__)

class Team {
 public:
  __device__ Team(void* shared) : shared_(shared) {}
  PAD_DEVICE int rank() const { return int(threadIdx.x); }
  PAD_DEVICE int size() const { return int(blockDim.x); }
  PAD_DEVICE void sync() { __syncthreads(); }
  // The block's dynamic shared memory.
  PAD_DEVICE void* shared() const { return shared_; }

  // The values of all threads joined, for every thread. The order is the same in every run, and the
  // result the same in every thread.
  template <class Value, class Join>
  PAD_DEVICE Value reduce(Value value, Join join) {
    static_assert(sizeof(Value) % sizeof(uint32_t) == 0, "shuffled word by word");
    __shared__ uint32_t slots[kMaxWarps][sizeof(Value) / sizeof(uint32_t)];
#pragma unroll 1
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      uint32_t words[sizeof(Value) / sizeof(uint32_t)];
      memcpy(words, &value, sizeof(Value));
#pragma unroll
      for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, distance);
      Value other;
      memcpy(&other, words, sizeof(Value));
      // The lower lane's value comes first, so that both lanes compute the same.
      value = rank() & distance ? join(other, value) : join(value, other);
    }
    const int warps = size() / kWarp;
    if (warps == 1) return value;
    if (rank() % kWarp == 0) memcpy(slots[rank() / kWarp], &value, sizeof(Value));
    sync();
    memcpy(&value, slots[0], sizeof(Value));
#pragma unroll 1
    for (int warp = 1; warp < warps; ++warp) {
      Value other;
      memcpy(&other, slots[warp], sizeof(Value));
      value = join(value, other);
    }
    sync();
    return value;
  }

 private:
  void* shared_;
};

// Integers of shared or global memory that several threads change; the order does not matter.
PAD_DEVICE void or_into(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }
PAD_DEVICE void raise_to(uint32_t* word, uint32_t value) { atomicMax(word, value); }

#else

class Team {
 public:
  Team(int rank, int size, std::barrier<>* barrier, void* shared, unsigned char* slots)
      : rank_(rank), size_(size), barrier_(barrier), shared_(shared), slots_(slots) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void sync() { barrier_->arrive_and_wait(); }
  void* shared() const { return shared_; }

  template <class Value, class Join>
  Value reduce(Value value, Join join) {
    static_assert(sizeof(Value) <= kSlot, "a thread's value fits into its slot");
    memcpy(slots_ + rank_ * kSlot, &value, sizeof(Value));
    sync();
    memcpy(&value, slots_, sizeof(Value));
    for (int rank = 1; rank < size_; ++rank) {
      Value other;
      memcpy(&other, slots_ + rank * kSlot, sizeof(Value));
      value = join(value, other);
    }
    sync();
    return value;
  }

  static constexpr size_t kSlot = 512;

 private:
  int rank_, size_;
  std::barrier<>* barrier_;
  void* shared_;
  unsigned char* slots_;
};

inline void or_into(uint32_t* word, uint32_t bits) {
  __atomic_fetch_or(word, bits, __ATOMIC_RELAXED);
}
inline void raise_to(uint32_t* word, uint32_t value) {
  uint32_t seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (value > seen && !__atomic_compare_exchange_n(word, &seen, value, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}

#endif

// A few numbers of each thread, added up over the team.
template <int N>
struct Numbers {
  double value[N];
};
template <int N>
struct AddNumbers {
  PAD_DEVICE Numbers<N> operator()(const Numbers<N>& left, const Numbers<N>& right) const {
    Numbers<N> sum;
    PAD_UNROLL
    for (int i = 0; i < N; ++i) sum.value[i] = left.value[i] + right.value[i];
    return sum;
  }
};

}  // namespace PAD_ISA
}  // namespace pad
