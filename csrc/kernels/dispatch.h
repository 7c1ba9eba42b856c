// The kernels of one instruction set, and the choice among sets.

#pragma once

#include <stdint.h>

#include "call_records.h"

namespace rowmax {

// `run` is called once on each thread, each with `scratch_bytes` of memory of its own that is aligned
// to 64 bytes. Contents of the memory are arbitrary.
template <typename Call>
struct Kernel {
  void (*run)(const Call& call, void* memory);
  int64_t (*scratch_bytes)(const Call& call);
};
using AttentionKernel = Kernel<AttentionCall>;
// With the bytes of call.partials.
struct DecodeKernel : AttentionKernel {
  int64_t (*partial_bytes)(const AttentionCall& call);
};
using NormKernel = Kernel<NormCall>;
using SoftmaxKernel = Kernel<SoftmaxCall>;
using CrossEntropyKernel = Kernel<CrossEntropyCall>;

struct Kernels {
  int vector_bytes;
  int vectors;  // of queries in a tile, at most
  // computed in float, double
  const AttentionKernel *attention_forward, *attention_backward;
  const DecodeKernel* attention_decode;
  // over items of float, double, bfloat16, float16
  const NormKernel *norm_forward, *norm_backward;
  const SoftmaxKernel *softmax_forward, *softmax_backward;
  const CrossEntropyKernel* cross_entropy;
};

#define ROWMAX_DECLARE_KERNELS(isa)                   \
  namespace isa {                                     \
  extern const AttentionKernel attention_forward[2];  \
  extern const AttentionKernel attention_backward[2]; \
  extern const DecodeKernel attention_decode[2];      \
  extern const NormKernel norm_forward[4];            \
  extern const NormKernel norm_backward[4];           \
  extern const SoftmaxKernel softmax_forward[4];      \
  extern const SoftmaxKernel softmax_backward[4];     \
  extern const CrossEntropyKernel cross_entropy[4];   \
  }

#if defined(__x86_64__)
ROWMAX_DECLARE_KERNELS(avx512)
ROWMAX_DECLARE_KERNELS(avx2)
#endif
ROWMAX_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
namespace avx512_bf16 {
extern const AttentionKernel attention_forward_pairs;
extern const AttentionKernel attention_backward_pairs;
}  // namespace avx512_bf16
#endif

// Forward and backward of bfloat16 tensors that multiply them as they are.
struct PairKernels {
  AttentionKernel forward, backward;
};

// The kernels of this processor's widest vectors, or of the width that the environment's
// ROWMAX_VECTOR_BITS asks for. Throws std::runtime_error where that names none.
const Kernels& chosen_kernels();

// Those by the processor's dot-product instructions; null where it has none, where narrower vectors are
// asked for, or where the environment's ROWMAX_BFLOAT16_DOTS is 0. Throws std::runtime_error where that
// is neither 0 nor 1.
const PairKernels* pair_kernels();

}  // namespace rowmax
