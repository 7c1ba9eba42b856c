// Running a kernel without torch: threads, counters, and scratch memory that holds NaN.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <thread>

#include "kernels/dispatch.h"
#include "storage.h"

namespace parity {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory aligned to cache lines, every byte of it `byte`.
inline std::unique_ptr<void, Free> aligned_memory(int64_t bytes, int byte) {
  const size_t rounded = static_cast<size_t>(std::max<int64_t>(64, (bytes + 63) / 64 * 64));
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, rounded));
  std::memset(memory.get(), byte, rounded);
  return memory;
}

template <typename Call>
void run(const rowmax::Kernel<Call>& kernel, Call& call, int64_t threads) {
  int64_t counters[8] = {};
  call.work_counter = counters;
  std::vector<std::thread> workers;
  for (int64_t n = 0; n < threads; ++n) {
    workers.emplace_back([&kernel, &call] {
      kernel.run(call, aligned_memory(kernel.scratch_bytes(call), 0xff).get());
    });
  }
  for (std::thread& worker : workers) {
    worker.join();
  }
}

}  // namespace parity
