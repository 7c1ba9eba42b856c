// What the launches share: reading torch's tensors, and running a kernel on threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "binding/libtorch.h"
#include "binding/threads.h"
#include "kernels/dispatch.h"

namespace rowmax {

using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

// A tensor in memory; sizes and strides, in elements, are its own.
struct View {
  void* data;
  ScalarType dtype;
  int64_t dimensions;
  const int64_t *sizes, *strides;
};

inline View view_of(const Tensor& tensor, const char* name) {
  require(tensor.dim() == 4, name, ": expected 4 dimensions, got ", tensor.dim());
  return {tensor.data_ptr(), tensor.scalar_type(), tensor.dim(), tensor.sizes(), tensor.strides()};
}

template <typename T>
const T* address(const MaybeTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}
inline void* mutable_address(const MaybeTensor& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

// The stride with 0 for a dimension of size 1.
inline int64_t broadcast_stride(const Tensor& tensor, int64_t dimension) {
  return tensor.sizes()[dimension] == 1 ? 0 : tensor.strides()[dimension];
}
inline int64_t broadcast_stride(const View& view, int64_t dimension) {
  return view.sizes[dimension] == 1 ? 0 : view.strides[dimension];
}
// The call's strides of a tensor that broadcasts to (B, H, Lq, Lk).
#define ROWMAX_SET_BROADCAST(name, tensor)         \
  call.name##_batch = broadcast_stride(tensor, 0); \
  call.name##_head = broadcast_stride(tensor, 1);  \
  call.name##_row = broadcast_stride(tensor, 2);   \
  call.name##_column = broadcast_stride(tensor, 3)

// Words below this drop. p = 1 wants 2**32, one more than a word holds; a scale of 0 drops what is left.
inline int64_t dropout_threshold(double dropout_p) {
  return std::min<int64_t>(static_cast<int64_t>(std::nearbyint(dropout_p * 0x1p32)), 0xffffffff);
}
inline double dropout_scale(double dropout_p) {
  return dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0;
}

// Runs a kernel on as many threads as there are tasks. Before it share(zeros, memory) is told where
// `zeros` bytes of zeros and `shared` bytes of memory lie that all threads share.
template <typename Call, typename Share>
void run_kernel(
    const Kernel<Call>& kernel, Call& call, int64_t tasks, int64_t zeros, int64_t shared,
    const Share& share) {
  constexpr int64_t counters = 64;
  const int64_t threads = thread_count(tasks);
  const int64_t scratch = round_up(kernel.scratch_bytes(call), 64);
  zeros = round_up(zeros, 64);
  shared = round_up(shared, 64);
  char* memory = workspace(counters + zeros + shared + threads * scratch);
  std::memset(memory, 0, static_cast<size_t>(counters + zeros));
  call.work_counter = reinterpret_cast<int64_t*>(memory);
  share(memory + counters, memory + counters + zeros);
  char* own = memory + counters + zeros + shared;
  run_on_threads(threads, [&](int64_t thread) { kernel.run(call, own + thread * scratch); });
}

}  // namespace rowmax
