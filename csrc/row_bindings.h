// Python's side of the row passes, for the CPU's module and the GPU's: arguments into plain
// structs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "row_args.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;
using Stream = std::tuple<Pointer, int64_t, Pointer, double, double, double>;
using MomentSpec = std::tuple<int, std::vector<double>, Pointer>;
// Token ids (rows, k), ascending in a row, and k. A null pointer stands for none.
using Ids = std::tuple<Pointer, int64_t>;
// Kind, alpha and the teacher's stream; stream 0 for no divergence.
using DivergenceSpec = std::tuple<std::string, double, int>;

void require(bool held, const std::string& name, const std::string& expected,
             const std::string& got) {
  if (!held) throw py::value_error(name + ": expected " + expected + ", got " + got);
}

void require_count(const std::string& name, int64_t value, int64_t least) {
  require(value >= least, name, ">= " + std::to_string(least), std::to_string(value));
}

void require_pointer(const std::string& name, Pointer pointer, bool needed) {
  require(pointer || !needed, name, "a pointer", "null");
}

template <class T = void>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

std::string indexed(const char* name, size_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

// ---------------------------------------------------------------- arguments

// A target is where the passes run: `Target::has` says which dtypes it takes, `Target::where` what
// to call the number of threads or the stream, `Target::place` puts it into the arguments, and the
// rest are the passes themselves.
template <class Target>
pad::DType parse_dtype(const std::string& name) {
  for (const auto& [known, dtype] :
       {std::pair("float32", pad::DType::float32), std::pair("float64", pad::DType::float64),
        std::pair("bfloat16", pad::DType::bfloat16), std::pair("float16", pad::DType::float16)})
    if (name == known && Target::has(dtype)) return dtype;
  throw py::value_error(std::string("dtype: expected ") + Target::dtypes + ", got " + name);
}

// What all passes have in common: dtype, shape, streams, where to run.
template <class Target>
void parse_block(pad::BlockArgs& args, const std::string& dtype, const std::vector<Stream>& streams,
                 int64_t rows, int64_t cols, int64_t vocab_offset, Pointer where) {
  args.dtype = parse_dtype<Target>(dtype);
  require_count("rows", rows, 0);
  require_count("cols", cols, 0);
  Target::place(args, where);
  const bool some = rows > 0 && cols > 0;
  require(!streams.empty() && streams.size() <= pad::kMaxStreams, "streams",
          "1 to " + std::to_string(pad::kMaxStreams), std::to_string(streams.size()));
  args.streams = int(streams.size());
  for (size_t j = 0; j < streams.size(); ++j) {
    const auto& [logits, ld, bias, scale, softcap, temperature] = streams[j];
    const std::string name = indexed("streams", j);
    // Rows that do not use a teacher pass no logits of it.
    require_pointer(name + " logits", logits, some && j == 0);
    require(rows <= 1 || !logits || ld >= cols, name + " ld", ">= cols", std::to_string(ld));
    require(std::isfinite(scale), name + " scale", "a finite number", std::to_string(scale));
    require(std::isfinite(softcap) && softcap >= 0, name + " softcap", "a finite number >= 0",
            std::to_string(softcap));
    require(std::isfinite(temperature) && temperature > 0, name + " temperature",
            "a finite number > 0", std::to_string(temperature));
    args.stream[j] = {at(logits), ld, at(bias), scale, softcap, temperature};
  }
  args.rows = rows;
  args.cols = cols;
  args.vocab_offset = vocab_offset;
}

// That a stream, if the rows use it at all, is there.
void require_stream(const pad::BlockArgs& args, const std::string& name, int stream) {
  require(stream >= 0 && stream < args.streams, name, "a stream's number", std::to_string(stream));
  const bool some = args.rows > 0 && args.cols > 0;
  require(args.stream[stream].logits || !some, name, "a stream with logits",
          std::to_string(stream));
}

// One pointer per stream. `absent` allows null pointers, and no list at all.
template <class P>
void parse_columns(P (&to)[pad::kMaxStreams], const char* name, const std::vector<Pointer>& from,
                   size_t streams, int64_t rows, bool absent) {
  for (P& pointer : to) pointer = nullptr;
  if (absent && from.empty()) return;
  require(from.size() == streams, name, "one pointer per stream", std::to_string(from.size()));
  for (size_t j = 0; j < streams; ++j) {
    require_pointer(indexed(name, j), from[j], !absent && rows > 0);
    to[j] = at<std::remove_pointer_t<P>>(from[j]);
  }
}

pad::IdsArgs parse_ids(const char* name, const Ids& from) {
  require_count(std::string(name) + " k", std::get<1>(from), 0);
  return {at<int64_t>(std::get<0>(from)), std::get<1>(from)};
}

pad::DivergenceArgs parse_divergence(const pad::BlockArgs& args, const DivergenceSpec& from) {
  const auto& [kind, alpha, teacher] = from;
  pad::DivergenceArgs found{pad::DivergenceKind::jsd, alpha, teacher};
  if (teacher == 0) return found;
  require_stream(args, "divergence teacher", teacher);
  if (kind == "jsd")
    found.kind = pad::DivergenceKind::jsd;
  else if (kind == "skew_forward_kl")
    found.kind = pad::DivergenceKind::skew_forward_kl;
  else if (kind == "skew_reverse_kl")
    found.kind = pad::DivergenceKind::skew_reverse_kl;
  else if (kind == "tvd")
    found.kind = pad::DivergenceKind::tvd;
  else
    throw py::value_error("divergence: expected a kind of two sweeps, got " + kind);
  const bool mixes = found.kind != pad::DivergenceKind::tvd;
  require(!mixes || (alpha > 0 && alpha < 1), "alpha", "a number in (0, 1)", std::to_string(alpha));
  return found;
}

// Normalisers and moments of a block.
template <class Target>
pad::StatisticsArgs parse_statistics(const std::string& dtype, const std::vector<Stream>& streams,
                                     int64_t rows, int64_t cols, int64_t vocab_offset,
                                     const std::vector<Pointer>& maxima,
                                     const std::vector<Pointer>& sums,
                                     const std::vector<MomentSpec>& moments, Pointer where) {
  pad::StatisticsArgs args{};
  parse_block<Target>(args, dtype, streams, rows, cols, vocab_offset, where);
  parse_columns(args.maximum, "maxima", maxima, streams.size(), rows, false);
  parse_columns(args.sum, "sums", sums, streams.size(), rows, false);
  require(moments.size() <= pad::kMaxMoments, "moments",
          "at most " + std::to_string(pad::kMaxMoments), std::to_string(moments.size()));
  args.moments = int(moments.size());
  for (size_t k = 0; k < moments.size(); ++k) {
    const auto& [weight, coefficients, value] = moments[k];
    const std::string name = indexed("moments", k);
    require_stream(args, name + " weight stream", weight);
    require(coefficients.size() == streams.size(), name + " coefficients", "one per stream",
            std::to_string(coefficients.size()));
    require_pointer(name, value, rows > 0);
    args.moment[k].weight = weight;
    for (size_t j = 0; j < coefficients.size(); ++j) {
      if (coefficients[j] != 0) require_stream(args, name + " coefficients", int(j));
      args.moment[k].coefficients[j] = coefficients[j];
    }
    args.moment[k].value = at<double>(value);
  }
  return args;
}

template <class Target>
void row_statistics(const std::string& dtype, const std::vector<Stream>& streams, int64_t rows,
                    int64_t cols, int64_t vocab_offset, const std::vector<Pointer>& maxima,
                    const std::vector<Pointer>& sums, const std::vector<MomentSpec>& moments,
                    Pointer total, Pointer argmax, Pointer argmax_value, const Ids& tail,
                    Pointer tail_maximum, Pointer tail_sum, Pointer where) {
  pad::StatisticsArgs args = parse_statistics<Target>(dtype, streams, rows, cols, vocab_offset,
                                                      maxima, sums, moments, where);
  require_pointer("argmax_value", argmax_value, argmax && rows > 0);
  args.total = at<double>(total);
  args.argmax = at<int64_t>(argmax);
  args.best = at<double>(argmax_value);
  args.tail = parse_ids("tail", tail);
  require_pointer("tail_maximum", tail_maximum, tail_sum && rows > 0);
  args.tail_maximum = at<double>(tail_maximum);
  args.tail_sum = at<double>(tail_sum);
  py::gil_scoped_release released;
  Target::statistics(args);
}

template <class Target>
pad::OutcomeArgs parse_outcomes(const std::string& dtype, const std::vector<Stream>& streams,
                                int64_t rows, int64_t cols, const std::vector<Pointer>& maxima,
                                const std::vector<Pointer>& sums, const DivergenceSpec& divergence,
                                Pointer value, Pointer slope, Pointer where) {
  pad::OutcomeArgs args{};
  parse_block<Target>(args, dtype, streams, rows, cols, 0, where);
  parse_columns(args.maximum, "maxima", maxima, streams.size(), rows, false);
  parse_columns(args.sum, "sums", sums, streams.size(), rows, false);
  args.divergence = parse_divergence(args, divergence);
  require(args.divergence.teacher > 0, "divergence teacher", "a stream above 0", "0");
  require_pointer("value", value, rows > 0);
  require_pointer("slope", slope, rows > 0);
  args.value = at<double>(value);
  args.slope = at<double>(slope);
  return args;
}

template <class Target>
void row_outcomes(const std::string& dtype, const std::vector<Stream>& streams, int64_t rows,
                  int64_t cols, const std::vector<Pointer>& maxima,
                  const std::vector<Pointer>& sums, const DivergenceSpec& divergence, Pointer value,
                  Pointer slope, Pointer where) {
  const pad::OutcomeArgs args = parse_outcomes<Target>(dtype, streams, rows, cols, maxima, sums,
                                                       divergence, value, slope, where);
  py::gil_scoped_release released;
  Target::outcomes(args);
}

// A gradient's coefficients, see GradientArgs.
struct GradientTerms {
  Pointer c0 = 0, c1 = 0;
  std::vector<Pointer> q, p;
  Ids sparse{0, 0};
  Pointer sparse_values = 0;
  Ids outside{0, 0};
  Pointer outside_value = 0, outside_maximum = 0;
  DivergenceSpec divergence{"", 0.0, 0};
  Pointer divergence_weight = 0, divergence_slope = 0;
};

template <class Target>
pad::GradientArgs parse_gradient(const std::string& dtype, const std::vector<Stream>& streams,
                                 int64_t rows, int64_t cols, int64_t vocab_offset,
                                 const std::vector<Pointer>& maxima,
                                 const std::vector<Pointer>& sums, Pointer out, int64_t out_ld,
                                 const GradientTerms& terms, int64_t tile, Pointer tile_absmax,
                                 Pointer where) {
  pad::GradientArgs args{};
  parse_block<Target>(args, dtype, streams, rows, cols, vocab_offset, where);
  parse_columns(args.maximum, "maxima", maxima, streams.size(), rows, false);
  parse_columns(args.sum, "sums", sums, streams.size(), rows, false);
  parse_columns(args.q, "q", terms.q, streams.size(), rows, true);
  parse_columns(args.p, "p", terms.p, streams.size(), rows, true);
  for (int j = 0; j < args.streams; ++j)
    if (args.q[j] || args.p[j]) require_stream(args, indexed("q, p", size_t(j)), j);
  require_pointer("out", out, rows > 0 && cols > 0);
  require(rows <= 1 || out_ld >= cols, "out_ld", ">= cols", std::to_string(out_ld));
  args.sparse = parse_ids("sparse", terms.sparse);
  require_pointer("sparse_ids", std::get<0>(terms.sparse), args.sparse.k > 0 && rows > 0);
  require_pointer("sparse_values", terms.sparse_values, args.sparse.k > 0 && rows > 0);
  args.outside = parse_ids("outside", terms.outside);
  require_pointer("outside_ids", std::get<0>(terms.outside), terms.outside_value && rows > 0);
  args.divergence = parse_divergence(args, terms.divergence);
  require_pointer("divergence_weight", terms.divergence_weight,
                  args.divergence.teacher && rows > 0);
  require_pointer("divergence_slope", terms.divergence_slope, args.divergence.teacher && rows > 0);
  if (tile_absmax) require_count("tile", tile, 1);
  args.out = at(out);
  args.out_ld = out_ld;
  args.c0 = at<double>(terms.c0);
  args.c1 = at<double>(terms.c1);
  args.sparse_values = at<double>(terms.sparse_values);
  args.outside_value = at<double>(terms.outside_value);
  require_pointer("outside_maximum", terms.outside_maximum, terms.outside_value && rows > 0);
  args.outside_maximum = at<double>(terms.outside_maximum);
  args.divergence_weight = at<double>(terms.divergence_weight);
  args.divergence_slope = at<double>(terms.divergence_slope);
  args.tile = tile;
  args.tile_absmax = at<float>(tile_absmax);
  return args;
}

template <class Target>
void row_gradient(const std::string& dtype, const std::vector<Stream>& streams, int64_t rows,
                  int64_t cols, int64_t vocab_offset, const std::vector<Pointer>& maxima,
                  const std::vector<Pointer>& sums, Pointer out, int64_t out_ld,
                  const GradientTerms& terms, int64_t tile, Pointer tile_absmax, Pointer where) {
  const pad::GradientArgs args =
      parse_gradient<Target>(dtype, streams, rows, cols, vocab_offset, maxima, sums, out, out_ld,
                             terms, tile, tile_absmax, where);
  py::gil_scoped_release released;
  Target::gradient(args);
}

template <class Target>
void head_transform(const std::string& dtype, Pointer values, int64_t count, double scale,
                    double softcap, double temperature, Pointer where) {
  pad::TransformArgs args{
      parse_dtype<Target>(dtype), at(values), count, scale, softcap, temperature, nullptr};
  Target::place(args, where);
  require_count("count", count, 0);
  require_pointer("values", values, count > 0);
  Target::transform(args);
}

template <class Target>
void bind_row_passes(py::module_& m) {
  const auto where = (py::arg(Target::where) = Target::anywhere);
  m.def("row_statistics", &row_statistics<Target>, py::arg("dtype"), py::arg("streams"),
        py::arg("rows"), py::arg("cols"), py::arg("vocab_offset"), py::arg("maxima"),
        py::arg("sums"), py::arg("moments") = std::vector<MomentSpec>(), py::arg("total") = 0,
        py::arg("argmax") = 0, py::arg("argmax_value") = 0, py::arg("tail") = Ids(0, 0),
        py::arg("tail_maximum") = 0, py::arg("tail_sum") = 0, where,
        "Merge a block's row statistics into running ones.");
  m.def("row_outcomes", &row_outcomes<Target>, py::arg("dtype"), py::arg("streams"),
        py::arg("rows"), py::arg("cols"), py::arg("maxima"), py::arg("sums"), py::arg("divergence"),
        py::arg("value"), py::arg("slope"), where,
        "Add a block's values and slopes of a divergence of two sweeps to running sums.");
  py::class_<GradientTerms>(m, "GradientTerms", "Pointers to a gradient's coefficients.",
                            py::module_local())
      .def(py::init<>())
      .def_readwrite("c0", &GradientTerms::c0)
      .def_readwrite("c1", &GradientTerms::c1)
      .def_readwrite("q", &GradientTerms::q)
      .def_readwrite("p", &GradientTerms::p)
      .def_readwrite("sparse", &GradientTerms::sparse)
      .def_readwrite("sparse_values", &GradientTerms::sparse_values)
      .def_readwrite("outside", &GradientTerms::outside)
      .def_readwrite("outside_value", &GradientTerms::outside_value)
      .def_readwrite("outside_maximum", &GradientTerms::outside_maximum)
      .def_readwrite("divergence", &GradientTerms::divergence)
      .def_readwrite("divergence_weight", &GradientTerms::divergence_weight)
      .def_readwrite("divergence_slope", &GradientTerms::divergence_slope);
  m.def("row_gradient", &row_gradient<Target>, py::arg("dtype"), py::arg("streams"),
        py::arg("rows"), py::arg("cols"), py::arg("vocab_offset"), py::arg("maxima"),
        py::arg("sums"), py::arg("out"), py::arg("out_ld"), py::arg("terms"), py::arg("tile") = 0,
        py::arg("tile_absmax") = 0, where,
        "Gradient of a block with respect to the student's logits.");
  m.def("head_transform", &head_transform<Target>, py::arg("dtype"), py::arg("values"),
        py::arg("count"), py::arg("scale"), py::arg("softcap"), py::arg("temperature"), where,
        "Raw logits behind their head transform, in place.");
}

}  // namespace
