// How large the pieces of work are: every tile size and threshold of the core is decided here.
#pragma once

#include <cstdint>

#include "cache.hpp"
#include "call.hpp"

namespace batchnorm {

// Values that are summed in float before they are merged into float64 (see isa/moment.hpp).
constexpr int64_t kBlockValues = 16384;
// The same for one column of a matrix, whose sums have one accumulator instead of 64.
constexpr int64_t kBlockRows = 256;
// Columns that are worked on together: their coefficients and sums stay in the first-level cache.
constexpr int64_t kColumnBlock = 1024;
// Runs of one channel shorter than this many values are worked on as columns of a matrix instead.
constexpr int64_t kShortRun = 512;
// How far ahead matrices are prefetched, at least: the group of rows in hand must be left behind, too.
constexpr int64_t kPrefetchBytes = 4096;
// Work for which a second thread is worth waking.
constexpr int64_t kBytesPerThread = 64 << 10;
// Parts that the statistics of one tensor are taken in, where channels are too few to share among the threads. Fixed,
// so that a result depends on the shape only; more threads than this get one part each.
constexpr int64_t kParts = 32;

// What a channel group of the fused passes may hold of each tensor, so that it stays in the second-level cache
// between the two passes, with the next group on its way in.
inline int64_t tile_bytes(int tensors) { return level2_bytes() / 2 / tensors; }

// A single channel that is larger may still be worked on in one go while all threads' channels fit in the third level.
inline int64_t most_channel_bytes(int threads) { return level3_bytes() / 4 / (threads > 0 ? threads : 1); }

// Outputs bypass the caches once everything that is read and written does not fit in them anyway.
inline bool streams(int64_t bytes_read_and_written) { return bytes_read_and_written > level3_bytes(); }

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Threads that a call of so many bytes uses.
inline int useful_threads(int threads, int64_t bytes) {
  const int64_t worth = bytes / kBytesPerThread;
  return worth < 1 ? 1 : worth < threads ? static_cast<int>(worth) : threads;
}

}  // namespace batchnorm
