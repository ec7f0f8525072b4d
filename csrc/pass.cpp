#include "pass.hpp"

#include <cstring>

#include "running.hpp"
#include "select.hpp"
#include "tensor.hpp"
#include "torch.hpp"

namespace nb = nanobind;

namespace batchnorm {
namespace {

// Thrown where something is not ordinary, and caught at the end of the three functions.
struct NotOrdinary {};

void expect(bool holds) {
  if (!holds) throw NotOrdinary();
}

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

// An operand like x; no data where it is None.
TensorView seen_operand(nb::handle tensor) {
  if (tensor.is_none()) return {};
  const TensorView view = seen(tensor);
  expect(is_literal(tensor));
  return view;
}

bool is_like(const TensorView& x, const TensorView& other) {
  return other.ndim == x.ndim && other.type_code == x.type_code && other.type_bits == x.type_bits &&
         std::memcmp(other.shape, x.shape, sizeof x.shape) == 0;
}

bool is_vector(const TensorView& view, int64_t channels) {
  return view.is_float() && view.ndim == 1 && view.shape[0] == channels && (view.strides[0] == 1 || channels == 1);
}

Parameter parameter(nb::handle tensor, const TensorView& x) {
  if (tensor.is_none()) return {};
  const TensorView view = seen(tensor);
  const bool is_same = view.type_code == x.type_code && view.type_bits == x.type_bits;
  expect(is_vector(view, x.shape[1]) && (is_same || (x.type_bits == 16 && view.type_bits == 32)));
  return {view.data, view.dtype()};
}

Parameter statistic(nb::handle tensor, int64_t channels) {
  const TensorView view = seen(tensor);
  expect(is_vector(view, channels) && view.type_bits >= 32);
  return {view.data, view.dtype()};
}

void copy(const Parameter& from, int64_t channels, double* to) {
  if (from.dtype == Dtype::float64) std::memcpy(to, from.data, static_cast<size_t>(channels) * sizeof(double));
  else for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<const float*>(from.data)[c];
}

void copy(const double* from, int64_t channels, const Parameter& to) {
  void* data = const_cast<void*>(to.data);
  if (to.dtype == Dtype::float64) std::memcpy(data, from, static_cast<size_t>(channels) * sizeof(double));
  else for (int64_t c = 0; c < channels; ++c) static_cast<float*>(data)[c] = static_cast<float>(from[c]);
}

// Contiguous, or channels-last: what torch's own layers return. An axis of one position may have any stride.
bool has_memory_format(const TensorView& y) {
  int64_t contiguous = 1, channels_last = 1;
  bool is_contiguous = true, is_channels_last = y.ndim >= 4;
  for (int i = y.ndim - 1; i >= 0; --i) {
    if (y.shape[i] > 1) is_contiguous = is_contiguous && y.strides[i] == contiguous;
    contiguous *= y.shape[i];
  }
  channels_last = y.shape[1];
  if (y.shape[1] > 1) is_channels_last = is_channels_last && y.strides[1] == 1;
  for (int i = y.ndim - 1; i >= 0; --i) {
    if (i == 1) continue;
    if (y.shape[i] > 1) is_channels_last = is_channels_last && y.strides[i] == channels_last;
    channels_last *= y.shape[i];
  }
  return is_contiguous || is_channels_last;
}

// Everything but the statistics of a call whose operands are `views`, x first.
void prepare(Call& call, const TensorView* const* views, Operand* const* operands, int number, const Pass& pass,
             nb::handle weight, nb::handle bias, int threads) {
  const TensorView& x = *views[0];
  expect(x.is_float() && x.type_bits >= 16 && x.ndim >= 2 && x.ndim <= 5 && x.shape[1] > 0);
  for (int i = 1; i < number; ++i) expect(!views[i]->data || is_like(x, *views[i]));
  expect(set_layout(call, views, operands, number) && call.N * call.L > 0);
  call.dtype = x.dtype();
  call.weight = parameter(weight, x);
  call.bias = parameter(bias, x);
  call.activation = pass.activation;
  call.eps = pass.eps;
  call.threads = threads;
}

// The output, after everything but the statistics of the call is in place.
nb::object prepare_forward(Call& call, nb::handle x, nb::handle out, nb::handle residual, nb::handle weight,
                           nb::handle bias, Pass& pass, int64_t features, int threads) {
  const TensorView vx = seen_operand(x), vr = seen_operand(residual);
  expect(vx.is_float() && vx.ndim >= 2 && (features < 0 || features == vx.shape[1]));
  nb::object y = out.is_none() ? empty_like(x, vx) : nb::borrow(out);
  const TensorView vy = out.is_none() ? seen(y) : seen_operand(y);
  expect(has_memory_format(vy));
  const TensorView* const views[] = {&vx, &vy, &vr};
  Operand* const operands[] = {&call.x, &call.y, &call.residual};
  prepare(call, views, operands, 3, pass, weight, bias, threads);
  pass.statistics.resize(static_cast<size_t>(2 * call.C));
  call.mean = pass.mean();
  call.var = pass.var();
  call.count = pass.count = call.N * call.L;
  return y;
}

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
  const Parameter to_mean = statistic(mean, channels()), to_var = statistic(var, channels());
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
  Parameter to_mean, to_var, into_mean, into_var;
  if (!mean.is_none()) {
    to_mean = statistic(mean, call.C);
    to_var = statistic(var, call.C);
  }
  int64_t* batches = nullptr;
  if (!running_mean.is_none()) {
    into_mean = statistic(running_mean, call.C);
    into_var = statistic(running_var, call.C);
    expect(into_mean.dtype == into_var.dtype);
    if (!tracked.is_none()) {
      const TensorView counter = seen(tracked);
      expect(counter.is_int64() && counter.ndim == 0);
      batches = static_cast<int64_t*>(counter.data);
    }
  }
  run(kernels().forward, call);
  if (to_mean.data) {
    copy(call.mean, call.C, to_mean);
    copy(call.var, call.C, to_var);
  }
  if (into_mean.data)
    pass.is_taken = take_in(into_mean, into_var, batches, call.mean, call.var, call.C, call.count, momentum);
  return nb::make_tuple(y, std::move(pass));
} catch (const NotOrdinary&) {
  return nb::none();
}

nb::object infer(nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual, double eps, int activation,
                 int64_t features, int threads, nb::handle mean, nb::handle var, nb::handle out) try {
  Pass pass = begun(eps, activation, false);
  Call call;
  nb::object y = prepare_forward(call, x, out, residual, weight, bias, pass, features, threads);
  copy(statistic(mean, call.C), call.C, call.mean);
  copy(statistic(var, call.C), call.C, call.var);
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
  const TensorView vx = seen_operand(x), vdy = seen_operand(dy), vr = seen_operand(residual);
  expect(vx.data && vdy.data);
  TensorView vdx, vdr;
  if (is_wanted(0)) vdx = seen(dx = empty_like(x, vx));
  if (is_wanted(3)) {
    if (residual.is_none()) dresidual = nb::borrow(dy);
    else vdr = seen(dresidual = empty_like(x, vx));
  }
  Call call;
  const TensorView* const views[] = {&vx, &vdy, &vr, &vdx, &vdr};
  Operand* const operands[] = {&call.x, &call.dy, &call.residual, &call.dx, &call.dresidual};
  prepare(call, views, operands, 5, pass, weight, bias, threads);
  expect(call.C == pass.channels() && call.N * call.L == pass.count);
  Parameter to_weight, to_bias;
  // In half precision a sum is not written: that is left to the general way.
  if (is_wanted(1)) to_weight = statistic(dweight = empty_like(weight, seen(weight)), call.C);
  if (is_wanted(2)) to_bias = statistic(dbias = empty_like(bias, seen(bias)), call.C);
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
