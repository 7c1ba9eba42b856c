// The two products of the attention forward, S^T = K Q^T and O^T += V^T P^T, in two ways.
//
// `Floats` widens half types and multiplies in the type computed in. `Pairs` multiplies bfloat16 as it
// is, where the processor has instructions for it (`gemm_bfloat16.h`): K is read as it lies in memory,
// Q^T is transposed by words, two rows of V are interleaved, and so are two rows of P^T, rounded.
//
// Both ways keep matrices transposed, `width` queries a row; Pairs has Q^T and P^T in half as many rows,
// of words.

#pragma once

#include "kernels/attention_tiles.h"
#include "simd/gemm_bfloat16.h"

namespace rowmax {
namespace ROWMAX_ISA {

// Of half types, a block of K and V that is widened once for all tiles of a head: (keys, D | Dv) from the
// block's first key on. Null where blocks are not kept.
template <typename T>
struct WideBlock {
  T *key = nullptr, *value = nullptr;
  bool done = false;  // whether the rows are there already
  int64_t keys = 0;   // all of the block's
};

// A block of keys: where the first attended row of K and V begins in memory, and scratch.
template <typename T>
struct KeyBlock {
  int64_t key, value, keys;
  T* rows;              // BLOCK_KEYS rows of K or V, or backward of both, widened or in pairs
  T* spare = nullptr;   // backward: (BLOCK_KEYS, width), or absent
  WideBlock<T> wide{};  // forward
  int64_t before = 0;   // forward: keys of the block before the first attended
};

// matrix[r, :] *= factors[:] for a (rows, width) matrix.
template <typename T>
inline void scale_columns(T* matrix, int64_t rows, int64_t width, const T* factors) {
  for (int64_t v = 0; v < width; v += LANES<T>) {
    const Vec<T> factor = load(factors + v);
    for (int64_t r = 0; r < rows; ++r) {
      T* at = matrix + r * width + v;
      store(at, load(at) * factor);
    }
  }
}

template <typename Type>
struct Floats {
  using T = Type;

  // Elements of Q^T.
  static int64_t query_elements(const AttentionCall& call) { return call.head_dim * call.tile; }

  // Q^T of a tile from element `offset` of q on, scaled; lanes past the last row hold zeros.
  static void load_query(
      const AttentionCall& call, int64_t offset, const Tile& tile, T* query_t, T* scratch) {
    if (tile.rows < tile.width) {
      fill(query_t, call.head_dim * tile.width, T(0));
    }
    const Matrix<const T> query = readable<T>(
        call.item_type, call.query, offset, call.query_row, tile.rows, call.head_dim, scratch);
    transpose<T>(
        query, {query_t, tile.width}, tile.rows, call.head_dim, static_cast<T>(call.scale));
  }

  // scores = scale * K Q^T.
  static void score_product(
      const AttentionCall& call, const KeyBlock<T>& block, int64_t width, const T* query_t,
      T* scores) {
    const WideBlock<T>& wide = block.wide;
    if (wide.key != nullptr && !wide.done) {
      readable<T>(
          call.item_type, call.key, block.key - block.before * call.key_row, call.key_row,
          wide.keys, call.head_dim, wide.key);
      readable<T>(
          call.item_type, call.value, block.value - block.before * call.value_row, call.value_row,
          wide.keys, call.value_dim, wide.value);
    }
    const Matrix<const T> key =
        wide.key != nullptr
            ? Matrix<const T>{wide.key + block.before * call.head_dim, call.head_dim}
            : readable<T>(
                  call.item_type, call.key, block.key, call.key_row, block.keys, call.head_dim,
                  block.rows);
    multiply<T>(
        width / LANES<T>, block.keys, call.head_dim, {key.at, key.row, 1}, {query_t, width},
        {scores, width}, false);
  }

  // O^T = V^T P^T + (O^T * rescale if started). Unless `moved`, all of `rescale` is 1. The weights are
  // not kept.
  static void value_product(
      const AttentionCall& call, const KeyBlock<T>& block, int64_t width, T* weights, T* out_t,
      const T* rescale, bool moved, bool started) {
    if (moved && started) {
      scale_columns(out_t, call.value_dim, width, rescale);
    }
    const WideBlock<T>& wide = block.wide;
    const Matrix<const T> value =
        wide.value != nullptr
            ? Matrix<const T>{wide.value + block.before * call.value_dim, call.value_dim}
            : readable<T>(
                  call.item_type, call.value, block.value, call.value_row, block.keys,
                  call.value_dim, block.rows);
    multiply_columns<T>(
        width / LANES<T>, call.value_dim, block.before, block.keys, {value.at, 1, value.row},
        {weights, width}, {out_t, width}, started);
  }
};

#if defined(__AVX512BF16__)

struct Pairs {
  using T = float;

  static int64_t query_elements(const AttentionCall& call) {
    return round_up(call.head_dim, PAIRED) / 2 * call.tile;
  }

  // Not scaled, which would round it once more.
  static void load_query(
      const AttentionCall& call, int64_t offset, const Tile& tile, float* query_t, float*) {
    transpose_words(
        static_cast<const Bfloat16*>(call.query) + offset, call.query_row, call.head_dim,
        {reinterpret_cast<uint32_t*>(query_t), tile.width}, tile.width,
        [&](int64_t r) { return r < tile.rows ? call.head_dim : 0; });
  }

  static void score_product(
      const AttentionCall& call, const KeyBlock<float>& block, int64_t width, const float* query_t,
      float* scores) {
    row_product(
        static_cast<const Bfloat16*>(call.key) + block.key, call.key_row, block.keys, call.head_dim,
        query_t, width, scores, static_cast<float>(call.scale), block.rows);
  }

  // result = scale * A B for A (rows, columns) in memory, pairs along its rows, and B in pairs.
  static void row_product(
      const Bfloat16* a, int64_t a_row, int64_t rows, int64_t columns, const float* b,
      int64_t width, float* result, float scale, float* scratch) {
    LeftPairs left{a, a_row, 2};
    if (columns % 2 != 0) {  // zeros behind an odd last element
      Bfloat16* copy = reinterpret_cast<Bfloat16*>(scratch);
      left = {copy, padded_rows(a, a_row, rows, columns, copy), 2};
    }
    multiply_pairs(
        width / LANES<float>, rows, (columns + 1) / 2, left,
        {reinterpret_cast<const uint32_t*>(b), width}, {result, width}, false, nullptr, scale);
  }

  static void value_product(
      const AttentionCall& call, const KeyBlock<float>& block, int64_t width, float* weights,
      float* out_t, const float* rescale, bool, bool started) {
    const int64_t keys = block.keys;
    uint32_t* interleaved = reinterpret_cast<uint32_t*>(block.rows);
    const int64_t words = interleave_rows(
        static_cast<const Bfloat16*>(call.value) + block.value, call.value_row, keys,
        call.value_dim, interleaved, [&](int64_t) { return call.value_dim; });
    round_pairs(weights, keys, width);
    const LeftPairs left{reinterpret_cast<const Bfloat16*>(interleaved), 2, 2 * words};
    const Matrix<const uint32_t> right{reinterpret_cast<const uint32_t*>(weights), width};
    multiply_pairs(
        width / LANES<float>, call.value_dim, (keys + 1) / 2, left, right, {out_t, width}, started,
        rescale, 1.0f);
  }
};

#endif

}  // namespace ROWMAX_ISA
}  // namespace rowmax
