#include "binding/threads.h"

#include <pthread.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace rowmax {
namespace {

// Whether threads were started by this process, or by the one it was forked from. OpenMP's threads do
// not survive a fork, and waiting for them would hang: a child of a process that had started them
// works alone, with the same bits.
std::atomic<bool> started{false};
std::atomic<bool> inherited{false};

const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
  if (started) {
    inherited = true;
  }
});

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

}  // namespace

int64_t thread_count(int64_t tasks) {
  if (tasks <= 1 || inherited) {
    return 1;
  }
  const int64_t threads = std::min(get_num_threads(), tasks);
  if (threads > 1) {
    started = true;
  }
  return threads;
}

char* workspace(int64_t bytes) {
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    const int64_t rounded = (bytes + 63) / 64 * 64;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(rounded))));
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    size = rounded;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory.get(), static_cast<size_t>(size));  // see Scratch
#endif
#ifdef ROWMAX_POISON
  std::memset(memory.get(), 0xff, static_cast<size_t>(size));  // NaN, in every type
#endif
  return memory.get();
}

}  // namespace rowmax
