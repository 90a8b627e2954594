// Listwise preference losses on the CPU: groups over threads, in double precision whatever the
// inputs are. The arithmetic is a few megaflops, and float64 costs nothing that a training step
// would see.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../listwise.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using pad::PAD_ISA::Listwise;

Listwise parse_kind(const std::string& kind) {
  if (kind == "kl") return Listwise::kl;
  if (kind == "reverse_kl") return Listwise::reverse_kl;
  if (kind == "jsd") return Listwise::jsd;
  if (kind == "jsd_released") return Listwise::jsd_released;
  throw std::invalid_argument("kind: expected kl, reverse_kl, jsd or jsd_released, got " + kind);
}

size_t words_per_thread(const std::string& kind, int n) {
  const Listwise which = parse_kind(kind);
  const bool sets = which == Listwise::kl || which == Listwise::reverse_kl;
  const int limit = sets ? pad::PAD_ISA::kMaxExactKl : pad::PAD_ISA::kMaxExactJsd;
  if (n < 1 || n > limit)
    throw std::invalid_argument("n: expected 1 to " + std::to_string(limit) + ", got " +
                                std::to_string(n));
  return pad::PAD_ISA::listwise_words<double>(which, n);
}

// student, teacher (rows, n) and counts (rows,): the first counts[r] entries of a row are its
// responses. Writes loss (rows,) and, unless 0, gradient (rows, n), zero beyond counts[r].
// workspace: threads * listwise_words(kind, n) doubles.
void listwise(const std::string& kind, uintptr_t student, uintptr_t teacher, uintptr_t counts,
              int64_t rows, int n, uintptr_t loss, uintptr_t gradient, uintptr_t workspace,
              int threads) {
  const Listwise which = parse_kind(kind);
  const size_t words = words_per_thread(kind, n);
  const auto* s = reinterpret_cast<const double*>(student);
  const auto* t = reinterpret_cast<const double*>(teacher);
  const auto* count = reinterpret_cast<const int64_t*>(counts);
  auto* out = reinterpret_cast<double*>(loss);
  auto* grad = reinterpret_cast<double*>(gradient);
  auto* space = reinterpret_cast<double*>(workspace);
  for (int64_t r = 0; r < rows; ++r)
    if (count[r] < 0 || count[r] > n) throw std::invalid_argument("counts: expected 0 to n");
  // Responses of a group take work in 2^n: hand groups out one by one.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t r = 0; r < rows; ++r) {
#ifdef _OPENMP
    double* mine = space + words * static_cast<size_t>(omp_get_thread_num());
#else
    double* mine = space;
#endif
    double* g = grad ? grad + r * n : nullptr;
    for (int i = 0; g && i < n; ++i) g[i] = 0.0;
    const int m = static_cast<int>(count[r]);
    out[r] = m < 2 ? 0.0 : pad::PAD_ISA::listwise_group(which, s + r * n, t + r * n, m, mine, g);
  }
}

}  // namespace

void bind_listwise(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("listwise", &listwise, py::arg("kind"), py::arg("student"), py::arg("teacher"),
        py::arg("counts"), py::arg("rows"), py::arg("n"), py::arg("loss"), py::arg("gradient"),
        py::arg("workspace"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("listwise_words", &words_per_thread, py::arg("kind"), py::arg("n"),
        "Doubles of workspace that one thread needs.");
}
