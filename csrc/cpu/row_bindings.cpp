// The CPU's row passes for Python, and the choice of instruction set.
#include "../row_bindings.h"

#include <cstdlib>

#include "row_pass.h"

#ifndef PAD_CXX_FLAGS
#define PAD_CXX_FLAGS "unknown flags"
#endif

namespace {

// ---------------------------------------------------------------- instruction set

struct RowPass {
  const char* name;
  void (*statistics)(const pad::StatisticsArgs&);
  void (*outcomes)(const pad::OutcomeArgs&);
  void (*gradient)(const pad::GradientArgs&);
  void (*walk)(const pad::WalkArgs&);
  void (*transform)(const pad::TransformArgs&);
};

// The best the machine has, not above what PAD_KERNELS_SIMD allows. Decided once.
RowPass choose() {
  const char* wish = std::getenv("PAD_KERNELS_SIMD");
  const std::string cap = wish ? wish : "";
#ifdef PAD_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && cap != "avx2" && cap != "baseline")
    return {"avx512",
            &pad::avx512::row_statistics,
            &pad::avx512::row_outcomes,
            &pad::avx512::row_gradient,
            &pad::avx512::row_walk,
            &pad::avx512::head_transform};
  if (has_avx2 && cap != "baseline")
    return {"avx2",
            &pad::avx2::row_statistics,
            &pad::avx2::row_outcomes,
            &pad::avx2::row_gradient,
            &pad::avx2::row_walk,
            &pad::avx2::head_transform};
#endif
  return {"baseline",
          &pad::portable::row_statistics,
          &pad::portable::row_outcomes,
          &pad::portable::row_gradient,
          &pad::portable::row_walk,
          &pad::portable::head_transform};
}

const RowPass& row_pass() {
  static const RowPass chosen = choose();
  return chosen;
}

std::string cxx_info() {
#if defined(__VERSION__)
  const std::string compiler = __VERSION__;
#else
  const std::string compiler = "unknown compiler";
#endif
#ifdef _OPENMP
  const std::string openmp = ", OpenMP";
#else
  const std::string openmp = ", no OpenMP";
#endif
#if defined(__clang__) || !defined(__GNUC__)
  return compiler + openmp + ", " + PAD_CXX_FLAGS;
#else
  return "GCC " + compiler + openmp + ", " + PAD_CXX_FLAGS;
#endif
}

// See row_bindings.h.
struct Cpu {
  static constexpr const char* dtypes = "float32, float64 or bfloat16";
  static constexpr const char* where = "threads";
  static constexpr Pointer anywhere = 1;
  static bool has(pad::DType dtype) { return dtype != pad::DType::float16; }
  static void place(pad::BlockArgs& args, Pointer threads) {
    require_count("threads", int64_t(threads), 1);
    args.threads = int(threads);
  }
  static void place(pad::TransformArgs&, Pointer) {}
  static void statistics(const pad::StatisticsArgs& args) { row_pass().statistics(args); }
  static void outcomes(const pad::OutcomeArgs& args) { row_pass().outcomes(args); }
  static void gradient(const pad::GradientArgs& args) { row_pass().gradient(args); }
  static void transform(const pad::TransformArgs& args) { row_pass().transform(args); }
};

// Maxima, sums, moments, `value` and the terms' divergence_slope are read and written, and so is c1
// where a moment is centred.
void row_walk(const std::string& dtype, const std::vector<Stream>& streams, int64_t rows,
              int64_t cols, const std::vector<Pointer>& maxima, const std::vector<Pointer>& sums,
              const std::vector<MomentSpec>& moments, const std::vector<Pointer>& centred,
              Pointer value, Pointer out, int64_t out_ld, const GradientTerms& terms, int64_t tile,
              Pointer tile_absmax, Pointer threads) {
  pad::WalkArgs args{};
  args.first = parse_statistics<Cpu>(dtype, streams, rows, cols, 0, maxima, sums, moments, threads);
  args.second.cols = cols;
  if (std::get<2>(terms.divergence) > 0)
    args.second = parse_outcomes<Cpu>(dtype, streams, rows, cols, maxima, sums, terms.divergence,
                                      value, terms.divergence_slope, threads);
  args.gradient = parse_gradient<Cpu>(dtype, streams, rows, cols, 0, maxima, sums, out, out_ld,
                                      terms, tile, tile_absmax, threads);
  require(centred.size() == moments.size(), "centred", "one pointer per moment",
          std::to_string(centred.size()));
  for (size_t k = 0; k < centred.size(); ++k) {
    args.centred[k] = at<double>(centred[k]);
    if (!centred[k]) continue;
    require(args.first.moment[k].weight == 0, indexed("centred", k), "a moment of stream 0",
            "one of stream " + std::to_string(args.first.moment[k].weight));
    require_pointer("c1", terms.c1, rows > 0);
  }
  args.c1 = at<double>(terms.c1);
  py::gil_scoped_release released;
  row_pass().walk(args);
}

}  // namespace

void bind_rows(py::module_& m) {
  bind_row_passes<Cpu>(m);
  m.def("row_walk", &row_walk, py::arg("dtype"), py::arg("streams"), py::arg("rows"),
        py::arg("cols"), py::arg("maxima"), py::arg("sums"), py::arg("moments"), py::arg("centred"),
        py::arg("value"), py::arg("out"), py::arg("out_ld"), py::arg("terms"), py::arg("tile") = 0,
        py::arg("tile_absmax") = 0, py::arg("threads") = 1,
        "All passes over a block of whole rows, row by row; logits may be overwritten.");
  m.def(
      "simd_level", [] { return std::string(row_pass().name); },
      "The instruction set in use: avx512, avx2 or baseline.");
  m.def("cxx_info", &cxx_info, "The compiler, and the flags that all instruction sets share.");
}
