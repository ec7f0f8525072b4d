// The Python module batchnorm.kernels._cpu: tensors in, pointers on to the core. Shapes and dtypes were checked at the public
// door; here only what would read or write memory that is not ours is checked again.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cache.hpp"
#include "dlpack.hpp"
#include "node.hpp"
#include "parallel.hpp"
#include "pass.hpp"
#include "pool.hpp"
#include "running.hpp"
#include "select.hpp"
#include "tensor.hpp"
#include "tiling.hpp"
#include "torch.hpp"

namespace nb = nanobind;
using namespace batchnorm;

namespace {

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

void require_like(const TensorView& x, const TensorView& other) {
  if (!other.data) return;
  require(other.ndim == x.ndim && other.type_code == x.type_code && other.type_bits == x.type_bits &&
              std::memcmp(other.shape, x.shape, sizeof x.shape) == 0,
          "the CPU core needs operands of one shape and dtype.");
}

// (C,) values as float64: where they lie, or copied to `room`.
class Wide {
 public:
  Wide(nb::handle tensor, int64_t channels) {
    const TensorView view = view_of(tensor);
    require(view.data || channels == 0, "the CPU core needs mean and variance.");
    require(view.ndim == 1 && view.shape[0] == channels && view.is_float() && view.type_bits >= 32,
            "the CPU core needs mean and variance of shape (C,), float32 or float64.");
    const int64_t stride = view.strides[0];
    if (view.type_bits == 64 && (stride == 1 || channels == 1)) {
      data_ = static_cast<double*>(view.data);
      return;
    }
    room_.resize(static_cast<size_t>(channels));
    for (int64_t c = 0; c < channels; ++c)
      room_[static_cast<size_t>(c)] = view.type_bits == 64 ? static_cast<double*>(view.data)[c * stride]
                                                           : static_cast<float*>(view.data)[c * stride];
    data_ = room_.data();
  }
  double* data() { return data_; }

