#include "pool.hpp"

#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm {
namespace {

constexpr size_t kPage = 2 << 20;

struct Block {
  void* data;
  size_t size;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> idle;  // the oldest first
  std::unordered_map<void*, size_t> lent;
  int64_t limit = 0, idle_bytes = 0, lent_bytes = 0;
};

// Never destroyed: tensors may outlive the module's statics.
Pool& pool() {
  static Pool* const the_pool = new Pool;
  return *the_pool;
}

void shrink(Pool& p) {
  while (p.idle_bytes > p.limit) {
    const Block oldest = p.idle.front();
    p.idle.erase(p.idle.begin());
    p.idle_bytes -= static_cast<int64_t>(oldest.size);
    std::free(oldest.data);
  }
}

}  // namespace

void* take_buffer(size_t bytes) {
  const size_t size = (bytes + kPage - 1) / kPage * kPage;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  Block found{nullptr, 0};
  for (size_t i = p.idle.size(); i-- > 0;) {  // what was used last is likeliest in a cache
    if (p.idle[i].size < size || p.idle[i].size > size + size / 8) continue;
    found = p.idle[i];
    p.idle.erase(p.idle.begin() + static_cast<std::ptrdiff_t>(i));
    p.idle_bytes -= static_cast<int64_t>(found.size);
    break;
  }
  if (!found.data) {
    found = {std::aligned_alloc(kPage, size), size};
    if (!found.data) return nullptr;
#if defined(__linux__)
    madvise(found.data, size, MADV_HUGEPAGE);
#endif
  }
  p.lent.emplace(found.data, found.size);
  p.lent_bytes += static_cast<int64_t>(found.size);
  return found.data;
}

void release_buffer(void* buffer) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto lent = p.lent.find(buffer);
  const Block block{buffer, lent->second};
  p.lent.erase(lent);
  p.lent_bytes -= static_cast<int64_t>(block.size);
  p.idle_bytes += static_cast<int64_t>(block.size);
  p.idle.push_back(block);
  shrink(p);
}

PoolState pool_state() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return {p.limit, p.idle_bytes, p.lent_bytes};
}

void limit_pool(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.limit = bytes < 0 ? 0 : bytes;
  shrink(p);
}

}  // namespace batchnorm
