#include "parallel.hpp"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#if defined(BATCHNORM_STD_THREADS)
#include <thread>
#include <vector>
#else
#include <omp.h>
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

// The tasks of one thread; a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> taken{0};
  int64_t first = 0, number = 0;
};

class Shares {
 public:
  Shares(int64_t tasks, int threads, From from) : shares_(new Share[threads]), threads_(threads), from_(from) {
    for (int t = 0; t < threads; ++t) {
      shares_[t].first = tasks * t / threads;
      shares_[t].number = tasks * (t + 1) / threads - shares_[t].first;
    }
  }

  // A thread's own share, then what is left of the others'.
  void work(int thread, Task body, void* context) {
    for (int k = 0; k < threads_; ++k) {
      Share& share = shares_[(thread + k) % threads_];
      // The next task is taken before the one in hand starts, so that the kernels can prefetch for it.
      int64_t task = take(share);
      while (task >= 0) {
        const int64_t next = take(share);
        body(context, task, next);
        task = next;
      }
    }
  }

 private:
  int64_t take(Share& share) const {
    const int64_t i = share.taken.fetch_add(1, std::memory_order_relaxed);
    if (i >= share.number) return -1;
    return share.first + (from_ == From::front ? i : share.number - 1 - i);
  }

  std::unique_ptr<Share[]> shares_;
  int threads_;
  From from_;
};

}  // namespace

void run_tasks(int64_t tasks, int threads, Task body, void* context, From from) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || threads_are_forbidden()) {
    for (int64_t i = 0; i < tasks; ++i)
      from == From::front ? body(context, i, i + 1 < tasks ? i + 1 : -1) : body(context, tasks - 1 - i, tasks - 2 - i);
    return;
  }
  Shares shares(tasks, threads, from);
#if defined(BATCHNORM_STD_THREADS)
  // For ThreadSanitizer, which does not see the synchronisation inside of libgomp.
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back([&, i] { shares.work(i, body, context); });
  shares.work(0, body, context);
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
  shares.work(omp_get_thread_num(), body, context);
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
