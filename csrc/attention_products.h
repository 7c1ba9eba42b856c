// The two products of the attention forward, S^T = K Q^T and O^T += V^T P^T, in two ways.
//
// `Floats` widens half types and multiplies in the type computed in. `Pairs` multiplies bfloat16 as it
// is, where the processor has instructions for it (AVX512-BF16), at twice the rate of float:
//
//     C[r, n] += A[r, 2k] * B[2k, n] + A[r, 2k + 1] * B[2k + 1, n]        in float
//
// So the depth goes in pairs, each a 32-bit word: A's word is broadcast, and a row of B is a vector of
// words, one a column. K and Q^T have their pairs along the head, V and P^T along the keys: K is read as
// it lies in memory, Q^T is transposed by words, two rows of V are interleaved, and so are two rows of
// P^T, rounded. An odd depth ends with a pair whose second half is zero in both. The instruction rounds
// to nearest and takes subnormal numbers for zeros.
//
// Both ways keep matrices transposed, `width` queries a row; Pairs has Q^T and P^T in half as many rows,
// of words.

#pragma once

#include "attention_tiles.h"

namespace rowmax {
namespace ROWMAX_ISA {

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
        call.half, call.query, offset, call.query_row, tile.rows, call.head_dim, scratch);
    transpose<T>(
        query, {query_t, tile.width}, tile.rows, call.head_dim, static_cast<T>(call.scale));
  }

  // scores = scale * K Q^T of `keys` keys from element `offset` of k on.
  static void score_product(
      const AttentionCall& call, int64_t offset, int64_t keys, int64_t width, const T* query_t,
      T* scores, T* scratch) {
    const Matrix<const T> key = readable<T>(
        call.half, call.key, offset, call.key_row, keys, call.head_dim, scratch);
    multiply<T>(
        width / LANES<T>, keys, call.head_dim, {key.at, key.row, 1}, {query_t, width},
        {scores, width}, false);
  }

  // O^T = V^T P^T + (O^T * rescale if started) of `keys` keys from element `offset` of v on. Unless
  // `moved`, all of `rescale` is 1. The weights are not kept.
  static void value_product(
      const AttentionCall& call, int64_t offset, int64_t keys, int64_t width, T* weights, T* out_t,
      const T* rescale, bool moved, bool started, T* scratch) {
    if (moved && started) {
      scale_columns(out_t, call.value_dim, width, rescale);
    }
    const Matrix<const T> value = readable<T>(
        call.half, call.value, offset, call.value_row, keys, call.value_dim, scratch);
    multiply<T>(
        width / LANES<T>, call.value_dim, keys, {value.at, 1, value.row}, {weights, width},
        {out_t, width}, started);
  }
};

#if defined(__AVX512BF16__)

// A matrix of pairs: that of row r and depth k lies at at[r * row + k * depth], in elements.
struct LeftPairs {
  const Bfloat16* at;
  int64_t row, depth;
};

// C[r, :] = scale * sum_k A[r, k] B[k, :], or with `add` C[r, :] * factors + that sum; `depth` counts
// pairs, and B's row is in words.
template <int rows, int vectors>
__attribute__((noinline)) void multiply_pairs_tile(
    int64_t depth, LeftPairs left, Matrix<const uint32_t> right, Matrix<float> result, bool add,
    const float* factors, float scale) {
  constexpr int lanes = LANES<float>;
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
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* to = result.at + r * result.row + v * lanes;
      const Vec<float> sum = sums[r][v];
      store(to, add ? multiply_add(load(to), load(factors + v * lanes), sum) : sum * splat(scale));
    }
  }
}

template <int vectors>
inline void multiply_pair_columns(
    int64_t rows, int64_t depth, LeftPairs left, Matrix<const uint32_t> right, Matrix<float> result,
    bool add, const float* factors, float scale) {
  constexpr int tall = vectors <= 2 ? 8 : 4;
  const auto step = [&](auto count) {
    multiply_pairs_tile<decltype(count)::value, vectors>(
        depth, left, right, result, add, factors, scale);
    left.at += count * left.row;
    result.at += count * result.row;
    rows -= count;
  };
  while (rows >= tall) {
    step(std::integral_constant<int, tall>{});
  }
  while (rows > 0) {
    step(std::integral_constant<int, 1>{});
  }
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

inline constexpr int PAIRED = 2 * LANES<float>;  // bfloat16 elements in a vector
typedef Lanes<uint16_t, VECTOR_BYTES> Row;

// The first `count` elements and zeros; what lies beyond is not read.
ROWMAX_INLINE Row load_first_paired(const Bfloat16* from, int64_t count) {
  const int64_t inside = max<int64_t>(0, min<int64_t>(count, PAIRED));
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << inside) - 1);
  return reinterpret_cast<Row>(_mm512_maskz_loadu_epi16(mask, from));
}

struct Pairs {
  using T = float;

  static int64_t query_elements(const AttentionCall& call) {
    return round_up(call.head_dim, PAIRED) / 2 * call.tile;
  }

