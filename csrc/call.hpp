// What one call of the core is told: pointers, sizes, strides. No Python, no torch.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
enum class Activation : int { none = 0, relu = 1, leaky_relu = 2, silu = 3, gelu = 4, sigmoid = 5, tanh = 6 };

// planar: the positions of one channel lie side by side (NCHW), stride of L is 1.
// channels_last: the channels of one position lie side by side (NHWC and (M, C)), stride of C is 1, and all positions
// have one common stride, so that N and L together are rows of a matrix.
enum class Layout : int { planar = 0, channels_last = 1 };

// One (N, C, L) array; strides count elements. data is null where the operand is absent.
struct Operand {
  void* data = nullptr;
  int64_t stride_n = 0;
  int64_t stride_c = 0;
  int64_t stride_l = 0;
};

// weight or bias: (C,), contiguous, of the dtype of x or float32; null is 1 or 0.
struct Parameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

struct Call {
  int64_t N = 0, C = 0, L = 0;
  Layout layout = Layout::planar;
  Dtype dtype = Dtype::float32;
  Activation activation = Activation::none;

  Operand x, residual;      // read
  Operand y;                // forward: written; may be x itself
  Operand dy;               // backward: read
  Operand dx, dresidual;    // backward: written
  const uint8_t* mask = nullptr;  // N * L bytes, 1 = counts; null counts everything

  Parameter weight, bias;
  double eps = 0;

  // (C,) each. forward writes mean and var where it reduces and reads them where it does not.
  double* mean = nullptr;
  double* var = nullptr;  // biased
  int64_t count = 0;      // values of a channel that the mask lets count
  // (C,) each, backward: written where it reduces, read where it does not.
  double* sum_dz = nullptr;
  double* sum_dz_xhat = nullptr;

  bool reduces = true;      // first half: stats, backward_reduce
  bool maps = true;         // second half: apply, backward_apply
  bool is_estimated = true;  // backward: mean and var are those of x, and answer to its gradient
  int threads = 1;
};

// The core, compiled once for each instruction set.
struct Kernels {
  const char* name;
  void (*forward)(const Call&);
  void (*backward)(const Call&);
  void (*wide_stats)(const Call&);  // mean and var of x in float64 throughout, without a mask
};

}  // namespace batchnorm
