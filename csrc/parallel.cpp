#include "parallel.hpp"

#include <atomic>
#include <cstdlib>
#include <new>
#if defined(BATCHNORM_STD_THREADS)
#include <thread>
#include <vector>
#endif

namespace batchnorm {
namespace {

std::atomic<bool> is_forbidden{false};

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[2];

// Each thread takes its next task before it starts the one in hand, so that the kernels can prefetch for it.
void work(std::atomic<int64_t>& queue, int64_t tasks, Task body, void* context) {
  int64_t task = queue.fetch_add(1, std::memory_order_relaxed);
  while (task < tasks) {
    const int64_t next = queue.fetch_add(1, std::memory_order_relaxed);
    body(context, task, next < tasks ? next : -1);
    task = next;
  }
}

}  // namespace

void run_tasks(int64_t tasks, int threads, Task body, void* context) {
  std::atomic<int64_t> queue{0};
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || threads_are_forbidden()) {
    work(queue, tasks, body, context);
    return;
  }
#if defined(BATCHNORM_STD_THREADS)
  // For ThreadSanitizer, which does not see the synchronisation inside of libgomp.
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back([&] { work(queue, tasks, body, context); });
  work(queue, tasks, body, context);
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
  work(queue, tasks, body, context);
#endif
}

void* scratch(Arena arena, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(arena)];
  if (bytes > buffer.size) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (buffer.data == nullptr) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

void forbid_threads() { is_forbidden.store(true); }
bool threads_are_forbidden() { return is_forbidden.load(std::memory_order_relaxed); }

}  // namespace batchnorm
