// The extension module pad_kernels._C: raw pointers and shapes in, no torch headers.
#include <pybind11/pybind11.h>

void bind_rows(pybind11::module_& m);
void bind_listwise(pybind11::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Row passes and listwise kernels on raw pointers (tensor.data_ptr()).";
  bind_rows(m);
  bind_listwise(m);
}
