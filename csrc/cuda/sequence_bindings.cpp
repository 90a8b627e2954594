// The kernels over sequences for Python: raw pointers, shapes and a stream.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "device.h"
#include "sequence_args.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;
using pad::portable::Listwise;
// Address and dtype.
using NumbersSpec = std::tuple<Pointer, std::string>;

template <class T = void>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

pad::DType parse_dtype(const std::string& name) {
  if (name == "float32") return pad::DType::float32;
  if (name == "float64") return pad::DType::float64;
  if (name == "bfloat16") return pad::DType::bfloat16;
  if (name == "float16") return pad::DType::float16;
  throw py::value_error("dtype: expected a floating dtype, got " + name);
}

pad::NumbersArgs parse_numbers(const NumbersSpec& spec) {
  const auto& [pointer, dtype] = spec;
  return {at(pointer), parse_dtype(dtype)};
}

Listwise parse_kind(const std::string& kind, int n) {
  const bool sets = kind == "kl" || kind == "reverse_kl";
  if (!sets && kind != "jsd" && kind != "jsd_released")
    throw py::value_error("kind: expected kl, reverse_kl, jsd or jsd_released, got " + kind);
  const int limit = sets ? pad::portable::kMaxExactKl : pad::portable::kMaxExactJsd;
  if (n < 1 || n > limit)
    throw py::value_error("subset: expected 1 to " + std::to_string(limit) + ", got " +
                          std::to_string(n));
  if (sets) return kind == "kl" ? Listwise::kl : Listwise::reverse_kl;
  return kind == "jsd" ? Listwise::jsd : Listwise::jsd_released;
}

// Token log-probs of sequences, see TokensArgs.
struct Tokens {
  Pointer logprob = 0;
  std::string dtype = "float32";
  int64_t total = 0, length = 0;
  Pointer offsets = 0, mask = 0, labels = 0;
  int label_bytes = 8;
  int64_t ignore_index = 0;
  bool mean = true;

  pad::TokensArgs args() const {
    if (label_bytes != 4 && label_bytes != 8)
      throw py::value_error("label_bytes: expected 4 or 8, got " + std::to_string(label_bytes));
    return {{at(logprob), parse_dtype(dtype)},
            at<const int64_t>(offsets),
            length,
            total,
            at<const uint8_t>(mask),
            at(labels),
            label_bytes,
            ignore_index,
            mean};
  }
};

void rewards(const Tokens& tokens, int64_t sequences, const NumbersSpec& reward,
             Pointer inverse_count, Pointer stream) {
  const pad::NumbersArgs out = parse_numbers(reward);
  pad::RewardsArgs args{
      tokens.args(), sequences, out.dtype, const_cast<void*>(out.at), at<double>(inverse_count),
      at(stream)};
  pad::cuda::rewards(args);
}

void rewards_gradient(const Tokens& tokens, int64_t sequences, const NumbersSpec& upstream,
                      int64_t upstream_step, int64_t per, const NumbersSpec& gradient,
                      Pointer inverse_count, const NumbersSpec& out, Pointer stream) {
  if (per < 1) throw py::value_error("per: expected >= 1, got " + std::to_string(per));
  const pad::NumbersArgs to = parse_numbers(out);
  pad::RewardsGradientArgs args{tokens.args(),
                                sequences,
                                parse_numbers(upstream),
                                upstream_step,
                                per,
                                parse_numbers(gradient),
                                at<const double>(inverse_count),
                                to.dtype,
                                const_cast<void*>(to.at),
                                at(stream)};
  pad::cuda::rewards_gradient(args);
}

void listwise(const std::string& kind, int64_t groups, int n, int subset, double beta,
              const NumbersSpec& student, const Tokens& tokens, const NumbersSpec& teacher,
              Pointer valid, const NumbersSpec& loss, Pointer gradient, Pointer inverse_count,
              size_t shared_limit, Pointer workspace, Pointer stream) {
  const pad::NumbersArgs out = parse_numbers(loss);
  pad::ListwiseArgs args{parse_kind(kind, subset),
                         groups,
                         n,
                         subset,
                         beta,
                         parse_numbers(student),
                         tokens.args(),
                         parse_numbers(teacher),
                         at<const uint8_t>(valid),
                         out.dtype,
                         const_cast<void*>(out.at),
                         at(gradient),
                         at<double>(inverse_count),
                         shared_limit,
                         at(workspace),
                         at(stream)};
  if (!args.student.at && !args.tokens.logprob.at)
    throw py::value_error("student: expected rewards or tokens, got neither");
  pad::cuda::listwise(args);
}

// Storage, threads, bytes of shared memory and bytes of workspace.
std::tuple<std::string, int, size_t, size_t> listwise_plan(const std::string& kind, int subset,
                                                           int64_t groups, bool wide,
                                                           size_t shared_limit) {
  const pad::cuda::ListwisePlan plan =
      pad::cuda::listwise_plan(parse_kind(kind, subset), subset, groups, wide, shared_limit);
  const char* const names[] = {"shared64", "shared32", "global64"};
  return {names[int(plan.storage)], plan.threads, plan.shared, plan.workspace};
}

}  // namespace

void bind_sequences(py::module_& m) {
  py::class_<Tokens>(m, "Tokens", "Pointers to token log-probs and what says which of them count.",
                     py::module_local())
      .def(py::init<>())
      .def_readwrite("logprob", &Tokens::logprob)
      .def_readwrite("dtype", &Tokens::dtype)
      .def_readwrite("total", &Tokens::total)
      .def_readwrite("length", &Tokens::length)
      .def_readwrite("offsets", &Tokens::offsets)
      .def_readwrite("mask", &Tokens::mask)
      .def_readwrite("labels", &Tokens::labels)
      .def_readwrite("label_bytes", &Tokens::label_bytes)
      .def_readwrite("ignore_index", &Tokens::ignore_index)
      .def_readwrite("mean", &Tokens::mean);
  m.def("rewards", &rewards, py::arg("tokens"), py::arg("sequences"), py::arg("reward"),
        py::arg("inverse_count"), py::arg("stream"), "Rewards of sequences.",
        py::call_guard<py::gil_scoped_release>());
  m.def("rewards_gradient", &rewards_gradient, py::arg("tokens"), py::arg("sequences"),
        py::arg("upstream"), py::arg("upstream_step"), py::arg("per"), py::arg("gradient"),
        py::arg("inverse_count"), py::arg("out"), py::arg("stream"), "Gradient by the tokens.",
        py::call_guard<py::gil_scoped_release>());
  m.def("listwise", &listwise, py::arg("kind"), py::arg("groups"), py::arg("n"), py::arg("subset"),
        py::arg("beta"), py::arg("student"), py::arg("tokens"), py::arg("teacher"),
        py::arg("valid"), py::arg("loss"), py::arg("gradient"), py::arg("inverse_count"),
        py::arg("shared_limit"), py::arg("workspace"), py::arg("stream"),
        "Listwise losses of groups, from rewards or from tokens, and their gradient.",
        py::call_guard<py::gil_scoped_release>());
  m.def("listwise_plan", &listwise_plan, py::arg("kind"), py::arg("subset"), py::arg("groups"),
        py::arg("wide"), py::arg("shared_limit"), "How a listwise loss is launched.");
  m.def("shared_limit", &pad::cuda::shared_limit,
        "Bytes of shared memory that a block may have on the current device.");
}
