// What is done to each channel, computed in float64 from its statistics, parameters and sums.
#pragma once

#include <math.h>

#include "row.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

inline double read(const Parameter& parameter, int64_t c, double absent) {
  if (!parameter.data) return absent;
  switch (parameter.dtype) {
    case Dtype::float64: return static_cast<const double*>(parameter.data)[c];
    case Dtype::float32: return static_cast<const float*>(parameter.data)[c];
    case Dtype::bfloat16: return Storage<bfloat16>::widen(static_cast<const bfloat16*>(parameter.data)[c]);
    default: return Storage<float16>::widen(static_cast<const float16*>(parameter.data)[c]);
  }
}

inline double inverse_std(const Call& call, int64_t c) { return 1 / sqrt(call.var[c] + call.eps); }

// Of channel c, from call.mean and call.var.
template <class A> inline Coefficients<A> coefficients(const Call& call, int64_t c) {
  const double mean = call.mean[c];
  const double scale = read(call.weight, c, 1) * inverse_std(call, c);
  const A rounded = static_cast<A>(mean);
  const double shift = read(call.bias, c, 0) + (static_cast<double>(rounded) - mean) * scale;
  return {rounded, static_cast<A>(scale), static_cast<A>(shift), 0, 0};
}

// Turns sums of dz and dz * (x - rounded mean) into those of dz and dz * x_hat.
template <class A> inline void write_sums(const Call& call, int64_t c, double first, double second) {
  const double mean = call.mean[c], rest = static_cast<double>(static_cast<A>(mean)) - mean;
  call.sum_dz[c] = first;
  call.sum_dz_xhat[c] = (second + rest * first) * inverse_std(call, c);
}

// Adds what dx owes to mean and variance: dx = weight * inv_std * (dz - (sum_dz + x_hat * sum_dz_xhat) / count).
template <class A> inline void answer_to_statistics(const Call& call, int64_t c, Coefficients<A>& of) {
  if (!call.is_estimated || call.count == 0) return;
  const double mean = call.mean[c], rest = static_cast<double>(of.mean) - mean;
  const double inv_std = inverse_std(call, c), share = -read(call.weight, c, 1) * inv_std / static_cast<double>(call.count);
  const double by_x = share * inv_std * call.sum_dz_xhat[c];
  of.by_x = static_cast<A>(by_x);
  of.constant = static_cast<A>(share * call.sum_dz[c] + rest * by_x);
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
