#include "tensor.hpp"

#include <string>

#include "dlpack.hpp"

namespace nb = nanobind;

namespace batchnorm {
namespace {

const dlpack::ExchangeApi* exchange_api = nullptr;

TensorView from_exchange_api(nb::handle tensor) {
  dlpack::Tensor found;
  if (exchange_api->tensor_from_py_object(tensor.ptr(), &found) != 0) throw nb::python_error();
  if (found.device_type != 1) throw nb::type_error("the CPU core got a tensor that is not in the CPU's memory.");
  if (found.ndim > kMostDimensions) throw nb::type_error("the CPU core takes tensors of at most 16 dimensions.");
  TensorView view;
  view.data = static_cast<char*>(found.data) + found.byte_offset;
  view.ndim = found.ndim;
  view.type_code = found.type_code;
  view.type_bits = found.type_bits;
  for (int i = 0; i < found.ndim; ++i) {
    view.shape[i] = found.shape[i];
    view.strides[i] = found.strides[i];
  }
  return view;
}

// For versions of torch without the exchange API: slower by some microseconds.
TensorView from_attributes(nb::handle tensor) {
  TensorView view;
  const nb::object shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  const nb::object type = tensor.attr("dtype");
  const std::string dtype = nb::str(nb::handle(type)).c_str();
  if (!nb::cast<bool>(nb::object(tensor.attr("is_cpu"))))
    throw nb::type_error("the CPU core got a tensor that is not in the CPU's memory.");
  if (nb::len(shape) > kMostDimensions) throw nb::type_error("the CPU core takes tensors of at most 16 dimensions.");
  view.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(nb::object(tensor.attr("data_ptr")())));
  view.ndim = static_cast<int>(nb::len(shape));
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = nb::cast<int64_t>(nb::object(shape[i]));
    view.strides[i] = nb::cast<int64_t>(nb::object(strides[i]));
  }
  struct Type { const char* name; uint8_t code, bits; };
  for (const Type& known : {Type{"torch.float32", 2, 32}, Type{"torch.float64", 2, 64}, Type{"torch.float16", 2, 16},
                           Type{"torch.bfloat16", 4, 16}, Type{"torch.bool", 6, 8}, Type{"torch.int64", 0, 64}}) {
    if (dtype != known.name) continue;
    view.type_code = known.code;
    view.type_bits = known.bits;
  }
  return view;
}

// One (N, C, ...) tensor with its trailing axes as one; false where their strides do not allow it.
bool fold(const TensorView& view, int64_t L, Operand& out) {
  out.data = view.data;
  out.stride_n = view.strides[0];
  out.stride_c = view.strides[1];
  int64_t length = 1, stride = 0;
  for (int i = view.ndim - 1; i >= 2; --i) {
    if (view.shape[i] == 1) continue;
    if (length == 1) stride = view.strides[i];
    else if (view.strides[i] != stride * length) return false;
    length *= view.shape[i];
  }
  out.stride_l = L == 1 ? 1 : stride;
  return true;
}

}  // namespace

Dtype TensorView::dtype() const {
  if (type_code == 4) return Dtype::bfloat16;
  return type_bits == 64 ? Dtype::float64 : type_bits == 32 ? Dtype::float32 : Dtype::float16;
}

bool TensorView::is_contiguous() const {
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

void set_exchange_api(nb::handle capsule) {
  exchange_api = nullptr;
  if (!PyCapsule_CheckExact(capsule.ptr())) return;
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) PyErr_Clear();
  else if (api->header.major == 1) exchange_api = api;
}

bool has_exchange_api() { return exchange_api != nullptr; }

TensorView view_of(nb::handle tensor) {
  if (tensor.is_none()) return {};
  return exchange_api ? from_exchange_api(tensor) : from_attributes(tensor);
}

bool set_layout(Call& call, const TensorView* const* views, Operand* const* operands, int number) {
  const TensorView& x = *views[0];
  call.N = x.shape[0];
  call.C = x.shape[1];
  call.L = 1;
  for (int i = 2; i < x.ndim; ++i) call.L *= x.shape[i];
  bool planar = true, channels_last = true;
  for (int i = 0; i < number; ++i) {
    if (!views[i]->data) continue;
    Operand& operand = *operands[i];
    if (!fold(*views[i], call.L, operand)) return false;
    // An axis of one position may have any stride: give it the one it would have.
    if (call.C == 1) operand.stride_c = operand.stride_l == 1 ? call.L : 1;
    planar = planar && (call.L == 1 || operand.stride_l == 1);
    const int64_t pitch = call.L == 1 ? operand.stride_n : operand.stride_l;
    channels_last = channels_last && (call.C == 1 || operand.stride_c == 1) &&
                    (call.N == 1 || call.L == 1 || operand.stride_n == call.L * pitch);
  }
  if (call.L > 1 && planar) {
    call.layout = Layout::planar;
    return true;
  }
  if (!channels_last) return false;
  call.layout = Layout::channels_last;
  for (int i = 0; i < number; ++i)
    if (call.L == 1) operands[i]->stride_l = call.N == 1 ? call.C : operands[i]->stride_n;
  return true;
}

}  // namespace batchnorm
