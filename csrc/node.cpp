#include "node.hpp"

#include <cmath>
#include <stdexcept>
#include <vector>

#include "abi.hpp"
#include "ordinary.hpp"
#include "select.hpp"

namespace batchnorm {
namespace {

using abi::Tensor;
using abi::Value;

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "aten::cudnn_batch_norm has its kernel for the CPU from batchnorm, which uses it for training in small layers: plain "
      "float tensors (N, C, ...) that are contiguous, with more than one value a channel, weight, and no running statistics. "
      "For anything else use torch.nn.functional.batch_norm or batchnorm.batch_norm.");
}

// Mean and variance of a pass, (2, C) as a vector of float64: exact, where torch's own two results are rounded.
double* statistics_in(const Tensor& tensor, int64_t channels) {
  const Parameter found = statistic(tensor.view(), 2 * channels);
  expect(found.dtype == Dtype::float64);
  return static_cast<double*>(const_cast<void*>(found.data));
}

// (x, weight, bias?, running_mean?, running_var?, training, momentum, eps) -> y, mean, 1 / sqrt(var + eps), statistics.
// Torch's formula for the second derivative, and torch.vmap, read the second and third.
void forward(Value* stack, uint64_t, uint64_t) try {
  const Tensor x(stack[0]), weight(stack[1]), bias = Tensor::optional(stack[2]);
  const Tensor running_mean = Tensor::optional(stack[3]), running_var = Tensor::optional(stack[4]);
  const bool is_training = stack[5] & 1;
  const double eps = abi::number(stack[7]);
  const TensorView vx = x.view();
  expect(is_training && !running_mean.view().data && !running_var.view().data && eps >= 0);
  expect(vx.ndim >= 2 && vx.is_contiguous());
  Tensor y = Tensor::like(x);
  Call call;
  const TensorView vy = y.view();
  const TensorView* const views[] = {&vx, &vy};
  Operand* const operands[] = {&call.x, &call.y};
  prepare(call, views, operands, 2, weight.view(), bias.view(), Activation::none, eps, abi::threads());
  call.count = call.N * call.L;
  expect(call.count > 1 && call.weight.data);
  Tensor statistics = Tensor::vector(2 * call.C, Dtype::float64);
  call.mean = statistics_in(statistics, call.C);
  call.var = call.mean + call.C;
  kernels().forward(call);
  const Dtype rounded = vx.type_bits == 64 ? Dtype::float64 : Dtype::float32;
  Tensor mean = Tensor::vector(call.C, rounded), inv_std = Tensor::vector(call.C, rounded);
  std::vector<double> inverse(static_cast<size_t>(call.C));
  for (int64_t c = 0; c < call.C; ++c) inverse[static_cast<size_t>(c)] = 1 / std::sqrt(call.var[c] + eps);
  copy(call.mean, call.C, statistic(mean.view(), call.C));
  copy(inverse.data(), call.C, statistic(inv_std.view(), call.C));
  stack[0] = y.release();
  stack[1] = mean.release();
  stack[2] = inv_std.release();
  stack[3] = statistics.release();
} catch (const NotOrdinary&) {
  refuse();
}

// (x, dy, weight, running_mean?, running_var?, mean, inv_std, eps, statistics) -> dx, dweight, dbias
void backward(Value* stack, uint64_t, uint64_t) try {
  const Tensor x(stack[0]), weight(stack[2]);
  Tensor dy(stack[1]);
  const Tensor statistics(stack[8]);
  for (const int unused : {3, 4, 5, 6}) Tensor::optional(stack[unused]);  // ours to free
  const double eps = abi::number(stack[7]);
  const TensorView vx = x.view();
  TensorView vdy = dy.view();
  expect(vx.ndim >= 2 && vx.is_contiguous());
  if (vdy.type_code != vx.type_code || vdy.type_bits != vx.type_bits || !vdy.is_contiguous()) {
    Tensor like_x = Tensor::like(x);
    like_x.copy_from(dy);
    dy = std::move(like_x);
    vdy = dy.view();
  }
  Tensor dx = Tensor::like(x), dweight = Tensor::like(weight), dbias = Tensor::like(weight);
  Call call;
  const TensorView vdx = dx.view();
  const TensorView* const views[] = {&vx, &vdy, &vdx};
  Operand* const operands[] = {&call.x, &call.dy, &call.dx};
  prepare(call, views, operands, 3, weight.view(), {}, Activation::none, eps, abi::threads());
  call.mean = statistics_in(statistics, call.C);
  call.var = call.mean + call.C;
  call.count = call.N * call.L;
  std::vector<double> sums(static_cast<size_t>(2 * call.C), 0.0);
  call.sum_dz = sums.data();
  call.sum_dz_xhat = sums.data() + call.C;
  const Parameter to_weight = gradient(dweight.view(), call.C), to_bias = gradient(dbias.view(), call.C);
  kernels().backward(call);
  copy(call.sum_dz_xhat, call.C, to_weight);
  copy(call.sum_dz, call.C, to_bias);
  stack[0] = dx.release();
  stack[1] = dweight.release();
  stack[2] = dbias.release();
} catch (const NotOrdinary&) {
  refuse();
}

}  // namespace

bool install_node(const char* library) {
  static const bool is_installed = abi::load(library) && abi::register_kernel("cudnn_batch_norm", &forward) &&
                                   abi::register_kernel("cudnn_batch_norm_backward", &backward);
  return is_installed;
}

}  // namespace batchnorm
