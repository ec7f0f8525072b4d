#include "running.hpp"

#include <cmath>

namespace batchnorm {
namespace {

template <class T>
void blend(const Parameter& running, const double* batch, int64_t channels, double momentum, double factor) {
  T* values = static_cast<T*>(const_cast<void*>(running.data));
  for (int64_t c = 0; c < channels; ++c) {
    const double now = static_cast<double>(values[c]);
    values[c] = static_cast<T>(now + momentum * (batch[c] * factor - now));
  }
}

void blend(const Parameter& running, const double* batch, int64_t channels, double momentum, double factor) {
  if (running.dtype == Dtype::float64) blend<double>(running, batch, channels, momentum, factor);
  else blend<float>(running, batch, channels, momentum, factor);
}

}  // namespace

bool take_in(const Parameter& running_mean, const Parameter& running_var, int64_t* batches, const double* mean,
             const double* var, int64_t channels, int64_t count, double momentum) {
  if (count == 0) {
    if (batches) ++*batches;  // torch counts an empty batch too
    return true;
  }
  bool is_finite = true;
  for (int64_t c = 0; c < channels; ++c) is_finite = is_finite && std::isfinite(mean[c] + var[c]);
  if (!is_finite) return false;
  if (momentum < 0) {
    if (!batches) return true;
    momentum = 1.0 / static_cast<double>(*batches + 1);
  }
  const double bessel = static_cast<double>(count) / static_cast<double>(count - 1);
  blend(running_mean, mean, channels, momentum, 1);
  blend(running_var, var, channels, momentum, bessel);
  if (batches) ++*batches;
  return true;
}

}  // namespace batchnorm
