// Kernels with a mistake each, for a sanitizer to find: what runs blocks on a CPU, and loops over
// rows, has to show it what a GPU's threads would do. The argument names the mistake.
#include <string>
#include <vector>

#include "../csrc/cuda/launch.h"

namespace {

using namespace pad::PAD_ISA;

enum class Fault { none, no_barrier, two_blocks, beyond_shared, beyond_global, shared_sum };
const char* const kNames[] = {"none",          "no_barrier",    "two_blocks",
                              "beyond_shared", "beyond_global", "shared_sum"};

struct Row {
  Fault fault;
  int64_t blocks;
  float* out;  // (blocks,)
};

struct Kernel {
  using Args = Row;
  template <class Team>
  static void run(Team& team, int64_t block, const Row& row) {
    float* shared = static_cast<float*>(team.shared());
    shared[team.rank()] = 1;
    if (row.fault != Fault::no_barrier) team.sync();
    const int next = (team.rank() + 1) % team.size();
    const float sum = team.reduce(shared[next], [](float a, float b) { return a + b; });
    if (team.rank() > 0) return;
    if (row.fault == Fault::beyond_shared) shared[4] = 0;
    const bool last = row.fault == Fault::beyond_global && block == row.blocks - 1;
    row.out[row.fault == Fault::two_blocks ? 0 : block + last] = sum;
  }
};

}  // namespace

int main(int, char** arguments) {
  int fault = 0;
  while (arguments[1] != std::string(kNames[fault])) ++fault;
  std::vector<float> out(4);
  const Row row = {Fault(fault), int64_t(out.size()), out.data()};
  launch<Kernel>("faulty", {row.blocks, kWarp, 4 * sizeof(float)}, nullptr, row);
#pragma omp parallel for num_threads(2)
  for (int i = 0; i < 4; ++i) out[row.fault == Fault::shared_sum ? 0 : i] += 1;
  return 0;
}
