// Products of bfloat16 matrices by the instructions that multiply and add two pairs a lane.
//
// Where the processor has AVX512-BF16, one instruction does twice the work of a float one:
//
//     C[r, n] += A[r, 2k] * B[2k, n] + A[r, 2k + 1] * B[2k + 1, n]        in float
//
// So the depth goes in pairs, each a 32-bit word: A's word is broadcast, and a row of B is a vector of
// words, one a column. Where a matrix has its pairs along a row it is read as it lies in memory, or its
// words are transposed; where it has them along a column, rows are interleaved two by two. An odd depth
// ends with a pair whose second half is zero in both. The instruction rounds to nearest and takes
// subnormal numbers for zeros.

#pragma once

#include "simd/gemm.h"

#if defined(__AVX512BF16__)

namespace rowmax {
namespace ROWMAX_ISA {

inline constexpr int PAIRED = 2 * LANES<float>;  // bfloat16 elements in a vector
typedef Lanes<uint16_t, VECTOR_BYTES> Row;

// A matrix of pairs: that of row r and depth k lies at at[r * row + k * depth], in elements.
struct LeftPairs {
  const Bfloat16* at;
  int64_t row, depth;
};

// C[r, :] = scale * sum_k A[r, k] B[k, :], or with `add` C[r, :] * factors + that sum; `depth` counts
// pairs, and B's row is in words. `tiles` tiles of C, one below the other.
template <int rows, int vectors>
__attribute__((noinline)) void multiply_pair_tiles(
    int64_t tiles, int64_t depth, LeftPairs left, Matrix<const uint32_t> right,
    Matrix<float> result, bool add, const float* factors, float scale) {
  constexpr int lanes = LANES<float>;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    __m512 sums[rows][vectors] = {};
    const Bfloat16* a = left.at;
    const uint32_t* b = right.at;
    for (int64_t k = 0; k < depth; ++k) {
      __m512i columns[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        columns[v] = _mm512_loadu_si512(b + v * lanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        int32_t word;
        __builtin_memcpy(&word, a + r * left.row, sizeof word);
        const __m512i pair = _mm512_set1_epi32(word);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          sums[r][v] = _mm512_dpbf16_ps(
              sums[r][v], reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(columns[v]));
        }
      }
      a += left.depth;
      b += right.row;
    }
    const int64_t row = computed_here(result.row);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        float* to = result.at + r * row + v * lanes;
        const Vec<float> sum = sums[r][v];
        store(
            to, add ? multiply_add(load(to), load(factors + v * lanes), sum) : sum * splat(scale));
      }
    }
    left.at += rows * left.row;
    result.at += rows * result.row;
  }
}

template <int vectors>
inline void multiply_pair_columns(
    int64_t rows, int64_t depth, LeftPairs left, Matrix<const uint32_t> right, Matrix<float> result,
    bool add, const float* factors, float scale) {
  constexpr int tall = vectors <= 2 ? 8 : 4;
  const auto step = [&](auto height) {
    const int64_t tiles = rows / height;
    if (tiles > 0) {
      multiply_pair_tiles<decltype(height)::value, vectors>(
          tiles, depth, left, right, result, add, factors, scale);
      left.at += tiles * height * left.row;
      result.at += tiles * height * result.row;
      rows -= tiles * height;
    }
  };
  step(std::integral_constant<int, tall>{});
  step(std::integral_constant<int, 1>{});
}

// The same over `vectors` (1 to VECTORS) vectors of columns.
inline void multiply_pairs(
    int64_t vectors, int64_t rows, int64_t depth, LeftPairs left, Matrix<const uint32_t> right,
    Matrix<float> result, bool add, const float* factors, float scale) {
  switch (vectors) {
    case 4:
      return multiply_pair_columns<4>(rows, depth, left, right, result, add, factors, scale);
    case 3:
      return multiply_pair_columns<3>(rows, depth, left, right, result, add, factors, scale);
    case 2:
      return multiply_pair_columns<2>(rows, depth, left, right, result, add, factors, scale);
    default:
      return multiply_pair_columns<1>(rows, depth, left, right, result, add, factors, scale);
  }
}

// C += A B for any number of columns, a multiple of the lanes. `ones` are VECTORS vectors of 1.
inline void add_pairs_wide(
    int64_t columns, int64_t rows, int64_t depth, LeftPairs left, Matrix<const uint32_t> right,
    Matrix<float> result, const float* ones) {
  constexpr int lanes = LANES<float>;
  for (int64_t at = 0; at < columns; at += VECTORS * lanes) {
    multiply_pairs(
        min<int64_t>(VECTORS, (columns - at) / lanes), rows, depth, left,
        {right.at + at, right.row}, {result.at + at, result.row}, true, ones, 1.0f);
  }
}

// --- rows of pairs --------------------------------------------------------------------------------

