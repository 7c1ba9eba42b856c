#include "kernels/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace rowmax {
namespace {

#define ROWMAX_KERNELS(isa, bytes, vectors) \
  {bytes,                                   \
   vectors,                                 \
   isa::attention_forward,                  \
   isa::attention_backward,                 \
   isa::attention_decode,                   \
   isa::norm_forward,                       \
   isa::norm_backward,                      \
   isa::softmax_forward,                    \
   isa::softmax_backward,                   \
   isa::cross_entropy}

#if defined(__aarch64__)
constexpr int kPortableVectors = 8;
#else
constexpr int kPortableVectors = 2;
#endif

// The widest first; vectors as TILE_VECTORS in gemm.h.
constexpr Kernels kAll[] = {
#if defined(__x86_64__)
    ROWMAX_KERNELS(avx512, 64, 4),
    ROWMAX_KERNELS(avx2, 32, 6),
#endif
    ROWMAX_KERNELS(portable, 16, kPortableVectors),
};

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (kernels.vector_bytes == 64) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  }
  if (kernels.vector_bytes == 32) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return true;
}

const Kernels& choose() {
  const char* asked = std::getenv("ROWMAX_VECTOR_BITS");
  const Kernels* widest = nullptr;
  for (const Kernels& kernels : kAll) {
    if (!runs_here(kernels)) {
      continue;
    }
    widest = widest == nullptr ? &kernels : widest;
    if (asked == nullptr || std::to_string(8 * kernels.vector_bytes) == asked) {
      return kernels;
    }
  }
  throw std::runtime_error(
      "ROWMAX_VECTOR_BITS: expected one of (512, 256, 128), at most " +
      std::to_string(8 * widest->vector_bytes) + " here, got '" + asked + "'");
}

const PairKernels* choose_pairs() {
  const char* variable = std::getenv("ROWMAX_BFLOAT16_DOTS");
  const std::string asked = variable == nullptr ? "1" : variable;
  if (asked != "0" && asked != "1") {
    throw std::runtime_error("ROWMAX_BFLOAT16_DOTS: expected 0 or 1, got '" + asked + "'");
  }
#if defined(__x86_64__)
  if (asked == "1" && chosen_kernels().vector_bytes == 64 && __builtin_cpu_supports("avx512bf16")) {
    static const PairKernels pairs{
        avx512_bf16::attention_forward_pairs, avx512_bf16::attention_backward_pairs};
    return &pairs;
  }
#endif
  return nullptr;
}

}  // namespace

const Kernels& chosen_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const PairKernels* pair_kernels() {
  static const PairKernels* const chosen = choose_pairs();
  return chosen;
}

}  // namespace rowmax
