// The five products of the attention backward, in the two ways of `attention_products.h`.
//
//     S^T = K Q^T     dP^T = V dO^T     dV += P^T dO     dK += dS^T Q     dQ^T += K^T dS^T
//
// In pairs, the first two have theirs along the head, the next two along the queries and the last one
// along the keys. What a tile of queries brings is put into pairs once a tile, from where it lies in
// memory: exactly, for it is bfloat16. P and dS are rounded block by block, to pairs of queries and, dS
// a second time, to pairs of keys.

#pragma once

#include "kernels/attention_products.h"

namespace rowmax {
namespace ROWMAX_ISA {

// Where the rows of a tile of queries begin in memory, in elements.
struct TileOffsets {
  int64_t query, grad_out, out;
};

// What a tile of queries brings. Of a row that attends nothing, which may hold NaN, lse2 is +inf: it
// counts as zeros. The rows are those of the tensors where that will do, else copies: padded to whole
// vectors, widened, or in pairs of rows.
template <typename T>
struct TileParts {
  T *query_t, *grad_out_t;              // (D | Dv, width): Q^T, scaled, and dO^T
  T *query_rows, *grad_out_rows;        // scratch for copies
  Matrix<const T> query{}, grad_out{};  // (rows, D | Dv in whole vectors)
  const T* lse2;                        // (width,)
  T* delta;                             // (width,): sum over the columns of dO * O
};

template <typename Type>
struct GradientFloats {
  using T = Type;
  static constexpr bool spare = false;

  // Rows of Q^T or dO^T.
  static int64_t transposed_rows(int64_t dim) { return dim; }

  static void load_tile(
      const AttentionCall& call, const TileOffsets& at, const Tile& tile, bool dead,
      TileParts<T>& parts) {
    const bool copied = dead || call.item_type != ITEM_COMPUTED;
    parts.query = rows_of(
        call, copied, call.query, at.query, call.query_row, tile.rows, call.head_dim,
        parts.query_rows, parts.lse2);
    parts.grad_out = rows_of(
        call, copied, call.grad_out, at.grad_out, call.grad_out_row, tile.rows, call.value_dim,
        parts.grad_out_rows, parts.lse2);
    if (tile.rows < tile.width) {
      fill(parts.query_t, call.head_dim * tile.width, T(0));
      fill(parts.grad_out_t, call.value_dim * tile.width, T(0));
    }
    const T scale = static_cast<T>(call.scale);
    transpose<T>(parts.query, {parts.query_t, tile.width}, tile.rows, call.head_dim, scale);
    transpose<T>(parts.grad_out, {parts.grad_out_t, tile.width}, tile.rows, call.value_dim, T(1));
    dot_rows<T>(
        call.item_type, call.out, at.out, call.out_row, parts.grad_out, tile.rows, call.value_dim,
        parts.delta);
  }

  // Copies where rows are no whole vectors, or if `copied`.
  static Matrix<const T> rows_of(
      const AttentionCall& call, bool copied, const void* address, int64_t offset, int64_t row,
      int64_t rows, int64_t dim, T* copies, const T* lse2) {
    const int64_t columns = round_up(dim, LANES<T>);
    if (!copied && columns == dim) {
      return {static_cast<const T*>(address) + offset, row};
    }
    const Matrix<T> to{copies, columns};
    copy_rows<T>(call.item_type, address, offset, row, to, rows, dim, lse2);
    return {to.at, to.row};
  }

  // scores = scale * K Q^T and d_weights = V dO^T.
  static void score_products(
      const AttentionCall& call, const KeyBlock<T>& block, int64_t width, const TileParts<T>& parts,
      T* scores, T* d_weights) {
    const Matrix<const T> key = key_rows(call, block);
    multiply<T>(
        width / LANES<T>, block.keys, call.head_dim, {key.at, key.row, 1}, {parts.query_t, width},
        {scores, width}, false);
    const Matrix<const T> value = readable<T>(
        call.item_type, call.value, block.value, call.value_row, block.keys, call.value_dim,
        block.rows + block.keys * call.head_dim);
    multiply<T>(
        width / LANES<T>, block.keys, call.value_dim, {value.at, value.row, 1},
        {parts.grad_out_t, width}, {d_weights, width}, false);
  }

  static Matrix<const T> key_rows(const AttentionCall& call, const KeyBlock<T>& block) {
    return readable<T>(
        call.item_type, call.key, block.key, call.key_row, block.keys, call.head_dim, block.rows);
  }

