// Large output buffers, kept for the next call instead of given back to the system.
//
// The C library maps every block above 32 MB afresh, and the kernel then clears it page by page at the first touch:
// more work than the normalisation itself. Buffers here are aligned to 2 MB and may lie on huge pages. While they are
// idle, the system may take their pages whenever it runs short of memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm {

// Outputs below this size come from the C library, which recycles them itself as a rule.
constexpr int64_t kPooledBytes = 8 << 20;

// What may lie idle if nobody says otherwise: 512 MB, or a 16th of the memory of a small machine or container.
int64_t usual_pool_limit();

// A buffer of at least `bytes`, or null where the pool is off or there is no memory; goes back by `release_buffer`, from
// any thread, also after Python has ended.
void* take_buffer(size_t bytes);
void release_buffer(void* buffer);

struct PoolState {
  int64_t limit, idle, lent;  // bytes: most that may lie idle, now idle, now in use
};
PoolState pool_state();

// How many bytes may lie idle; what is above that is given back at once. 0 turns the pool off.
void limit_pool(int64_t bytes);

}  // namespace batchnorm
