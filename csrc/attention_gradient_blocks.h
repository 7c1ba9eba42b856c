// One block of scores in the backward pass: its weights, their gradients, and the bias gradient.

#pragma once

#include "attention_tiles.h"

namespace rowmax {
namespace ROWMAX_ISA {

// Per query: lse * log2 e, rounded, and the rest of it; delta; the first and last key.
template <typename T>
struct QueryTerms {
  T *lse2, *rest, *delta;
  IntOf<T>*first, *last;
};

// P (or P * M) in the place of the block's scores, and dS in the place of its dP.
template <typename T>
inline void gradient_block(
    const AttentionCall& call, const Tile& tile, bool masked, int64_t k0, int64_t keys, T* scores,
    T* d_weights, const QueryTerms<T>& of) {
  const Vec<T> zero{};
  for (int64_t v = 0; v < tile.width; v += LANES<T>) {
    const Vec<T> lse2 = load(of.lse2 + v), rest = load(of.rest + v), delta = load(of.delta + v);
    const Ints<T> low = load(of.first + v), high = load(of.last + v);
    if (!call.dropout) {
      for (int64_t k = 0; k < keys; ++k) {
        const int64_t at = k * tile.width + v;
        Vec<T> weight = exp2<T>(load(scores + at) - lse2 - rest);
        if (masked) {
          weight = select(in_range<T>(k0 + k, low, high), weight, zero);
        }
        store(scores + at, weight);
        store(d_weights + at, weight * (load(d_weights + at) - delta));
      }
      continue;
    }
    const Vec<T> keep_scale = splat(static_cast<T>(call.keep_scale));
    for (int64_t group = k0 / 4; group < (k0 + keys + 3) / 4; ++group) {
      const RandomWords<T> words = random_words<T>(call, tile, v, group);
      for (int64_t n = 0; n < 4; ++n) {
        const int64_t k = 4 * group + n - k0;
        if (k < 0 || k >= keys) {
          continue;
        }
        const int64_t at = k * tile.width + v;
        const Vec<T> all = exp2<T>(load(scores + at) - lse2 - rest);
        const Vec<T> weight = select(in_range<T>(k0 + k, low, high), all, zero);
        const Vec<T> keep = select(at_least<T>(words.word[n], call.threshold), keep_scale, zero);
        store(scores + at, weight * keep);
        store(d_weights + at, weight * (load(d_weights + at) * keep - delta));
      }
    }
  }
}

// target[i, j] += dS^T[j, i], summed in float64 over a dimension whose stride is 0.
template <typename T, typename Target>
inline void add_bias_gradient(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, const T* d_scores,
    Target* target) {
  const int64_t row = call.d_bias_row, column = call.d_bias_column;
  target += tile.b * call.d_bias_batch + tile.h * call.d_bias_head + tile.start * row + k0 * column;
  if (row == 0) {
    for (int64_t k = 0; k < keys; ++k) {
      double total = 0.0;
      for (int64_t r = 0; r < tile.rows; ++r) {
        total += static_cast<double>(d_scores[k * tile.width + r]);
      }
      target[k * column] += static_cast<Target>(total);
    }
  } else if (column == 0) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      double total = 0.0;
      for (int64_t k = 0; k < keys; ++k) {
        total += static_cast<double>(d_scores[k * tile.width + r]);
      }
      target[r * row] += static_cast<Target>(total);
    }
  } else {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t k = 0; k < keys; ++k) {
        target[r * row + k * column] += static_cast<Target>(d_scores[k * tile.width + r]);
      }
    }
  }
}

template <typename T>
inline void add_to_bias(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, const T* d_scores) {
  if (call.d_bias_wide) {
    add_bias_gradient(call, tile, k0, keys, d_scores, static_cast<double*>(call.d_bias));
  } else {
    add_bias_gradient(call, tile, k0, keys, d_scores, static_cast<T*>(call.d_bias));
  }
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
