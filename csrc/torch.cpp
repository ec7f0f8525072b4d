#include "torch.hpp"

namespace nb = nanobind;

namespace batchnorm {
namespace {

// Held for ever: at exit the interpreter may be gone before these.
struct Torch {
  PyObject *tensor = nullptr, *parameter = nullptr;
  PyObject *empty_like = nullptr, *is_neg = nullptr, *new_large = nullptr;
  PyObject* cudnn_batch_norm = nullptr;
  size_t large = 0;
};

Torch torch;

nb::object called(PyObject* function, nb::handle argument) {
  PyObject* const arguments[] = {argument.ptr()};
  PyObject* result = PyObject_Vectorcall(function, arguments, 1, nullptr);
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

}  // namespace

void set_torch(nb::object tensor, nb::object parameter, nb::object empty_like, nb::object is_neg, nb::object new_large,
               size_t large) {
  torch.tensor = tensor.release().ptr();
  torch.parameter = parameter.release().ptr();
  torch.empty_like = empty_like.release().ptr();
  torch.is_neg = is_neg.release().ptr();
  torch.new_large = new_large.release().ptr();
  torch.large = large;
}

void set_node(nb::object cudnn_batch_norm) { torch.cudnn_batch_norm = cudnn_batch_norm.release().ptr(); }

bool has_node() { return torch.cudnn_batch_norm != nullptr; }

nb::object node_of(nb::handle x, nb::handle weight, nb::handle bias, double eps) {
  const nb::object eps_ = nb::float_(eps);
  static PyObject* const no_momentum = PyFloat_FromDouble(0);
  PyObject* const arguments[] = {x.ptr(), weight.ptr(), bias.ptr(), Py_None, Py_None, Py_True, no_momentum, eps_.ptr()};
  PyObject* result = PyObject_Vectorcall(torch.cudnn_batch_norm, arguments, 8, nullptr);
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

bool is_tensor(nb::handle value) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value.ptr()));
  return type == torch.tensor || type == torch.parameter;
}

bool is_literal(nb::handle tensor) {
  return called(torch.is_neg, tensor).is(Py_False);
}

nb::object empty_like(nb::handle tensor, const TensorView& view) {
  size_t bytes = view.type_bits / 8;
  for (int i = 0; i < view.ndim; ++i) bytes *= static_cast<size_t>(view.shape[i]);
  return called(bytes < torch.large ? torch.empty_like : torch.new_large, tensor);
}

nb::object contiguous(nb::handle tensor) { return nb::object(tensor.attr("contiguous")()); }

}  // namespace batchnorm
