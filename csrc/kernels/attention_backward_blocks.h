// One block of scores in the backward pass: its weights, their gradients, and the bias gradient.

#pragma once

#include "kernels/attention_tiles.h"

namespace rowmax {
namespace ROWMAX_ISA {

// Per query: lse * log2 e, rounded, and the rest of it; delta; the first and last key.
template <typename T>
struct QueryTerms {
  T *lse2, *rest, *delta;
  IntOf<T>*first, *last;
};

// P in the place of the block's scores, and dS in the place of its dP. Rows of the block are taken one
// after another, as they lie in memory, with the terms of `vectors` vectors of queries in registers:
// those from lane `at` on.
template <int vectors, typename T>
inline void gradient_rows(
    bool masked, int64_t k0, int64_t keys, int64_t width, int64_t at, T* scores, T* d_weights,
    const QueryTerms<T>& of) {
  constexpr int lanes = LANES<T>;
  Vec<T> lse2[vectors], delta[vectors];
  Rest<T> rest[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    lse2[v] = load(of.lse2 + at + v * lanes);
    rest[v] = rest_of<T>(load(of.rest + at + v * lanes));
    delta[v] = load(of.delta + at + v * lanes);
  }
  const IntOf<T>*first = of.first + at, *last = of.last + at;
  const auto rows = [&](auto of_mask) {
    for (int64_t k = 0; k < keys; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t cell = k * width + at + v * lanes;
        Vec<T> weight = exp2_difference<T>(load(scores + cell), lse2[v], rest[v]);
        if constexpr (of_mask) {
          const Ints<T> low = load_bits<Ints<T>>(first + v * lanes);
          const Ints<T> high = load_bits<Ints<T>>(last + v * lanes);
          weight = select(in_range<T>(k0 + k, low, high), weight, Vec<T>{});
        }
        store(scores + cell, weight);
        store(d_weights + cell, weight * (load(d_weights + cell) - delta[v]));
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
    const Vec<T> lse2 = load(of.lse2 + v), delta = load(of.delta + v);
    const Rest<T> rest = rest_of<T>(load(of.rest + v));
    const Ints<T> low = load(of.first + v), high = load(of.last + v);
    for (int64_t group = k0 / 4; group < (k0 + keys + 3) / 4; ++group) {
      const RandomWords<T> words = random_words<T>(call, tile, v, group);
      for (int64_t n = 0; n < 4; ++n) {
        const int64_t k = 4 * group + n - k0;
        if (k < 0 || k >= keys) {
          continue;
        }
        const int64_t at = k * tile.width + v;
        const Vec<T> all = exp2_difference<T>(load(scores + at), lse2, rest);
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
  for_panels<T>(tile.width, [&](int64_t at, auto vectors) {
    gradient_rows<decltype(vectors)::value>(
        masked, k0, keys, tile.width, at, scores, d_weights, of);
  });
}

// target[j] += sum_i dS^T[j, i]
template <typename T>
inline void sum_over_rows(
    double* target, int64_t column, const Tile& tile, int64_t keys, const T* d_scores) {
  for (int64_t k = 0; k < keys; ++k) {
    double total = 0.0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      total += static_cast<double>(d_scores[k * tile.width + r]);
    }
    target[k * column] += total;
  }
}

// target[i] += sum_j dS^T[j, i]
template <typename T>
inline void sum_over_columns(
    double* target, int64_t row, const Tile& tile, int64_t keys, const T* d_scores) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    double total = 0.0;
    for (int64_t k = 0; k < keys; ++k) {
      total += static_cast<double>(d_scores[k * tile.width + r]);
    }
    target[r * row] += total;
  }
}

// dS^T of a tile's block, turned over LANES x LANES at a time, into d_bias or added to it. `turned` is
// scratch of one such block.
template <int64_t kind, typename T, typename Target>
inline void put_matrix(
    const AttentionCall& call, const Tile& tile, int64_t keys, const T* d_scores, T* turned,
    Target* target) {
  constexpr int lanes = LANES<T>;
  for (int64_t v = 0; v < tile.rows; v += lanes) {
    for (int64_t k = 0; k < keys; k += lanes) {
      const int64_t rows = min<int64_t>(lanes, tile.rows - v);
      const int64_t columns = min<int64_t>(lanes, keys - k);
      const T* from = d_scores + k * tile.width + v;
      Target* at = target + v * call.d_bias_row + k;
      if constexpr (kind != BIAS_GRAD_SUM_WIDE) {
        if (rows == lanes && columns == lanes) {
          constexpr Turn turn = kind == BIAS_GRAD_STORE ? Turn::kStore : Turn::kAdd;
          turn_block<turn>(from, tile.width, at, call.d_bias_row, T(1));
          continue;
        }
      }
      turn_block<Turn::kStore>(from, tile.width, turned, int64_t{lanes}, T(1));
      for (int64_t r = 0; r < rows; ++r, at += call.d_bias_row) {
        const T* part = turned + r * lanes;
        if constexpr (kind == BIAS_GRAD_SUM_WIDE) {
          for (int64_t c = 0; c < columns; ++c) {
            at[c] += static_cast<double>(part[c]);
          }
        } else if constexpr (kind == BIAS_GRAD_SUM) {
          store_first(at, load(part) + load_first(at, columns), columns);
        } else {
          store_first(at, load(part), columns);
        }
      }
    }
  }
}

// d_bias = dS of a tile's block, or d_bias += dS where pairs share an element of the bias.
template <typename T>
inline void store_bias_gradient(
    const AttentionCall& call, const Tile& tile, int64_t k0, int64_t keys, const T* d_scores,
    T* turned) {
  const int64_t row = call.d_bias_row, column = call.d_bias_column;
  const int64_t offset =
      tile.b * call.d_bias_batch + tile.h * call.d_bias_head + tile.start * row + k0 * column;
  if (call.d_bias_kind == BIAS_GRAD_SUM_WIDE) {
    double* target = static_cast<double*>(call.d_bias) + offset;
    if (row == 0) {
      sum_over_rows(target, column, tile, keys, d_scores);
    } else if (column == 0) {
      sum_over_columns(target, row, tile, keys, d_scores);
    } else {
      put_matrix<BIAS_GRAD_SUM_WIDE>(call, tile, keys, d_scores, turned, target);
    }
  } else if (call.d_bias_kind == BIAS_GRAD_SUM) {
    prefetch_block<T>(ITEM_COMPUTED, call.d_bias, offset, row, tile.rows, call.key_len - k0);
    put_matrix<BIAS_GRAD_SUM>(
        call, tile, keys, d_scores, turned, static_cast<T*>(call.d_bias) + offset);
  } else {
    with_items<T>(call.d_bias_item_type, call.d_bias, [&](auto* items) {
      put_matrix<BIAS_GRAD_STORE>(call, tile, keys, d_scores, turned, items + offset);
    });
  }
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