// The first `count` elements and zeros; what lies beyond is not read.
ROWMAX_INLINE Row load_first_paired(const Bfloat16* from, int64_t count) {
  const int64_t inside = max<int64_t>(0, min<int64_t>(count, PAIRED));
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << inside) - 1);
  return reinterpret_cast<Row>(_mm512_maskz_loadu_epi16(mask, from));
}

// The first `count` elements; what lies beyond them in memory is not touched.
ROWMAX_INLINE void store_first_paired(Bfloat16* to, Row row, int64_t count) {
  const int64_t inside = max<int64_t>(0, min<int64_t>(count, PAIRED));
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << inside) - 1);
  _mm512_mask_storeu_epi16(to, mask, reinterpret_cast<__m512i>(row));
}

template <typename E>
ROWMAX_INLINE void store_row(E* to, Row row) {
  __builtin_memcpy(to, &row, sizeof row);
}

// Two vectors rounded to nearest even, one behind the other.
ROWMAX_INLINE Row rounded(Vec<float> first, Vec<float> second) {
  return reinterpret_cast<Row>(_mm512_cvtne2ps_pbh(second, first));
}

// Element 0, element PAIRED / 2, element 1, ...: the pairs of two vectors that were rounded.
template <int... i>
ROWMAX_INLINE Row paired_halves(Row row, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(row, row, (i / 2 + PAIRED / 2 * (i % 2))...);
}
ROWMAX_INLINE Row paired_halves(Row row) {
  return paired_halves(row, std::make_integer_sequence<int, PAIRED>{});
}

// Rows padded with zeros to whole vectors of pairs; the elements that such a row takes.
inline int64_t padded_rows(
    const Bfloat16* from, int64_t from_row, int64_t rows, int64_t columns, Bfloat16* to) {
  const int64_t row = round_up(columns, PAIRED);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += PAIRED) {
      store_row(to + r * row + c, load_first_paired(from + r * from_row + c, columns - c));
    }
  }
  return row;
}

// `count(r)` elements of row r, and zeros: word w of row r goes to to[w * to_row + r]. Rows are taken
// up to `width`, a multiple of the lanes.
template <typename Count>
ROWMAX_INLINE void transpose_words(
    const Bfloat16* from, int64_t from_row, int64_t columns, Matrix<uint32_t> to, int64_t width,
    const Count& count) {
  constexpr int lanes = LANES<float>;
  for (int64_t r = 0; r < width; r += lanes) {
    for (int64_t c = 0; c < columns; c += PAIRED) {
      Words<float> rows[lanes];
#pragma GCC unroll 16
      for (int n = 0; n < lanes; ++n) {
        const Bfloat16* at = from + (r + n) * from_row + c;
        rows[n] = reinterpret_cast<Words<float>>(load_first_paired(at, count(r + n) - c));
      }
      transpose_rows(rows);
#pragma GCC unroll 16
      for (int n = 0; n < lanes; ++n) {
        store(to.at + (c / 2 + n) * to.row + r, rows[n]);
      }
    }
  }
}

// Rows 2k and 2k + 1 as row k of pairs, `count(r)` elements of row r and zeros; the words that such a
// row takes.
template <typename Count>
ROWMAX_INLINE int64_t interleave_rows(
    const Bfloat16* from, int64_t from_row, int64_t rows, int64_t columns, uint32_t* to,
    const Count& count) {
  const int64_t words = round_up(columns, PAIRED);
  for (int64_t r = 0; r < rows; r += 2) {
    const Bfloat16* row = from + r * from_row;
    const int64_t inside = count(r), below = r + 1 < rows ? count(r + 1) : 0;
    for (int64_t c = 0; c < columns; c += PAIRED) {
      const Row first = load_first_paired(row + c, inside - c);
      const Row second = load_first_paired(row + from_row + c, below - c);
      store_row(to + r / 2 * words + c, interleave(first, second, 0));
      store_row(to + r / 2 * words + c + PAIRED / 2, interleave(first, second, 1));
    }
  }
  return words;
}

// A matrix of floats in pairs, in place: the words of rows 2r and 2r + 1 become row r.
inline void round_pairs(float* matrix, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t v = 0; v < width; v += LANES<float>) {
      const float* at = matrix + r * width + v;
      const Vec<float> second = r + 1 < rows ? load(at + width) : Vec<float>{};
      store_row(matrix + r / 2 * width + v, paired_halves(rounded(load(at), second)));
    }
  }
}

// The first `columns` of each row of floats rounded, zeros behind them; the elements that a row takes.
inline int64_t round_rows(
    const float* matrix, int64_t rows, int64_t width, int64_t columns, Bfloat16* to) {
  const int64_t row = round_up(width, PAIRED);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < width; v += PAIRED) {
      const float* at = matrix + r * width + v;
      const Vec<float> first = load_first(at, columns - v);
      const Vec<float> second = load_first(at + LANES<float>, columns - v - LANES<float>);
      store_row(to + r * row + v, rounded(first, second));
    }
  }
  return row;
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax

#endif
