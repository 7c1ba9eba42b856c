// Runs kernels of csrc/ without torch. It says its form, three numbers: the bytes of a vector, the vectors
// of a tile, and whether bfloat16 is multiplied as it is. Then it answers calls, on standard input and
// output, as tests/csrc/runner.py writes and reads them; numbers have eight bytes, names 32.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "call_fields.h"
#include "kernels/dispatch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace {

// Memory, aligned to 64 bytes, with GUARD bytes before and behind it that nothing may touch.
class Memory {
 public:
  Memory(int64_t bytes, int filling)
      : size(static_cast<size_t>(bytes)), total_((size + 63) / 64 * 64 + 2 * GUARD) {
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(64, total_)));
    std::memset(memory_.get(), PATTERN, total_);
    std::memset(data(), filling, size);
    ASAN_POISON_MEMORY_REGION(memory_.get(), GUARD);
    ASAN_POISON_MEMORY_REGION(data() + size, total_ - GUARD - size);
  }

  unsigned char* data() const { return memory_.get() + GUARD; }
  bool is_guarded() const {
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), total_);
    const auto same = [](const unsigned char* first, const unsigned char* end) {
      return std::all_of(first, end, [](unsigned char byte) { return byte == PATTERN; });
    };
    return same(memory_.get(), data()) && same(data() + size, memory_.get() + total_);
  }

  const size_t size;

 private:
  static constexpr size_t GUARD = 64;
  static constexpr unsigned char PATTERN = 0xa5;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  size_t total_;
  std::unique_ptr<unsigned char, Free> memory_;
};

void require_guards(const Memory& memory, const char* name) {
  if (!memory.is_guarded()) {
    throw std::runtime_error(std::string(name) + ": written to beyond its ends");
  }
}

void read_bytes(void* to, size_t count) {
  if (std::fread(to, 1, count, stdin) != count) {
    throw std::runtime_error("the call ends early");
  }
}

int64_t read_number() {
  int64_t number;
  read_bytes(&number, sizeof number);
  return number;
}

std::string read_name() {
  char name[33] = {};
  read_bytes(name, 32);
  return name;
}

void write_bytes(const void* from, size_t count) {
  if (std::fwrite(from, 1, count, stdout) != count) {
    throw std::runtime_error("the answer has no reader");
  }
}

void write_number(int64_t number) { write_bytes(&number, sizeof number); }

constexpr int FILLING = 0xff;  // NaN, until it is written

// The fields of a call: the index of a buffer and an offset in it, or -1 and the value.
template <typename Call>
Call read_fields(const std::vector<Memory>& buffers) {
  Call call{};
  for (int64_t count = read_number(); count > 0; --count) {
    const std::string name = read_name();
    const int64_t buffer = read_number();
    int64_t value = read_number();
    if (buffer >= 0) {
      value += reinterpret_cast<int64_t>(buffers.at(static_cast<size_t>(buffer)).data());
    }
    const rowmax::CallField* found = nullptr;
    for (const rowmax::CallField& field : rowmax::CALL_FIELDS<Call>) {
      found = name == field.name ? &field : found;
    }
    if (found == nullptr) {
      throw std::runtime_error("no such field: " + name);
    }
    std::memcpy(reinterpret_cast<char*>(&call) + found->offset, &value, found->size);
  }
  return call;
}

template <typename Call>
void run(const rowmax::Kernel<Call>& kernel, Call& call, int64_t threads) {
  int64_t counters[8] = {};
  call.work_counter = counters;
  std::vector<std::thread> workers;
  for (int64_t n = 0; n < threads; ++n) {
    workers.emplace_back([&] {
      const Memory scratch(kernel.scratch_bytes(call), FILLING);
      kernel.run(call, scratch.data());
      require_guards(scratch, "scratch");
    });
  }
  for (std::thread& worker : workers) {
    worker.join();
  }
}

template <typename Call>
void read_and_run(const rowmax::Kernel<Call>& kernel, const std::vector<Memory>& buffers) {
  const int64_t threads = read_number();
  Call call = read_fields<Call>(buffers);
  run(kernel, call, threads);
}

// One call: its buffers, the kernel with the type of the tensors, threads and fields. The answer is a
// buffer that is written to beyond its ends, or -1, and the contents of all.
void answer() {
  std::vector<Memory> buffers;
  for (int64_t count = read_number(); count > 0; --count) {
    const Memory& buffer = buffers.emplace_back(read_number(), 0);
    read_bytes(buffer.data(), buffer.size);
  }
  const rowmax::Kernels& kernels = rowmax::chosen_kernels();
  const std::string name = read_name();
  const int64_t item = read_number();  // float, double, bfloat16, float16
  const int64_t type = item == 1 ? 1 : 0;
  const rowmax::PairKernels* pairs = item == 2 ? rowmax::pair_kernels() : nullptr;
  if (name == "attention_forward") {
    read_and_run(pairs != nullptr ? pairs->forward : kernels.attention_forward[type], buffers);
  } else if (name == "attention_backward") {
    read_and_run(pairs != nullptr ? pairs->backward : kernels.attention_backward[type], buffers);
  } else if (name == "attention_decode") {
    const int64_t threads = read_number();
    auto call = read_fields<rowmax::AttentionCall>(buffers);
    const Memory partials(kernels.attention_decode[type].partial_bytes(call), FILLING);
    call.partials = partials.data();
    run<rowmax::AttentionCall>(kernels.attention_decode[type], call, threads);
    require_guards(partials, "partials");
  } else if (name == "norm_forward") {
    read_and_run(kernels.norm_forward[item], buffers);
  } else if (name == "norm_backward") {
    read_and_run(kernels.norm_backward[item], buffers);
  } else if (name == "softmax_forward") {
    read_and_run(kernels.softmax_forward[item], buffers);
  } else if (name == "softmax_backward") {
    read_and_run(kernels.softmax_backward[item], buffers);
  } else if (name == "cross_entropy") {
    read_and_run(kernels.cross_entropy[item], buffers);
  } else {
    throw std::runtime_error("no such kernel: " + name);
  }
  int64_t damaged = -1;
  for (size_t n = 0; n < buffers.size(); ++n) {
    damaged = buffers[n].is_guarded() ? damaged : static_cast<int64_t>(n);
  }
  write_number(damaged);
  for (const Memory& buffer : buffers) {
    write_bytes(buffer.data(), buffer.size);
  }
}

}  // namespace

int main() {
  try {
    const rowmax::Kernels& kernels = rowmax::chosen_kernels();
    write_number(kernels.vector_bytes);
    write_number(kernels.vectors);
    write_number(rowmax::pair_kernels() != nullptr);
    std::fflush(stdout);
    for (int next = std::getchar(); next != EOF; next = std::getchar()) {
      answer();  // behind the byte that says there is one more
      std::fflush(stdout);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