 private:
  double* data_ = nullptr;
  std::vector<double> room_;
};

// What the caller can help by making it contiguous; the functions of the module turn it into their return value.
struct UnknownStrides {};

Parameter parameter(nb::handle tensor, int64_t channels) {
  const TensorView view = view_of(tensor);
  if (!view.data) return {};
  require(view.ndim == 1 && view.shape[0] == channels && view.is_float(),
          "the CPU core needs float parameters of shape (C,).");
  if (view.strides[0] != 1 && channels > 1) throw UnknownStrides();
  return {view.data, view.dtype()};
}

void write(nb::handle tensor, const double* values, int64_t channels) {
  const Parameter out = parameter(tensor, channels);
  if (!out.data) return;
  require(out.dtype == Dtype::float32 || out.dtype == Dtype::float64, "the CPU core writes float32 or float64 sums.");
  for (int64_t c = 0; c < channels; ++c) {
    if (out.dtype == Dtype::float64) static_cast<double*>(const_cast<void*>(out.data))[c] = values[c];
    else static_cast<float*>(const_cast<void*>(out.data))[c] = static_cast<float>(values[c]);
  }
}

void set_mask(Call& call, nb::handle tensor) {
  const TensorView mask = view_of(tensor);
  call.count = call.N * call.L;
  if (!mask.data) return;
  require(mask.is_bool() && mask.ndim == 3 && mask.shape[0] == call.N && mask.shape[1] == 1 && mask.shape[2] == call.L,
          "the CPU core needs a bool mask of shape (N, 1, L).");
  if ((call.N > 1 && mask.strides[0] != call.L) || (call.L > 1 && mask.strides[2] != 1)) throw UnknownStrides();
  call.mask = static_cast<const uint8_t*>(mask.data);
  int64_t count = 0;
  for (int64_t i = 0; i < call.N * call.L; ++i) count += call.mask[i] != 0;
  call.count = count;
}

void check_input(const TensorView& x) {
  require(x.is_float() && x.ndim >= 2, "the CPU core needs a float tensor (N, C, ...).");
}

// Other Python threads may run meanwhile, where that is worth its price.
void run(void (*kernel)(const Call&), const Call& call) {
  if (call.N == 0 || call.C == 0 || call.L == 0) return;
  if (call.N * call.C * call.L < 16384) return kernel(call);
  nb::gil_scoped_release released;
  kernel(call);
}

// Returns the number of values of each channel that counted, or -1 where the strides are none that the core knows.
int64_t forward(nb::handle x, nb::handle y, nb::handle residual, nb::handle mask, nb::handle weight, nb::handle bias,
                nb::handle mean, nb::handle var, double eps, int activation, bool reduces, bool maps, int threads) try {
  Call call;
  const TensorView vx = view_of(x), vy = view_of(y), vr = view_of(residual);
  check_input(vx);
  require_like(vx, vy);
  require_like(vx, vr);
  const TensorView* const views[] = {&vx, &vy, &vr};
  Operand* const operands[] = {&call.x, &call.y, &call.residual};
  if (!set_layout(call, views, operands, 3)) return -1;
  call.dtype = vx.dtype();
  call.activation = static_cast<Activation>(activation);
  call.weight = parameter(weight, call.C);
  call.bias = parameter(bias, call.C);
  call.eps = eps;
  Wide wide_mean(mean, call.C), wide_var(var, call.C);
  call.mean = wide_mean.data();
  call.var = wide_var.data();
  call.reduces = reduces;
  call.maps = maps;
  call.threads = threads;
  set_mask(call, mask);
  if (reduces && call.N * call.L == 0) {
    for (int64_t c = 0; c < call.C; ++c) call.mean[c] = call.var[c] = 0;
  }
  run(kernels().forward, call);
  return call.count;
} catch (const UnknownStrides&) {
  return -1;
}

// Mean and variance of x with every value widened to float64 first; mean and var: float64, (C,), contiguous. Returns the
// number of values of each channel, or -1 where the strides are none that the core knows.
int64_t wide_stats(nb::handle x, nb::handle mean, nb::handle var, int threads) {
  Call call;
  const TensorView vx = view_of(x);
  check_input(vx);
  const TensorView* const views[] = {&vx};
  Operand* const operands[] = {&call.x};
  if (!set_layout(call, views, operands, 1)) return -1;
  call.dtype = vx.dtype();
  call.threads = threads;
  call.count = call.N * call.L;
  Wide wide_mean(mean, call.C), wide_var(var, call.C);
  call.mean = wide_mean.data();
  call.var = wide_var.data();
  for (int64_t c = 0; call.count == 0 && c < call.C; ++c) call.mean[c] = call.var[c] = 0;
  run(kernels().wide_stats, call);
  return call.count;
}

// False where the strides are none that the core knows. sum_dz and sum_dz_xhat: float64, (C,), or None.
bool backward(nb::handle dy, nb::handle x, nb::handle residual, nb::handle dx, nb::handle dresidual, nb::handle mask,
              nb::handle weight, nb::handle bias, nb::handle mean, nb::handle var, double eps, int activation,
              nb::handle sum_dz, nb::handle sum_dz_xhat, int64_t count, bool reduces, bool maps, bool is_estimated,
              int threads) try {
  Call call;
  const TensorView vx = view_of(x), vdy = view_of(dy), vr = view_of(residual), vdx = view_of(dx);
  const TensorView vdr = view_of(dresidual);
  check_input(vx);
  const TensorView* const views[] = {&vx, &vdy, &vr, &vdx, &vdr};
  for (const TensorView* view : views) require_like(vx, *view);
  Operand* const operands[] = {&call.x, &call.dy, &call.residual, &call.dx, &call.dresidual};
  if (!set_layout(call, views, operands, 5)) return false;
  call.dtype = vx.dtype();
  call.activation = static_cast<Activation>(activation);
  call.weight = parameter(weight, call.C);
  call.bias = parameter(bias, call.C);
  call.eps = eps;
  Wide wide_mean(mean, call.C), wide_var(var, call.C);
  call.mean = wide_mean.data();
  call.var = wide_var.data();
  call.reduces = reduces;
  call.maps = maps;
  call.is_estimated = is_estimated;
  call.threads = threads;
  set_mask(call, mask);
  if (count >= 0) call.count = count;
  std::vector<double> sums(static_cast<size_t>(2 * call.C), 0.0);
  call.sum_dz = sums.data();
  call.sum_dz_xhat = sums.data() + call.C;
  if (!reduces && is_estimated) {
    Wide given(sum_dz, call.C), given_xhat(sum_dz_xhat, call.C);
    for (int64_t c = 0; c < call.C; ++c) {
      call.sum_dz[c] = given.data()[c];
      call.sum_dz_xhat[c] = given_xhat.data()[c];
    }
  }
  run(kernels().backward, call);
  if (reduces) {
    write(sum_dz, call.sum_dz, call.C);
    write(sum_dz_xhat, call.sum_dz_xhat, call.C);
  }
  return true;
} catch (const UnknownStrides&) {
  return false;
}

// See running.hpp. momentum < 0 stands for None, the cumulative average.
bool update_running(nb::handle running_mean, nb::handle running_var, nb::handle tracked, nb::handle mean,
                    nb::handle var, int64_t count, double momentum) {
  const TensorView counter = view_of(tracked);
  const int64_t channels = view_of(running_mean).shape[0];
  Wide batch_mean(mean, channels), batch_var(var, channels);
  int64_t* batches = nullptr;
  if (counter.data) {
    require(counter.is_int64() && counter.ndim == 0, "num_batches_tracked must be an int64 scalar.");
    batches = static_cast<int64_t*>(counter.data);
  }
  const Parameter to_mean = parameter(running_mean, channels), to_var = parameter(running_var, channels);
  require(to_mean.dtype == to_var.dtype && (to_mean.dtype == Dtype::float32 || to_mean.dtype == Dtype::float64),
          "running statistics must be float32 or float64, both the same.");
  return take_in(to_mean, to_var, batches, batch_mean.data(), batch_var.data(), channels, count, momentum);
}

// A DLPack capsule of a buffer of the pool, as many values of the dtype of x in a row; None where the pool has none.
nb::object pooled_like(nb::handle x) {
  const TensorView view = view_of(x);
  int64_t values = 1;
  for (int i = 0; i < view.ndim; ++i) values *= view.shape[i];
  void* buffer = take_buffer(static_cast<size_t>(values) * view.type_bits / 8);
  if (!buffer) return nb::none();
  struct Lent : dlpack::ManagedTensor {
    int64_t size, stride;
  };
  Lent* lent = new Lent;
  lent->size = values;
  lent->stride = 1;
  lent->tensor = {buffer, 1, 0, 1, view.type_code, view.type_bits, 1, &lent->size, &lent->stride, 0};
  lent->context = nullptr;
  lent->deleter = [](dlpack::ManagedTensor* self) {  // from any thread, without Python
    release_buffer(self->tensor.data);
    delete static_cast<Lent*>(self);
  };
  return nb::steal(PyCapsule_New(static_cast<dlpack::ManagedTensor*>(lent), "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // a tensor took it over
    auto* unused = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    unused->deleter(unused);
  }));
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* const* k = usable_kernels(); *k; ++k) names.emplace_back((*k)->name);
  return names;
}

