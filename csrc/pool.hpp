// Memory that is kept for the next call instead of given back to the system: large output buffers, and the heap's end.
//
// What the C library maps afresh the kernel clears page by page at the first touch: more work than the normalisation
// itself. Buffers here are aligned to 2 MB and may lie on huge pages. Once they were idle for a while, the system may
// take their pages whenever it runs short of memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm {

// Outputs below this size come from the C library, which recycles them itself as a rule, and hands out what was in use
// last: between matrix products 512x512 took about 100 us so, and 160 us from here. From this size on it often does not
// recycle: 1300 page faults in a forward and backward pass of 6 MB, 3.4 ms instead of 1.1 ms (glibc 2.36 on a virtual
// machine).
constexpr int64_t kPooledBytes = 4 << 20;

// How long a buffer lies idle before its pages are offered to the system: longer than a training step.
constexpr int kSecondsBeforeOffer = 5;

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

// Lets the C library keep up to `bytes` of what was freed at the end of its heap, 64 MB at least, for everybody in the
// process.
void recycle_heap(int64_t bytes);

}  // namespace batchnorm
