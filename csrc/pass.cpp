#include "pass.hpp"

#include <cmath>

#include "ordinary.hpp"
#include "pool.hpp"
#include "running.hpp"
#include "select.hpp"
#include "tensor.hpp"
#include "torch.hpp"

namespace nb = nanobind;

namespace batchnorm {
namespace {

TensorView seen(nb::handle tensor) {
  expect(is_tensor(tensor));
  try {
    return view_of(tensor);
  } catch (const nb::python_error&) {
    throw NotOrdinary();  // torch would not show its memory: sparse, or without storage as under is_grads_batched
  } catch (const nb::builtin_exception&) {
    throw NotOrdinary();  // not in the memory of the CPU
  }
}

// No data where it is None.
TensorView seen_if_any(nb::handle tensor) { return tensor.is_none() ? TensorView() : seen(tensor); }

// An operand like x; no data where it is None.
TensorView seen_operand(nb::handle tensor) {
  if (tensor.is_none()) return {};
  const TensorView view = seen(tensor);
  expect(is_literal(tensor));
  return view;
}

// Where a batch goes, besides into the output.
struct RunningStatistics {
  Parameter mean, var;
  int64_t* batches = nullptr;
  double momentum;

  RunningStatistics(nb::handle mean_, nb::handle var_, nb::handle tracked, double momentum_, int64_t channels)
      : momentum(momentum_) {
    if (mean_.is_none()) return;
    mean = statistic(seen(mean_), channels);
    var = statistic(seen(var_), channels);
    expect(mean.dtype == var.dtype);
    if (tracked.is_none()) return;
    const TensorView counter = seen(tracked);
    expect(counter.is_int64() && counter.ndim == 0);
    batches = static_cast<int64_t*>(counter.data);
  }