void choose_instruction_set(const std::string& name) {
  if (choose_kernels(name.c_str())) return;
  std::string known;
  for (const std::string& each : instruction_sets()) known += (known.empty() ? "" : ", ") + each;
  throw nb::value_error(
      ("this machine cannot run the instruction set '" + name + "': choose one of " + known + ".").c_str());
}

}  // namespace

// Tensors may be None, which nanobind asks to be told.
#define T(name) nb::arg(name).none()

NB_MODULE(_cpu, m) {
  // Graphs that live until the interpreter ends keep their passes; the report of that on stderr would alarm users.
  nb::set_leak_warnings(false);
  m.doc() = "The CPU core of batchnorm; batchnorm.kernels.cpu is its Python side.";
  m.def("forward", &forward, T("x"), T("y"), T("residual"), T("mask"), T("weight"), T("bias"), T("mean"), T("var"),
        nb::arg("eps"), nb::arg("activation"), nb::arg("reduces"), nb::arg("maps"), nb::arg("threads"));
  m.def("backward", &backward, T("dy"), T("x"), T("residual"), T("dx"), T("dresidual"), T("mask"), T("weight"),
        T("bias"), T("mean"), T("var"), nb::arg("eps"), nb::arg("activation"), T("sum_dz"), T("sum_dz_xhat"),
        nb::arg("count"), nb::arg("reduces"), nb::arg("maps"), nb::arg("is_estimated"), nb::arg("threads"));
  m.def("wide_stats", &wide_stats, T("x"), T("mean"), T("var"), nb::arg("threads"));
  nb::class_<Pass>(m, "Pass")
      .def_ro("count", &Pass::count)
      .def_ro("eps", &Pass::eps)
      .def_ro("is_estimated", &Pass::is_estimated)
      .def_ro("is_taken", &Pass::is_taken)
      .def("write", &Pass::write, T("mean"), T("var"));
  m.def("train", &train, T("x"), T("weight"), T("bias"), T("residual"), nb::arg("eps"), nb::arg("activation"),
        nb::arg("features"), nb::arg("threads"), T("mean"), T("var"), T("running_mean"), T("running_var"), T("tracked"),
        nb::arg("momentum"));
  m.def("train_in_graph", &train_in_graph, T("x"), T("weight"), T("bias"), nb::arg("eps"), nb::arg("features"),
        T("running_mean"), T("running_var"), T("tracked"), nb::arg("momentum"));
  m.def("infer", &infer, T("x"), T("weight"), T("bias"), T("residual"), nb::arg("eps"), nb::arg("activation"),
        nb::arg("features"), nb::arg("threads"), T("mean"), T("var"), T("out"));
  m.def("differentiate", &differentiate, nb::arg("done"), T("dy"), T("x"), T("weight"), T("bias"), T("residual"),
        nb::arg("wanted"), nb::arg("threads"));
  m.def("set_torch", &set_torch, nb::arg("tensor"), nb::arg("parameter"), nb::arg("empty_like"), nb::arg("is_neg"),
        nb::arg("new_large"), nb::arg("large"));
  m.def("install_node", [](const std::string& library) { return install_node(library.c_str()); });
  m.def("set_node", &set_node, nb::arg("cudnn_batch_norm"));
  m.def("update_running", &update_running, T("running_mean"), T("running_var"), T("tracked"), T("mean"), T("var"),
        nb::arg("count"), nb::arg("momentum"));
  m.def("pooled_like", &pooled_like, nb::arg("x"));
  m.def("limit_pool", &limit_pool, nb::arg("bytes"));
  m.def("usual_pool_limit", &usual_pool_limit);
  m.def("recycle_heap", &recycle_heap, nb::arg("bytes"));
  m.attr("POOLED_BYTES") = kPooledBytes;
  m.def("pool_state", [] {
    const PoolState state = pool_state();
    return std::vector<int64_t>{state.limit, state.idle, state.lent};
  });
  m.def("set_exchange_api", &set_exchange_api, T("capsule"));
  m.def("has_exchange_api", &has_exchange_api);
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("choose_instruction_set", &choose_instruction_set);
  m.def("forbid_threads", &forbid_threads);
  m.def("cache_bytes", [] { return std::vector<int64_t>{level2_bytes(), level3_bytes()}; });
}
