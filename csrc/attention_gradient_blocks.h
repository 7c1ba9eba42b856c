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

// P in the place of the block's scores, and dS in the place of its dP. Rows of the block are taken one
// after another, as they lie in memory, with the terms of `vectors` vectors of queries in registers.
template <int vectors, typename T>
inline void gradient_rows(
    bool masked, int64_t k0, int64_t keys, T* scores, T* d_weights, const QueryTerms<T>& of) {
  constexpr int lanes = LANES<T>, width = vectors * lanes;
  Vec<T> lse2[vectors], rest[vectors], delta[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    lse2[v] = load(of.lse2 + v * lanes);
    rest[v] = load(of.rest + v * lanes);
    delta[v] = load(of.delta + v * lanes);
  }
  const IntOf<T>*first = of.first, *last = of.last;
  const auto rows = [&](auto of_mask) {
    for (int64_t k = 0; k < keys; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = k * width + v * lanes;
        Vec<T> weight = exp2<T>(load(scores + at) - lse2[v] - rest[v]);
        if constexpr (of_mask) {
          const Ints<T> low = load_bits<Ints<T>>(first + v * lanes);
          const Ints<T> high = load_bits<Ints<T>>(last + v * lanes);
          weight = select(in_range<T>(k0 + k, low, high), weight, Vec<T>{});
        }
        store(scores + at, weight);
        store(d_weights + at, weight * (load(d_weights + at) - delta[v]));
      }
    }
  };
  if (masked) {
    rows(std::true_type{});
  } else {
    rows(std::false_type{});
  }
}

// The same with dropout, P * M in the place of the scores, for any width.
template <typename T>
inline void dropped_gradients(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, T* scores, T* d_weights,
    const QueryTerms<T>& of) {
  const Vec<T> keep_scale = splat(static_cast<T>(call.keep_scale)), zero{};
  for (int64_t v = 0; v < tile.width; v += LANES<T>) {
    const Vec<T> lse2 = load(of.lse2 + v), rest = load(of.rest + v), delta = load(of.delta + v);
    const Ints<T> low = load(of.first + v), high = load(of.last + v);
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

// P (or P * M) in the place of the block's scores, and dS in the place of its dP.
template <typename T>
inline void gradient_block(
    const AttentionCall& call, const Tile& tile, bool masked, int64_t k0, int64_t keys, T* scores,
    T* d_weights, const QueryTerms<T>& of) {
  if (call.dropout) {
    return dropped_gradients(call, tile, k0, keys, scores, d_weights, of);
  }
  with_vectors<T>(tile.width, [&](auto vectors) {
    gradient_rows<decltype(vectors)::value>(masked, k0, keys, scores, d_weights, of);
  });
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
