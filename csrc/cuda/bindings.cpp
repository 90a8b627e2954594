// The extension module pad_kernels._cuda: raw device pointers, shapes and a stream in, no torch
// headers. It can be imported without a driver; device_error then says what is missing.
#include "../row_bindings.h"
#include "device.h"
#include "row_pass.h"

#ifndef PAD_MODULE
#define PAD_MODULE _cuda
#endif
#ifndef PAD_CUDA_ARCHS
#define PAD_CUDA_ARCHS ""
#endif

namespace {

// See row_bindings.h.
struct Gpu {
  static constexpr const char* dtypes = "float32, bfloat16 or float16";
  static constexpr const char* where = "stream";
  static constexpr Pointer anywhere = 0;
  static bool has(pad::DType dtype) { return dtype != pad::DType::float64; }
  static void place(pad::BlockArgs& args, Pointer stream) { args.queue = at(stream); }
  static void place(pad::TransformArgs& args, Pointer stream) { args.queue = at(stream); }
  static void statistics(const pad::StatisticsArgs& args) { pad::cuda::row_statistics(args); }
  static void outcomes(const pad::OutcomeArgs& args) { pad::cuda::row_outcomes(args); }
  static void gradient(const pad::GradientArgs& args) {
    // A group of columns may lie in two tiles, and not in more.
    if (args.tile_absmax) require_count("tile", args.tile, 4);
    pad::cuda::row_gradient(args);
  }
  static void transform(const pad::TransformArgs& args) {
    // A few logits are handed over in the statistics' dtype.
    require(args.dtype == pad::DType::float32, "dtype", "float32", "another");
    pad::cuda::head_transform(args);
  }
};

}  // namespace

void bind_sequences(py::module_& m);

PYBIND11_MODULE(PAD_MODULE, m) {
  m.doc() = "Row passes and sequence kernels for GPUs, on raw pointers (tensor.data_ptr()).";
  bind_row_passes<Gpu>(m);
  bind_sequences(m);
  m.def("device_error", &pad::cuda::device_error, py::arg("device") = 0,
        "Why no kernel can run on that device; empty if they can.");
  m.attr("archs") = PAD_CUDA_ARCHS;
}
