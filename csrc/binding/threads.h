// Threads and the memory that they work in. The threads are torch's own: there is one pool in the
// process, and torch.set_num_threads is obeyed.

#pragma once

#include <cstdint>

#include "binding/libtorch.h"

namespace rowmax {

// How many threads will take `tasks` tasks.
int64_t thread_count(int64_t tasks);

// At least `bytes` of memory, aligned to 64 bytes, with arbitrary contents. It is the calling thread's
// own, kept until the next call of this function, and grown when that needs more.
char* workspace(int64_t bytes);

// run(thread) once for each of `threads` threads, as far as possible at the same time.
template <typename Run>
void run_on_threads(int64_t threads, const Run& run) {
  if (threads == 1) {
    run(0);
    return;
  }
  parallel_for(threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      run(thread);
    }
  });
}

}  // namespace rowmax
