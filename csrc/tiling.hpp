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
// Values of a channel whose mean is near enough to that of all to sum about.
constexpr int64_t kShiftValues = 8;
// Columns that are worked on together: their coefficients and sums stay in the first-level cache.
constexpr int64_t kColumnBlock = 1024;
// Where there is one pass only, and stores go through the caches, runs from this length on are worked on as they lie.
constexpr int64_t kShortestRun = 32;
// Values of one channel that make a piece of work, where a channel has too many for one.
constexpr int64_t kLeastPiece = 8192, kMostPiece = 65536;
// Values that make a piece of work where there is one pass only.
constexpr int64_t kMapValues = 65536;
// Bytes of each tensor that make one where a matrix's rows are mapped.
constexpr int64_t kMapBytes = 256 << 10;
// Rows of a matrix that one part of its statistics should have: merging a part costs as much as some dozen rows.
constexpr int64_t kPartRows = 256;
// Columns of a matrix that one thread takes as one tile: each tile has its price. (8x16x8x8: 1.13 times as fast as in four.)
constexpr int64_t kTileColumns = 2048;
// How far ahead matrices are prefetched, at least: the group of rows in hand must be left behind, too.
constexpr int64_t kPrefetchBytes = 4096;
// Work for which a second thread is worth waking.
constexpr int64_t kBytesPerThread = 128 << 10;
// The most parts that the statistics of one matrix are taken in; more threads than this get one part each.
constexpr int64_t kParts = 32;

// What a channel group of the fused passes may hold of each tensor, so that it stays in the second-level cache
// between the two passes, with the next group on its way in.
inline int64_t tile_bytes(int tensors) { return level2_bytes() / 2 / tensors; }

// A single channel that is larger may still be worked on in one go while all threads' channels fit in the third level.
inline int64_t most_channel_bytes(int threads) { return level3_bytes() / 4 / (threads > 0 ? threads : 1); }

// Outputs bypass the caches once they and what is read would fill half of the third level: other tensors lie there, too, and
// what comes into it to be written is read from memory first. (Zen 4, 32 MB, with whoever reads the output next: 18 MB
// moved, 32x128x24x24 forward, go in 0.94 of the time, 24 MB, 128x16x32x32 backward, in 0.92.)
inline bool streams(int64_t bytes_read_and_written) { return bytes_read_and_written > level3_bytes() / 2; }

// Whether the next run's output is fetched while this one's is written, where outputs go through the caches: the hardware
// looks ahead within a page only. What lies in the second-level caches as a rule is not worth the instruction. (Zen 4,
// 32x64x28x28: forward in 0.74 of the time, backward in 0.70. 1 MB of bfloat16, in those caches: 1.2 times as long.)
inline bool fetches_output(int64_t run_bytes, int64_t bytes_read_and_written, int threads) {
  return run_bytes <= 8192 && bytes_read_and_written > 2 * level2_bytes() * threads;
}

// Whether what is read, and as much that is written, lies in the threads' second-level caches as a rule.
inline bool is_small(int64_t bytes_read, int threads) { return bytes_read <= level2_bytes() / 2 * threads; }

// Whether runs of one channel are worked on as columns of a matrix: those shorter than 512 values; from 128 on only where the
// tensor is larger than the second-level caches (Zen 4, two threads: as runs 32x64x16x16 takes 0.7 of the time, but
// 64x256x14x14 1.6), and a column has rows enough for what is set up for it (2x256x14x14 as runs: 0.45).
inline bool is_short(int64_t run, int64_t rows, int64_t tensor_bytes, int threads) {
  return run < 128 || (run < 512 && rows * 32 > run && tensor_bytes > level2_bytes() * threads);
}

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Runs that fill whole cache lines together, so that what starts behind them is as aligned as they are.
inline int64_t runs_of_lines(int64_t run_bytes) {
  int64_t runs = 1;
  while (runs * run_bytes % 64) runs *= 2;
  return runs;
}

// Runs of one channel that make a piece of work where there is one pass only: some for each thread, if they suffice.
inline int64_t runs_together(int64_t runs, int64_t length, int64_t value_bytes, int threads) {
  const int64_t most = kMapValues / length, fair = runs / (4 * threads), unit = runs_of_lines(length * value_bytes);
  const int64_t together = (most < fair ? most : fair) / unit * unit;
  return together > 0 ? together : unit;
}

// Channels that make a piece of work where each is worked on in one go: several small ones, as each piece has its price.
inline int64_t channels_together(int64_t channels, int64_t channel_bytes, int threads) {
  const int64_t most = kMapBytes / 4 / channel_bytes, fair = channels / (4 * threads);
  const int64_t together = most < fair ? most : fair;
  return together > 0 ? together : 1;
}

// Parts that the statistics of a matrix are taken in.
inline int64_t parts_of(int64_t rows, int64_t bytes, int threads) {
  int64_t parts = bytes / (2 * kBytesPerThread);
  if (parts > kParts) parts = kParts;
  if (parts > rows / kPartRows) parts = rows / kPartRows;
  if (parts < threads) parts = threads;
  if (parts > rows / 8) parts = rows / 8;
  return parts > 0 ? parts : 1;
}

// Rows of a matrix that make a piece of work where values are mapped: each thread has one at least.
inline int64_t map_rows(int64_t rows, int64_t row_bytes, int threads) {
  const int64_t most = kMapBytes / row_bytes + 1, fair = (rows + threads - 1) / threads;
  return fair < 1 ? 1 : most < fair ? most : fair;
}

// Threads that a call of so many bytes uses.
inline int useful_threads(int threads, int64_t bytes) {
  const int64_t worth = bytes / kBytesPerThread;
  return worth < 1 ? 1 : worth < threads ? static_cast<int>(worth) : threads;
}

}  // namespace batchnorm