  // d_value += P^T dO, d_key += dS^T Q and d_query_t = K^T dS^T (+ d_query_t with `add`). `weights` (P)
  // and `d_scores` (dS), both (keys, width), are not kept.
  static void add_products(
      const AttentionCall& call, const KeyBlock<T>& block, const Tile& tile,
      const TileParts<T>& parts, T* weights, T* d_scores, Matrix<T> d_key, Matrix<T> d_value,
      T* d_query_t, bool add, const T*) {
    const int64_t width = tile.width;
    multiply<T>(
        d_value.row / LANES<T>, block.keys, tile.rows, {weights, width, 1}, parts.grad_out, d_value,
        true);
    multiply<T>(
        d_key.row / LANES<T>, block.keys, tile.rows, {d_scores, width, 1}, parts.query, d_key,
        true);
    // as `score_products` left it
    const Matrix<const T> key = call.item_type == ITEM_COMPUTED
                                    ? key_rows(call, block)
                                    : Matrix<const T>{block.rows, call.head_dim};
    multiply<T>(
        width / LANES<T>, call.head_dim, block.keys, {key.at, 1, key.row}, {d_scores, width},
        {d_query_t, width}, add);
  }
};

#if defined(__AVX512BF16__)

struct GradientPairs {
  using T = float;
  static constexpr bool spare = true;

  static int64_t transposed_rows(int64_t dim) { return round_up(dim, PAIRED) / 2; }

  static void load_tile(
      const AttentionCall& call, const TileOffsets& at, const Tile& tile, bool,
      TileParts<float>& parts) {
    load_rows(
        static_cast<const Bfloat16*>(call.query) + at.query, call.query_row, call.head_dim, tile,
        parts.lse2, parts.query_t, parts.query_rows, parts.query);
    const Bfloat16* grad_out = static_cast<const Bfloat16*>(call.grad_out) + at.grad_out;
    load_rows(
        grad_out, call.grad_out_row, call.value_dim, tile, parts.lse2, parts.grad_out_t,
        parts.grad_out_rows, parts.grad_out);
    dot_rows<float>(
        call.item_type, call.out, at.out, call.out_row,
        Matrix<const Bfloat16>{grad_out, call.grad_out_row}, tile.rows, call.value_dim,
        parts.delta);
  }

  // The rows transposed, in pairs along the head, and in pairs of rows.
  static void load_rows(
      const Bfloat16* from, int64_t row, int64_t dim, const Tile& tile, const float* lse2,
      float* transposed, float* interleaved, Matrix<const float>& rows) {
    const auto count = [&](int64_t r) {
      return r < tile.rows && lse2[r] != INFINITE<float> ? dim : 0;
    };
    transpose_words(
        from, row, dim, {reinterpret_cast<uint32_t*>(transposed), tile.width}, tile.width, count);
    const int64_t words =
        interleave_rows(from, row, tile.rows, dim, reinterpret_cast<uint32_t*>(interleaved), count);
    rows = {interleaved, words};
  }

  static void score_products(
      const AttentionCall& call, const KeyBlock<float>& block, int64_t width,
      const TileParts<float>& parts, float* scores, float* d_weights) {
    Pairs::row_product(
        static_cast<const Bfloat16*>(call.key) + block.key, call.key_row, block.keys, call.head_dim,
        parts.query_t, width, scores, static_cast<float>(call.scale), block.rows);
    Pairs::row_product(
        static_cast<const Bfloat16*>(call.value) + block.value, call.value_row, block.keys,
        call.value_dim, parts.grad_out_t, width, d_weights, 1.0f, block.rows);
  }

  static void add_products(
      const AttentionCall& call, const KeyBlock<float>& block, const Tile& tile,
      const TileParts<float>& parts, float* weights, float* d_scores, Matrix<float> d_key,
      Matrix<float> d_value, float* d_query_t, bool add, const float* ones) {
    const int64_t keys = block.keys, width = tile.width;
    add_rows(weights, parts.grad_out, keys, tile, block.spare, d_value, ones);
    add_rows(d_scores, parts.query, keys, tile, block.spare, d_key, ones);
    round_pairs(d_scores, keys, width);
    uint32_t* interleaved = reinterpret_cast<uint32_t*>(block.rows);
    const int64_t words = interleave_rows(
        static_cast<const Bfloat16*>(call.key) + block.key, call.key_row, keys, call.head_dim,
        interleaved, [&](int64_t) { return call.head_dim; });
    multiply_pairs(
        width / LANES<float>, call.head_dim, (keys + 1) / 2,
        {reinterpret_cast<const Bfloat16*>(interleaved), 2, 2 * words},
        {reinterpret_cast<const uint32_t*>(d_scores), width}, {d_query_t, width}, add, ones, 1.0f);
  }

  // sums += A^T B for A (keys, rows) of floats and the rows B of a tile, in pairs of rows.
  static void add_rows(
      const float* a, Matrix<const float> b, int64_t keys, const Tile& tile, float* spare,
      Matrix<float> sums, const float* ones) {
    Bfloat16* left = reinterpret_cast<Bfloat16*>(spare);
    const int64_t row = round_rows(a, keys, tile.width, tile.rows, left);
    add_pairs_wide(
        sums.row, keys, (tile.rows + 1) / 2, {left, row, 2},
        {reinterpret_cast<const uint32_t*>(b.at), b.row}, sums, ones);
  }
};

#endif

}  // namespace ROWMAX_ISA
}  // namespace rowmax
