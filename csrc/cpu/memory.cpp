// Advice to the operating system about workspace.
#include <pybind11/pybind11.h>

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace {

// Huge pages for the whole pages inside a range. Only a hint: what the system says to it is
// ignored.
void advise_huge_pages(uintptr_t pointer, int64_t bytes) {
  if (bytes < 0) throw py::value_error("nbytes: expected >= 0, got " + std::to_string(bytes));
  if (!pointer || !bytes) return;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (pointer + page - 1) / page * page;
  const uintptr_t end = (pointer + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("ptr"), py::arg("nbytes"),
        "Ask for huge pages inside a range of memory (Linux; elsewhere nothing happens).");
}
