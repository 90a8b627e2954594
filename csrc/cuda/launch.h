// Launching a kernel, and saying which one failed. Compiled without nvcc, a launch runs the blocks
// one after the other on a few threads of the CPU.
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
constexpr size_t kUsualShared = 48 << 10;  // above, a kernel has to ask

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

template <class Kernel>
void launch(const char* name, const Launch& launch, void*, const typename Kernel::Args& args) {
  check_launch(name, launch);
  const int size = launch.threads < 3 ? launch.threads : 3;  // no power of two
  std::vector<double> shared(launch.shared / sizeof(double) + 1);
  std::vector<unsigned char> slots(size * Team::kSlot);
  std::barrier<> barrier(size);
  const auto thread = [&](int rank) {
    Team team(rank, size, &barrier, shared.data(), slots.data());
    for (int64_t block = 0; block < launch.blocks; ++block) {
      Kernel::run(team, block, args);
      team.sync();
    }
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < size; ++rank) others.emplace_back(thread, rank);
  thread(0);
  for (std::thread& other : others) other.join();
}

#endif

}  // namespace PAD_ISA
}  // namespace pad
