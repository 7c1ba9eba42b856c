// Blocks of LANES x LANES elements turned over in registers: put somewhere, or added to it.
//
// Rows of queries become columns of keys so, and the other way round. Offsets and row strides count
// elements; half types are widened as they are read and rounded as they are written.

#pragma once

#include "simd/vector.h"

namespace rowmax {
namespace ROWMAX_ISA {

// A matrix with contiguous columns.
template <typename T>
struct Matrix {
  T* at;
  int64_t row;
};

// LANES vectors of LANES elements, in registers: log2(LANES) rounds of interleaving vector r with
// vector r + LANES / 2.
template <typename V, int lanes>
ROWMAX_INLINE void transpose_rows(V (&rows)[lanes]) {
#pragma GCC unroll 4
  for (int round = lanes; round > 1; round /= 2) {
    V mixed[lanes];
#pragma GCC unroll 8
    for (int r = 0; r < lanes / 2; ++r) {
      mixed[2 * r] = interleave(rows[r], rows[r + lanes / 2], 0);
      mixed[2 * r + 1] = interleave(rows[r], rows[r + lanes / 2], 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      rows[r] = mixed[r];
    }
  }
}

// What becomes of to[c, r] when x = factor * from[r, c] arrives: to = x, to += x, or to += x but -inf
// where x is, even over NaN.
enum class Turn { kStore, kAdd, kScore };

template <Turn turn, typename From, typename To>
__attribute__((noinline)) void turn_block(
    const From* from, int64_t from_row, To* to, int64_t to_row, Computed<From> factor) {
  using T = Computed<From>;
  constexpr int lanes = LANES<T>;
  Vec<T> rows[lanes];
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) {
    rows[r] = load(from + r * from_row) * splat(factor);
  }
  transpose_rows(rows);
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) {
    To* at = to + r * to_row;
    Vec<T> value = rows[r];
    if constexpr (turn != Turn::kStore) {
      value = load(at) + value;
    }
    if constexpr (turn == Turn::kScore) {
      const Vec<T> nothing = splat(-INFINITE<T>);
      value = select(rows[r] == nothing, nothing, value);
    }
    store(at, value);
  }
}

// to[c, r] = factor * from[r, c] for r < rows, c < columns.
template <typename T>
inline void transpose(Matrix<const T> from, Matrix<T> to, int64_t rows, int64_t columns, T factor) {
  constexpr int lanes = LANES<T>;
  const int64_t full_rows = rows - rows % lanes, full_columns = columns - columns % lanes;
  for (int64_t r = 0; r < full_rows; r += lanes) {
    for (int64_t c = 0; c < full_columns; c += lanes) {
      turn_block<Turn::kStore>(
          from.at + r * from.row + c, from.row, to.at + c * to.row + r, to.row, factor);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < full_rows ? full_columns : 0; c < columns; ++c) {
      to.at[c * to.row + r] = from.at[r * from.row + c] * factor;
    }
  }
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
