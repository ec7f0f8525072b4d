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

// Of one channel, from its statistics and parameters.
template <class A> inline Coefficients<A> coefficients(double mean, double weight, double bias, double inverse_std) {
  const double scale = weight * inverse_std;
  const A rounded = static_cast<A>(mean);
  const double shift = bias + (static_cast<double>(rounded) - mean) * scale;
  return {rounded, static_cast<A>(scale), static_cast<A>(shift), 0, 0};
}
template <class A> inline Coefficients<A> coefficients(const Call& call, int64_t c) {
  return coefficients<A>(call.mean[c], read(call.weight, c, 1), read(call.bias, c, 0), inverse_std(call, c));
}

// The sum of dz * x_hat, from those of dz and dz * (x - rounded mean).
template <class A> inline double sum_dz_xhat(double mean, double inverse_std, double first, double second) {
  const double rest = static_cast<double>(static_cast<A>(mean)) - mean;
  return (second + rest * first) * inverse_std;
}

// Adds what dx owes to mean and variance: dx = weight * inv_std * (dz - (sum_dz + x_hat * sum_dz_xhat) / count).
template <class A>
inline void answer_to_statistics(Coefficients<A>& of, double mean, double weight, double inverse_std, double dz,
                                 double dz_xhat, double inverse_count) {
  const double rest = static_cast<double>(static_cast<A>(mean)) - mean;
  const double share = -weight * inverse_std * inverse_count, by_x = share * inverse_std * dz_xhat;
  of.by_x = static_cast<A>(by_x);
  of.constant = static_cast<A>(share * dz + rest * by_x);
}
inline bool answers_to_statistics(const Call& call) { return call.is_estimated && call.count > 0; }

// Memory cut from one piece, 64-byte aligned.
class Cutter {
 public:
  explicit Cutter(void* data) : at_(static_cast<char*>(data)) {}
  template <class T> T* cut(int64_t number) {
    T* out = reinterpret_cast<T*>(at_);
    at_ += (static_cast<size_t>(number) * sizeof(T) + 63) / 64 * 64;
    return out;
  }
 private:
  char* at_;
};

// Of neighbouring channels what their coefficients are made of, in loops that are vector code: four square roots and
// divisions a channel, one after the other, took half of the backward pass of 64x256.
struct ChannelValues {
  double *weight = nullptr, *bias = nullptr, *inverse_std = nullptr;

  ChannelValues() = default;
  ChannelValues(Cutter& from, int64_t channels)
      : weight(from.cut<double>(channels)), bias(from.cut<double>(channels)), inverse_std(from.cut<double>(channels)) {}

  void load(const Call& call, int64_t first, int64_t number) const {
    read(call.weight, first, number, 1, weight);
    read(call.bias, first, number, 0, bias);
    const double* __restrict var = call.var + first;
    double* __restrict out = inverse_std;
    const double eps = call.eps;
    for (int64_t c = 0; c < number; ++c) out[c] = 1 / sqrt(var[c] + eps);
  }

 private:
  static void read(const Parameter& parameter, int64_t first, int64_t number, double absent, double* __restrict to) {
    if (parameter.data && parameter.dtype == Dtype::float32) {
      const float* __restrict from = static_cast<const float*>(parameter.data) + first;
      for (int64_t c = 0; c < number; ++c) to[c] = static_cast<double>(from[c]);
    } else {
      for (int64_t c = 0; c < number; ++c) to[c] = BATCHNORM_ISA::read(parameter, first + c, absent);
    }
  }
};

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
