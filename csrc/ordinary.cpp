#include "ordinary.hpp"

#include <cstring>

namespace batchnorm {
namespace {

bool is_like(const TensorView& x, const TensorView& other) {
  return other.ndim == x.ndim && other.type_code == x.type_code && other.type_bits == x.type_bits &&
         std::memcmp(other.shape, x.shape, sizeof x.shape) == 0;
}

bool is_vector(const TensorView& view, int64_t channels) {
  return view.is_float() && view.ndim == 1 && view.shape[0] == channels && (view.strides[0] == 1 || channels == 1);
}

// As torch rounds: to the nearest float, and then to the nearest upper half, ties to even.
uint16_t rounded_to_bfloat16(double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  if (single != single) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void expect(bool holds) {
  if (!holds) throw NotOrdinary();
}

Parameter parameter(const TensorView& view, const TensorView& x) {
  if (!view.data && view.ndim == 0) return {};
  const bool is_same = view.type_code == x.type_code && view.type_bits == x.type_bits;
  expect(is_vector(view, x.shape[1]) && (is_same || (x.type_bits == 16 && view.type_bits == 32)));
  return {view.data, view.dtype()};
}

Parameter statistic(const TensorView& view, int64_t channels) {
  expect(is_vector(view, channels) && view.type_bits >= 32);
  return {view.data, view.dtype()};
}

Parameter gradient(const TensorView& view, int64_t channels) {
  expect(is_vector(view, channels) && (view.type_bits >= 32 || view.dtype() == Dtype::bfloat16));
  return {view.data, view.dtype()};
}

void copy(const Parameter& from, int64_t channels, double* to) {
  if (from.dtype == Dtype::float64) std::memcpy(to, from.data, static_cast<size_t>(channels) * sizeof(double));
  else for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<const float*>(from.data)[c];
}

void copy(const double* from, int64_t channels, const Parameter& to) {
  void* data = const_cast<void*>(to.data);
  if (to.dtype == Dtype::float64) std::memcpy(data, from, static_cast<size_t>(channels) * sizeof(double));
  else if (to.dtype == Dtype::float32)
    for (int64_t c = 0; c < channels; ++c) static_cast<float*>(data)[c] = static_cast<float>(from[c]);
  else for (int64_t c = 0; c < channels; ++c) static_cast<uint16_t*>(data)[c] = rounded_to_bfloat16(from[c]);
}

bool has_memory_format(const TensorView& view) {
  int64_t contiguous = 1, channels_last = 1;
  bool is_contiguous = true, is_channels_last = view.ndim >= 4;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] > 1) is_contiguous = is_contiguous && view.strides[i] == contiguous;
    contiguous *= view.shape[i];
  }
  channels_last = view.shape[1];
  if (view.shape[1] > 1) is_channels_last = is_channels_last && view.strides[1] == 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (i == 1) continue;
    if (view.shape[i] > 1) is_channels_last = is_channels_last && view.strides[i] == channels_last;
    channels_last *= view.shape[i];
  }
  return is_contiguous || is_channels_last;
}

bool lie_alike(const TensorView& x, const TensorView& other) {
  Call unused;
  const TensorView* const views[] = {&x, &other};
  Operand* const operands[] = {&unused.x, &unused.dy};
  return is_like(x, other) && set_layout(unused, views, operands, 2);
}

void prepare(Call& call, const TensorView* const* views, Operand* const* operands, int number, const TensorView& weight,
             const TensorView& bias, Activation activation, double eps, int threads) {
  const TensorView& x = *views[0];
  expect(x.is_float() && x.type_bits >= 16 && x.ndim >= 2 && x.ndim <= 5 && x.shape[1] > 0);
  for (int i = 1; i < number; ++i) expect(!views[i]->data || is_like(x, *views[i]));
  expect(set_layout(call, views, operands, number) && call.N * call.L > 0);
  call.dtype = x.dtype();
  call.weight = parameter(weight, x);
  call.bias = parameter(bias, x);
  call.activation = activation;
  call.eps = eps;
  call.threads = threads;
}

}  // namespace batchnorm
