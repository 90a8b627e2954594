// Launching a kernel, and saying which one failed. Compiled without nvcc, a launch runs two blocks
// at a time, each on a few threads of the CPU.
#pragma once

#include <stdexcept>
#include <string>

#include "team.h"

#if !defined(__CUDACC__)
#include <thread>
#include <vector>
#endif

namespace pad {
namespace PAD_ISA {

// How a kernel is launched; made by host code that needs no GPU.
struct Launch {
  int64_t blocks;
  int threads;    // a multiple of kWarp
  size_t shared;  // bytes of dynamic shared memory
};

constexpr int64_t kMaxBlocks = 0x7fffffff;
// Above, a kernel has to ask: a block has 48 KiB, of which `reduce` takes up to 4.
constexpr size_t kUsualShared = 44 << 10;

inline void check_launch(const char* name, const Launch& launch) {
  if (launch.blocks > kMaxBlocks)
    throw std::length_error(std::string(name) + ": more blocks than a launch can have, " +
                            std::to_string(launch.blocks));
}

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it once more
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

template <class Kernel, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    entry(const __grid_constant__ typename Kernel::Args args) {
  extern __shared__ __align__(16) unsigned char shared[];
  Team team(shared);
  Kernel::run(team, int64_t(blockIdx.x), args);
}

template <class Kernel>
void launch(const char* name, const Launch& launch, void* queue,
            const typename Kernel::Args& args) {
  check_launch(name, launch);
  if (launch.blocks <= 0) return;
  auto* kernel = &entry<Kernel, Kernel::kThreads, Kernel::kBlocks>;
  if (launch.shared > kUsualShared)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(launch.shared)),
          name);
  kernel<<<unsigned(launch.blocks), launch.threads, launch.shared,
           static_cast<cudaStream_t>(queue)>>>(args);
  check(cudaGetLastError(), name);
}

#else

// What the threads of one block share. Nobody has written to its memory.
struct BlockOnCpu {
  BlockOnCpu(int threads, size_t bytes)
      : barrier(threads), shared((bytes + 7) / 8, ~uint64_t(0)), slots(threads * Team::kSlot) {}
  std::barrier<> barrier;
  std::vector<uint64_t> shared;  // as doubles NaN
  std::vector<unsigned char> slots;
};

// Blocks run side by side and in no order, as on a GPU: a thread sanitizer sees what two of them do
// to the same memory. Those whose number has an even number of bits go one way and the others the
// other, so that blocks of any distance meet.
template <class Kernel>
void launch(const char* name, const Launch& launch, void*, const typename Kernel::Args& args) {
  check_launch(name, launch);
  const int size = launch.threads < 3 ? launch.threads : 3;  // no power of two
  const auto thread = [&](BlockOnCpu* block, int parity, int rank) {
    Team team(rank, size, &block->barrier, block->shared.data(), block->slots.data());
    for (int64_t number = 0; number < launch.blocks; ++number) {
      if (__builtin_parityll(uint64_t(number)) != parity) continue;
      Kernel::run(team, number, args);
      team.sync();
    }
  };
  BlockOnCpu even(size, launch.shared), odd(size, launch.shared);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back(thread, &even, 0, rank);
    if (launch.blocks > 1) threads.emplace_back(thread, &odd, 1, rank);
  }
  for (std::thread& each : threads) each.join();
}

#endif

}  // namespace PAD_ISA
}  // namespace pad
