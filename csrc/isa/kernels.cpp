// The core for one instruction set: chooses the kernels for a call. CMakeLists.txt compiles this file once for each.
#include "matrix.hpp"
#include "planar.hpp"
#include "wide_stats.hpp"

namespace batchnorm {
#if defined(__AVX512BF16__)
namespace avx512 { extern const Kernels kernels; }
#endif
namespace BATCHNORM_ISA {
namespace {

int64_t tensor_bytes(const Call& call) { return call.N * call.C * call.L * bytes_of(call.dtype); }

// Short runs go as columns of a matrix, if neighbouring channels are neighbours in memory.
bool is_matrix(const Call& call) {
  if (call.layout == Layout::channels_last) return true;
  if (!is_short(call.L, call.N, tensor_bytes(call), call.threads) || call.mask) return false;
  if (!call.reduces && call.L >= kShortestRun) return false;
  for (const Operand* operand : {&call.x, &call.residual, &call.y, &call.dy, &call.dx, &call.dresidual})
    if (operand->data && operand->stride_c != call.L) return false;
  return true;
}

template <class T, Kind K> void forward_as(const Call& call) {
  const int moved = 2 + (call.residual.data != nullptr);
  const bool stream = call.y.data && call.y.data != call.x.data && streams(tensor_bytes(call) * moved);
  if (is_matrix(call)) MatrixRun<MatrixForward<T, K>>(call, 1, stream)();
  else run_planar<PlanarForward<T, K>>(call, 1, stream);
}

template <class T, Kind K> void backward_as(const Call& call) {
  const int moved = 3 + (call.residual.data != nullptr) + (call.dresidual.data != nullptr);
  const bool stream = call.maps && streams(tensor_bytes(call) * moved);
  if (is_matrix(call)) MatrixRun<MatrixBackward<T, K>>(call, 2, stream)();
  else run_planar<PlanarBackward<T, K>>(call, 2, stream);
}

template <template <class, Kind> class F, class T> void by_kind(const Call& call) {
  switch (kind_of(call.activation)) {
    case Kind::none: return F<T, Kind::none>::run(call);
    case Kind::relu: return F<T, Kind::relu>::run(call);
    case Kind::other: return F<T, Kind::other>::run(call);
  }
}

template <class T, Kind K> struct Forward {
  static void run(const Call& call) { forward_as<T, K>(call); }
};
template <class T, Kind K> struct Backward {
  static void run(const Call& call) { backward_as<T, K>(call); }
};

#if defined(__AVX512BF16__)
// Only what the instructions for bfloat16 change is compiled once more.
void forward(const Call& call) {
  if (call.dtype == Dtype::bfloat16) by_kind<Forward, bfloat16>(call);
  else avx512::kernels.forward(call);
}
void backward(const Call& call) {
  if (call.dtype == Dtype::bfloat16) by_kind<Backward, bfloat16>(call);
  else avx512::kernels.backward(call);
}
#else
template <template <class, Kind> class F> void by_dtype(const Call& call) {
  switch (call.dtype) {
    case Dtype::float32: return by_kind<F, float>(call);
    case Dtype::float64: return by_kind<F, double>(call);
    case Dtype::bfloat16: return by_kind<F, bfloat16>(call);
    case Dtype::float16: return by_kind<F, float16>(call);
  }
}

void forward(const Call& call) { by_dtype<Forward>(call); }
void backward(const Call& call) { by_dtype<Backward>(call); }
#endif

#define BATCHNORM_TEXT_(name) #name
#define BATCHNORM_TEXT(name) BATCHNORM_TEXT_(name)

}  // namespace

extern const Kernels kernels;
const Kernels kernels{BATCHNORM_TEXT(BATCHNORM_ISA), forward, backward, wide_stats};

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
