// Attention from a tensor's view to its kernels, for the operators and for calls straight from Python.

#pragma once

#include "launch.h"

namespace rowmax {

// A tensor (B, H, L, D) in memory; sizes and strides, in elements, are its own.
struct View {
  void* data;
  ScalarType dtype;
  const int64_t *sizes, *strides;
};

// out = softmax(scale * q k^T) v without dropout, a bias or lse. With band_upper, query i attends no key
// after i + *band_upper. The views fit each other; rows are contiguous.
void plain_attention(
    const View& query, const View& key, const View& value, const View& out, double scale,
    std::optional<int64_t> band_upper);

}  // namespace rowmax
