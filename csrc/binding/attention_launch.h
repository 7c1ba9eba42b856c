// Attention from a tensor's view to its kernels, for the operators and for calls straight from Python.

#pragma once

#include "binding/launch.h"

namespace rowmax {

// out = softmax(scale * q k^T) v without dropout, a bias or lse. With band_upper, query i attends no key
// after i + *band_upper; with key_lengths (B,) of int64, none that its batch element lacks; with dense
// (B | 1, H | 1, Lq | 1, Lk | 1) of bools, none where that is false. The views (B, H, L, D) fit each other; rows are contiguous.
void fast_path_attention(
    const View& query, const View& key, const View& value, const View& out, double scale,
    std::optional<int64_t> band_upper, const std::optional<View>& key_lengths,
    const std::optional<View>& dense);

// The operators attention_forward and attention_backward.
void register_attention();

}  // namespace rowmax
