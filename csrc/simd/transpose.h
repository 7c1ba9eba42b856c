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

// 128 bits are a part of a vector, within which shuffles cost least. Elements of two vectors in turn,
// part by part: of the parts' first halves (half = 0) or their second halves (half = 1).
template <typename V, int part, int half, int... lane>
ROWMAX_INLINE V interleave_parts(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return __builtin_shufflevector(
      a, b, (lane / part * part + half * part / 2 + lane % part / 2 + lanes * (lane % 2))...);
}

// The even (odd = 0) or the odd parts of two vectors, one after the other.
template <typename V, int part, int odd, int... lane>
ROWMAX_INLINE V every_other_part(V a, V b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, ((2 * (lane / part) + odd) * part + lane % part)...);
}

// As many vectors as they have elements, turned over in registers: first each part with those of the
// vectors next to it, then parts as wholes.
template <typename V, int lanes>
ROWMAX_INLINE void transpose_rows(V (&rows)[lanes]) {
  constexpr int part = 16 / sizeof(ElementOf<V>);
  constexpr auto numbers = std::make_integer_sequence<int, lanes>{};
  V mixed[lanes];
#pragma GCC unroll 4
  for (int round = part; round > 1; round /= 2) {
#pragma GCC unroll 8
    for (int first = 0; first < lanes; first += part) {
#pragma GCC unroll 8
      for (int r = 0; r < part / 2; ++r) {
        const V a = rows[first + r], b = rows[first + r + part / 2];
        mixed[first + 2 * r] = interleave_parts<V, part, 0>(a, b, numbers);
        mixed[first + 2 * r + 1] = interleave_parts<V, part, 1>(a, b, numbers);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      rows[r] = mixed[r];
    }
  }
  constexpr int parts = lanes / part;
#pragma GCC unroll 4
  for (int round = parts; round > 1; round /= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < parts / 2; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < part; ++c) {
        const V a = rows[2 * r * part + c], b = rows[(2 * r + 1) * part + c];
        mixed[r * part + c] = every_other_part<V, part, 0>(a, b, numbers);
        mixed[(r + parts / 2) * part + c] = every_other_part<V, part, 1>(a, b, numbers);
      }
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
