// How a batch enters running statistics: the arithmetic of batchnorm.stats.running in one pass without Python.
#pragma once

#include <cstdint>

#include "call.hpp"

namespace batchnorm {

// running += momentum * (batch - running), with the batch's variance unbiased; momentum < 0 is the plain average over
// all batches, 1 / batches. Nothing but the counter changes where count is 0; nothing at all, and false is returned,
// where a mean or variance is not finite. `batches` may be null; it is counted up.
bool take_in(const Parameter& running_mean, const Parameter& running_var, int64_t* batches, const double* mean,
             const double* var, int64_t channels, int64_t count, double momentum);

}  // namespace batchnorm
