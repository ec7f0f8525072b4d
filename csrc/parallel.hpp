// Tasks on the threads of OpenMP, and scratch memory. Compiled once, for no special instruction set: code that the
// kernels of several instruction sets share must not be a template, or the linker could keep the wrong copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm {

// `next` is the task that the same thread will run after this one, or -1: what is to be prefetched.
using Task = void (*)(void* context, int64_t task, int64_t next);

// Runs the tasks 0 .. tasks - 1; returns when all are done. Each thread has a share of them, side by side, as torch cuts
// tensors too: so a pass finds in the caches of its core what the one before it left there. Who is done helps the others.
// A second pass goes through each share from the back, which was in use last.
enum class From { front, back };
void run_tasks(int64_t tasks, int threads, Task body, void* context, From from = From::front);

// Memory of this thread, 64-byte aligned; each of the two arenas holds until it is asked for again.
enum class Arena { call, task };
void* scratch(Arena arena, size_t bytes);

// True while the process may use more than one thread: no longer after a fork, whose child has no OpenMP threads.
void forbid_threads();
bool threads_are_forbidden();

}  // namespace batchnorm
