#include "pool.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif

namespace batchnorm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kPage = 2 << 20;

struct Block {
  void* data;
  size_t size;
  Clock::time_point since{};  // when it came back
  bool is_offered = false;    // the system may take its pages
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> idle;  // the oldest first
  std::unordered_map<void*, size_t> lent;
  int64_t limit = 0, idle_bytes = 0, lent_bytes = 0;
};

Pool& pool();

#if defined(__linux__)
// Straight from the system, so that what is freed is given back.
void* map_pages(size_t size) {
  void* const whole = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  char* const from = static_cast<char*>(whole);
  const size_t skipped = (kPage - reinterpret_cast<uintptr_t>(from) % kPage) % kPage;
  if (skipped) munmap(from, skipped);
  if (skipped < kPage) munmap(from + skipped + size, kPage - skipped);
  madvise(from + skipped, size, MADV_HUGEPAGE);
  return from + skipped;
}
void unmap_pages(const Block& block) { munmap(block.data, block.size); }
// Costs nothing while there is memory: the pages stay until the system needs them.
void offer_pages(const Block& block) { madvise(block.data, block.size, MADV_FREE); }
#else
void* map_pages(size_t size) { return std::aligned_alloc(kPage, (size + kPage - 1) / kPage * kPage); }
void unmap_pages(const Block& block) { std::free(block.data); }
void offer_pages(const Block&) {}
#endif

#if defined(__unix__) || defined(__APPLE__)
// A child of fork() gets the pool in order, whatever another thread was doing to it.
void lock_for_fork() { pool().mutex.lock(); }
void unlock_after_fork() { pool().mutex.unlock(); }
#endif

// Never destroyed: tensors may outlive the module's statics.
Pool& pool() {
  static Pool* const the_pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
  static const int is_registered = pthread_atfork(lock_for_fork, unlock_after_fork, unlock_after_fork);
  (void)is_registered;
#endif
  return *the_pool;
}

// Rounded up so that buffers of nearly one size can stand in for each other; at most an eighth is wasted.
size_t rounded(size_t bytes) {
  const size_t grain = bytes < 8 * kPage ? kPage / 16 : kPage;
  return (bytes + grain - 1) / grain * grain;
}

// Offers to the system what nobody asked for in a while. Not at once: it costs up to 60 us a buffer where another core
// has to forget the pages, too, more than the whole pass over a small one.
void offer_old_blocks(Pool& p, Clock::time_point now) {
  for (Block& block : p.idle) {
    if (now - block.since < std::chrono::seconds(kSecondsBeforeOffer)) break;
    if (!block.is_offered) offer_pages(block);
    block.is_offered = true;
  }
}

// The oldest buffers above the limit, which the caller frees once the pool is unlocked.
std::vector<Block> surplus(Pool& p) {
  size_t number = 0;
  while (p.idle_bytes > p.limit) p.idle_bytes -= static_cast<int64_t>(p.idle[number++].size);
  const auto end = p.idle.begin() + static_cast<std::ptrdiff_t>(number);
  const std::vector<Block> found(p.idle.begin(), end);
  p.idle.erase(p.idle.begin(), end);
  return found;
}

void free_all(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) unmap_pages(block);
}

int64_t number_in(const char* path) {
  long long value = 0;
  if (FILE* file = std::fopen(path, "r")) {
    if (std::fscanf(file, "%lld", &value) != 1) value = 0;  // cgroups say "max" for no limit
    std::fclose(file);
  }
  return value;
}

}  // namespace

int64_t usual_pool_limit() {
  constexpr int64_t most = int64_t{512} << 20;
  int64_t memory = most * 16;
#if defined(__unix__) || defined(__APPLE__)
  const int64_t physical = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  if (physical > 0 && physical < memory) memory = physical;
#endif
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    const int64_t allowed = number_in(path);
    if (allowed > 0 && allowed < memory) memory = allowed;
  }
  return memory / 16;
}

void* take_buffer(size_t bytes) {
  const size_t size = rounded(bytes);
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (p.limit == 0) return nullptr;
  Block found{nullptr, size};
  for (size_t i = p.idle.size(); i-- > 0;) {  // what was used last is likeliest in a cache
    if (p.idle[i].size < size || p.idle[i].size > size + size / 8) continue;
    found = p.idle[i];
    p.idle.erase(p.idle.begin() + static_cast<std::ptrdiff_t>(i));
    p.idle_bytes -= static_cast<int64_t>(found.size);
    break;
  }
  if (!found.data) {
    found.data = map_pages(size);
    if (!found.data) return nullptr;
  }
  p.lent.emplace(found.data, found.size);
  p.lent_bytes += static_cast<int64_t>(found.size);
  return found.data;
}

void release_buffer(void* buffer) {
  Pool& p = pool();
  std::vector<Block> freed;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    const auto lent = p.lent.find(buffer);
    const Block block{buffer, lent->second, Clock::now()};
    p.lent.erase(lent);
    p.lent_bytes -= static_cast<int64_t>(block.size);
    p.idle_bytes += static_cast<int64_t>(block.size);
    p.idle.push_back(block);
    freed = surplus(p);
    offer_old_blocks(p, block.since);
  }
  free_all(freed);
}

PoolState pool_state() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return {p.limit, p.idle_bytes, p.lent_bytes};
}

void limit_pool(int64_t bytes) {
  Pool& p = pool();
  std::vector<Block> freed;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.limit = bytes < 0 ? 0 : bytes;
    freed = surplus(p);
  }
  free_all(freed);
}

// glibc learns from what it frees: after a block of its own mapping, blocks up to that size come from the heap. So it
// goes on its own once a program has freed a tensor of that size.
void recycle_heap(int64_t bytes) {
#if defined(__GLIBC__)
  constexpr size_t largest_learned = 32 << 20, page = 4096;
  void* const volatile block = std::malloc(largest_learned - 2 * page);  // never touched: no memory is behind it
  std::free(block);
  constexpr int64_t learned = 2 * static_cast<int64_t>(largest_learned), most = INT32_MAX - (INT32_MAX % page);
  mallopt(M_TRIM_THRESHOLD, static_cast<int>(std::clamp(bytes, learned, most)));
#else
  static_cast<void>(bytes);
#endif
}

}  // namespace batchnorm