  // Not scaled, which would round it once more.
  static void load_query(
      const AttentionCall& call, int64_t offset, const Tile& tile, float* query_t, float*) {
    constexpr int lanes = LANES<float>;
    const Bfloat16* query = static_cast<const Bfloat16*>(call.query) + offset;
    for (int64_t r = 0; r < tile.width; r += lanes) {
      for (int64_t c = 0; c < call.head_dim; c += PAIRED) {
        Words<float> rows[lanes];
#pragma GCC unroll 16
        for (int n = 0; n < lanes; ++n) {
          const int64_t count = r + n < tile.rows ? call.head_dim - c : 0;
          const Bfloat16* at = query + (r + n) * call.query_row + c;
          rows[n] = reinterpret_cast<Words<float>>(load_first_paired(at, count));
        }
        transpose_rows(rows);
        uint32_t* to = reinterpret_cast<uint32_t*>(query_t) + c / 2 * tile.width + r;
#pragma GCC unroll 16
        for (int n = 0; n < lanes; ++n) {
          store(to + n * tile.width, rows[n]);
        }
      }
    }
  }

  static void score_product(
      const AttentionCall& call, int64_t offset, int64_t keys, int64_t width, const float* query_t,
      float* scores, float* scratch) {
    LeftPairs key{static_cast<const Bfloat16*>(call.key) + offset, call.key_row, 2};
    if (call.head_dim % 2 != 0) {  // rows with zeros behind an odd last element
      const int64_t even_row = round_up(call.head_dim, PAIRED);
      Bfloat16* copy = reinterpret_cast<Bfloat16*>(scratch);
      for (int64_t k = 0; k < keys; ++k) {
        for (int64_t c = 0; c < call.head_dim; c += PAIRED) {
          const Row row = load_first_paired(key.at + k * key.row + c, call.head_dim - c);
          __builtin_memcpy(copy + k * even_row + c, &row, sizeof row);
        }
      }
      key = {copy, even_row, 2};
    }
    const Matrix<const uint32_t> query{reinterpret_cast<const uint32_t*>(query_t), width};
    multiply_pairs(
        width / LANES<float>, keys, (call.head_dim + 1) / 2, key, query, {scores, width}, false,
        nullptr, static_cast<float>(call.scale));
  }

  static void value_product(
      const AttentionCall& call, int64_t offset, int64_t keys, int64_t width, float* weights,
      float* out_t, const float* rescale, bool, bool started, float* scratch) {
    const Bfloat16* value = static_cast<const Bfloat16*>(call.value) + offset;
    uint32_t* interleaved = reinterpret_cast<uint32_t*>(scratch);
    const int64_t words = round_up(call.value_dim, PAIRED);
    for (int64_t k = 0; k < keys; k += 2) {
      const Bfloat16* row = value + k * call.value_row;
      uint32_t* to = interleaved + k / 2 * words;
      for (int64_t c = 0; c < call.value_dim; c += PAIRED) {
        const int64_t count = call.value_dim - c;
        const Row first = load_first_paired(row + c, count);
        const Row second =
            k + 1 < keys ? load_first_paired(row + call.value_row + c, count) : Row{};
        const Row low = interleave(first, second, 0), high = interleave(first, second, 1);
        __builtin_memcpy(to + c, &low, sizeof low);
        __builtin_memcpy(to + c + PAIRED / 2, &high, sizeof high);
      }
    }
    round_weights(weights, keys, width);
    const LeftPairs left{reinterpret_cast<const Bfloat16*>(interleaved), 2, 2 * words};
    const Matrix<const uint32_t> right{reinterpret_cast<const uint32_t*>(weights), width};
    multiply_pairs(
        width / LANES<float>, call.value_dim, (keys + 1) / 2, left, right, {out_t, width}, started,
        rescale, 1.0f);
  }

  // P^T in pairs, in place: the words of rows 2k and 2k + 1 become row k.
  static void round_weights(float* weights, int64_t keys, int64_t width) {
    for (int64_t k = 0; k < keys; k += 2) {
      for (int64_t v = 0; v < width; v += LANES<float>) {
        const Vec<float> first = load(weights + k * width + v);
        const Vec<float> second =
            k + 1 < keys ? load(weights + (k + 1) * width + v) : Vec<float>{};
        const auto rounded = reinterpret_cast<Row>(_mm512_cvtne2ps_pbh(second, first));
        const Row halves = interleave_halves(rounded, std::make_integer_sequence<int, PAIRED>{});
        __builtin_memcpy(weights + k / 2 * width + v, &halves, sizeof halves);
      }
    }
  }

  // element 0, element PAIRED / 2, element 1, ...
  template <int... i>
  ROWMAX_INLINE static Row interleave_halves(Row row, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(row, row, (i / 2 + PAIRED / 2 * (i % 2))...);
  }
};

#endif

}  // namespace ROWMAX_ISA
}  // namespace rowmax
