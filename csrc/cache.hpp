// Sizes of the caches of this machine, in bytes.
#pragma once

#include <cstdint>

namespace batchnorm {

int64_t level2_bytes();  // of one core
int64_t level3_bytes();  // shared

}  // namespace batchnorm