  // False where the batch is left out.
  bool take(const double* batch_mean, const double* batch_var, int64_t channels, int64_t count) const {
    return !mean.data || take_in(mean, var, batches, batch_mean, batch_var, channels, count, momentum);
  }
};

// The output, after everything but the statistics of the call is in place.
nb::object prepare_forward(Call& call, nb::handle x, nb::handle out, nb::handle residual, nb::handle weight,
                           nb::handle bias, Pass& pass, int64_t features, int threads) {
  TensorView vx = seen_operand(x);
  const TensorView vr = seen_operand(residual);
  expect(vx.is_float() && vx.ndim >= 2 && (features < 0 || features == vx.shape[1]));
  nb::object y = out.is_none() ? empty_like(x, vx) : nb::borrow(out);
  TensorView vy = out.is_none() ? seen(y) : seen_operand(y);
  if (out.is_none() && !(has_memory_format(vy) && lie_alike(vx, vy))) {
    // As tokens (N, L, C) that were transposed, or a part of each row: the output is made of a copy, in place.
    const nb::object values = x.attr("detach")();
    if (has_memory_format(vy)) y.attr("copy_")(values);
    else y = contiguous(values);
    vx = vy = seen(y);
  }
  expect(has_memory_format(vy));
  const TensorView* const views[] = {&vx, &vy, &vr};
  Operand* const operands[] = {&call.x, &call.y, &call.residual};
  prepare(call, views, operands, 3, seen_if_any(weight), seen_if_any(bias), pass.activation, pass.eps, threads);
  pass.statistics.resize(static_cast<size_t>(2 * call.C));
  call.mean = pass.mean();
  call.var = pass.var();
  call.count = pass.count = call.N * call.L;
  return y;
}

// Mean over standard deviation of a channel from which on torch's formula for the second derivative, which rounds the mean to
// float32, is off by a millionth of the deviation.
constexpr double kMostOffset = 16;

// Other Python threads may run meanwhile, where that is worth its price.
void run(void (*kernel)(const Call&), const Call& call) {
  if (call.N * call.C * call.L < 16384) return kernel(call);
  nb::gil_scoped_release released;
  kernel(call);
}

Pass begun(double eps, int activation, bool is_estimated) {
  expect(eps >= 0);
  Pass pass;
  pass.eps = eps;
  pass.activation = static_cast<Activation>(activation);
  pass.is_estimated = is_estimated;
  return pass;
}

}  // namespace

void Pass::write(nb::handle mean, nb::handle var) {
  const Parameter to_mean = statistic(seen(mean), channels()), to_var = statistic(seen(var), channels());
  copy(this->mean(), channels(), to_mean);
  copy(this->var(), channels(), to_var);
}

nb::object train(nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual, double eps, int activation,
                 int64_t features, int threads, nb::handle mean, nb::handle var, nb::handle running_mean,
                 nb::handle running_var, nb::handle tracked, double momentum) try {
  Pass pass = begun(eps, activation, true);
  Call call;
  nb::object y = prepare_forward(call, x, nb::none(), residual, weight, bias, pass, features, threads);
  expect(call.count > 1);
  Parameter to_mean, to_var;
  if (!mean.is_none()) {
    to_mean = statistic(seen(mean), call.C);
    to_var = statistic(seen(var), call.C);
  }
  const RunningStatistics running(running_mean, running_var, tracked, momentum, call.C);
  run(kernels().forward, call);
  if (to_mean.data) {
    copy(call.mean, call.C, to_mean);
    copy(call.var, call.C, to_var);
  }
  pass.is_taken = running.take(call.mean, call.var, call.C, call.count);
  return nb::make_tuple(y, std::move(pass));
} catch (const NotOrdinary&) {
  return nb::none();
}

nb::object train_in_graph(nb::handle x, nb::handle weight, nb::handle bias, double eps, int64_t features,
                          nb::handle running_mean, nb::handle running_var, nb::handle tracked, double momentum) try {
  if (!has_node()) return nb::none();
  const TensorView vx = seen(x);
  if (vx.ndim < 2 || vx.ndim > 5) return nb::none();
  int64_t count = 1;
  for (int i = 0; i < vx.ndim; ++i) count *= i == 1 ? 1 : vx.shape[i];
  // What is common and ends here does so without an exception: that is as dear as a small pass.
  if (!vx.is_contiguous() || count * features * (vx.type_bits / 8) >= kPooledBytes) return nb::none();
  expect(vx.is_float() && vx.type_bits >= 16 && features == vx.shape[1] && features > 0 && count > 1 && eps >= 0);
  parameter(seen(weight), vx);
  parameter(seen_if_any(bias), vx);
  gradient(seen(weight), features);  // which will be of that dtype
  const RunningStatistics running(running_mean, running_var, tracked, momentum, features);
  const nb::object found = node_of(x, weight, bias, eps);
  const auto* const mean = static_cast<const double*>(seen(found[3]).data);
  const double* const var = mean + features;
  const bool is_taken = running.take(mean, var, features, count);
  bool is_centred = true;
  if (vx.type_bits <= 32)
    for (int64_t c = 0; c < features; ++c) is_centred &= mean[c] * mean[c] <= kMostOffset * kMostOffset * (var[c] + eps);
  if (is_centred) return nb::make_tuple(found[0], nb::none(), is_taken);
  Pass pass = begun(eps, static_cast<int>(Activation::none), true);
  pass.count = count;
  pass.is_taken = is_taken;
  pass.statistics.assign(mean, var + features);
  return nb::make_tuple(found[0], std::move(pass), is_taken);
} catch (const NotOrdinary&) {
  return nb::none();
}

nb::object infer(nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual, double eps, int activation,
                 int64_t features, int threads, nb::handle mean, nb::handle var, nb::handle out) try {
  Pass pass = begun(eps, activation, false);
  Call call;
  nb::object y = prepare_forward(call, x, out, residual, weight, bias, pass, features, threads);
  copy(statistic(seen(mean), call.C), call.C, call.mean);
  copy(statistic(seen(var), call.C), call.C, call.var);
  call.reduces = false;
  run(kernels().forward, call);
  return nb::make_tuple(y, std::move(pass));
} catch (const NotOrdinary&) {
  return nb::none();
}

nb::object differentiate(Pass& pass, nb::handle dy, nb::handle x, nb::handle weight, nb::handle bias,
                         nb::handle residual, nb::tuple wanted, int threads) try {
  const auto is_wanted = [&](int i) { return nb::handle(wanted[i]).is(Py_True); };
  nb::object dx = nb::none(), dweight = nb::none(), dbias = nb::none(), dresidual = nb::none();
  const TensorView vr = seen_operand(residual);
  TensorView vx = seen_operand(x), vdy = seen_operand(dy), vdx, vdr;
  expect(vx.data && vdy.data);
  nb::object dense, like_x;
  if (!lie_alike(vx, vx)) {
    x = dense = contiguous(x);
    vx = seen(x);
  }
  if (!lie_alike(vx, vdy)) {  // as after global pooling of channels-last activations
    like_x = empty_like(x, vx);
    like_x.attr("copy_")(dy);
    vdy = seen(like_x);
  }
  if (is_wanted(0)) vdx = seen(dx = empty_like(x, vx));
  if (is_wanted(3)) {
    if (residual.is_none()) dresidual = nb::borrow(dy);
    else vdr = seen(dresidual = empty_like(x, vx));
  }
  Call call;
  const TensorView* const views[] = {&vx, &vdy, &vr, &vdx, &vdr};
  Operand* const operands[] = {&call.x, &call.dy, &call.residual, &call.dx, &call.dresidual};
  prepare(call, views, operands, 5, seen_if_any(weight), seen_if_any(bias), pass.activation, pass.eps, threads);
  expect(call.C == pass.channels() && call.N * call.L == pass.count);
  Parameter to_weight, to_bias;
  if (is_wanted(1)) to_weight = gradient(seen(dweight = empty_like(weight, seen(weight))), call.C);
  if (is_wanted(2)) to_bias = gradient(seen(dbias = empty_like(bias, seen(bias))), call.C);
  call.mean = pass.mean();
  call.var = pass.var();
  call.count = pass.count;
  call.is_estimated = pass.is_estimated;
  call.maps = call.dx.data || call.dresidual.data;
  call.reduces = to_weight.data || to_bias.data || (call.dx.data && pass.is_estimated);
  std::vector<double> sums(static_cast<size_t>(2 * call.C), 0.0);
  call.sum_dz = sums.data();
  call.sum_dz_xhat = sums.data() + call.C;
  if (call.maps || call.reduces) run(kernels().backward, call);
  if (to_weight.data) copy(call.sum_dz_xhat, call.C, to_weight);
  if (to_bias.data) copy(call.sum_dz, call.C, to_bias);
  return nb::make_tuple(dx, dweight, dbias, dresidual, nb::none(), nb::none());
} catch (const NotOrdinary&) {
  return nb::none();
}

}  // namespace batchnorm
