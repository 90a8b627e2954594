// What the loops of csrc/cpu/ need of an OpenMP runtime, on plain threads: a thread sanitizer sees
// where those begin and end, and knows nothing of the real runtime's.
#include <atomic>
#include <thread>
#include <vector>

namespace {

struct Region {
  unsigned threads;
  std::atomic<long> next;  // of a loop that hands out iterations one by one, from 0 on
};
thread_local Region* region = nullptr;
thread_local unsigned rank = 0;
thread_local long stop = 0;

}  // namespace

extern "C" {

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Region here{threads, {0}};
  const auto run = [&](unsigned number) {
    Region* const outer = region;
    const unsigned outer_rank = rank;
    region = &here, rank = number;
    work(data);
    region = outer, rank = outer_rank;
  };
  std::vector<std::thread> others;
  for (unsigned number = 1; number < threads; ++number) others.emplace_back(run, number);
  run(0);
  for (std::thread& other : others) other.join();
}

int omp_get_num_threads() { return region ? int(region->threads) : 1; }
int omp_get_thread_num() { return int(rank); }

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* end) {
  *first = region->next.fetch_add(1, std::memory_order_relaxed);
  *end = *first + 1;
  return *first < stop;
}
bool GOMP_loop_nonmonotonic_dynamic_start(long, long end, long, long, long* first, long* last) {
  stop = end;
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}
void GOMP_loop_end_nowait() {}

}  // extern "C"
