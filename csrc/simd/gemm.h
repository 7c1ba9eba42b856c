// The one product behind every matrix multiplication here.
//
//     C[r, :] (+)= sum over k of A[r, k] * B[k, :]        r < rows, k < depth
//
// A's elements are broadcast, B's and C's rows are vectors: a tile of up to 4 x VECTORS registers of
// C stays in registers for the whole depth, with no packing of A or B. The old C is added at the end:
// a sum over many blocks is then one of short sums, whose rounding error grows with the root of the
// block's depth, not of the whole length. Strides are in elements; only the columns of B and C are
// contiguous. Which way a matrix is read is a matter of strides alone:
//
//     S^T = K Q^T         A = K,    rows = keys, depth = D        B = Q^T, columns = queries
//     O^T += V^T P^T      A = V,    rows = Dv,   depth = keys     B = P^T, columns = queries
//     dV += P^T dO        A = P^T,  rows = keys, depth = queries  B = dO,  columns = Dv

#pragma once

#include "simd/transpose.h"

namespace rowmax {
namespace ROWMAX_ISA {

// A tile of C in registers, at most: 4 x 4 or 8 x 2 of 32 registers (AVX-512, NEON), 4 x 3 or 6 x 2 of
// 16 (AVX2), 4 x 2 without fused products (SSE). A tile of queries, which `TILE_VECTORS` are, may be
// several of these wide: K and V are read once for all of it.
#if defined(ROWMAX_AVX512)
inline constexpr int VECTORS = 4, TILE_VECTORS = 4, TALL = 8;
#elif defined(__aarch64__)
inline constexpr int VECTORS = 4, TILE_VECTORS = 8, TALL = 8;
#elif defined(ROWMAX_AVX2)
inline constexpr int VECTORS = 3, TILE_VECTORS = 6, TALL = 6;
#else
inline constexpr int VECTORS = 2, TILE_VECTORS = 2, TALL = 4;
#endif

// A matrix whose element (r, k) lies at at[r * row + k * depth].
template <typename T>
struct Left {
  const T* at;
  int64_t row, depth;
};

// The same number, of which the compiler knows nothing: so that it does not prepare the addresses of a
// tile's rows before the loop over tiles, in registers that the sums need.
ROWMAX_INLINE int64_t computed_here(int64_t number) {
  __asm__("" : "+r"(number));
  return number;
}

// `tiles` tiles of C, one below the other, and `panels` of them side by side: a call for each would cost
// a twentieth of its time. A panel of B stays in the first cache for all tiles below each other, where
// all of B might not.
template <typename T, int rows, int vectors, typename Item>
__attribute__((noinline)) void multiply_tiles(
    int64_t tiles, int64_t panels, int64_t depth, Left<T> left, Matrix<const Item> right,
    Matrix<T> result, bool add) {
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec<T> sums[rows][vectors] = {};
      const T* a = left.at + tile * rows * left.row;
      const Item* b = right.at + panel * vectors * LANES<T>;
      for (int64_t k = 0; k < depth; ++k) {
        Vec<T> columns[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          columns[v] = load(b + v * LANES<T>);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const Vec<T> element = splat(a[r * left.row]);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) {
            sums[r][v] = multiply_add(element, columns[v], sums[r][v]);
          }
        }
        a += left.depth;
        b += right.row;
      }
      const int64_t row = computed_here(result.row);
      T* c = result.at + tile * rows * row + panel * vectors * LANES<T>;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          T* to = c + r * row + v * LANES<T>;
          store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
      }
    }
  }
}

template <typename T, int vectors, typename Item>
inline void multiply_panels(
    int64_t panels, int64_t rows, int64_t depth, Left<T> left, Matrix<const Item> right,
    Matrix<T> result, bool add) {
  constexpr int tall = vectors == 1 ? 8 : vectors == 2 ? TALL : vectors <= VECTORS ? 4 : 1;
  const auto step = [&](auto height) {
    int64_t tiles = rows / height;
    if (height == 6 && tiles > 0 && (rows % 6 == 2 || rows % 6 == 3)) {
      --tiles;  // twice 4 in the place of 6 and single rows, whose sums are too few for the latency
    }
    if (tiles > 0) {
      multiply_tiles<T, decltype(height)::value, vectors, Item>(
          tiles, panels, depth, left, right, result, add);
      left.at += tiles * height * left.row;
      result.at += tiles * height * result.row;
      rows -= tiles * height;
    }
  };
  step(std::integral_constant<int, tall>{});
  if constexpr (tall > 4) {
    step(std::integral_constant<int, 4>{});
  }
  if constexpr (tall > 1) {
    step(std::integral_constant<int, 1>{});
  }
}

// C (+)= A B over `vectors` vectors of columns: added to C with `add`, else in its place. B's items may
// be of a half type.
template <typename T, typename Item = T>
inline void multiply(
    int64_t vectors, int64_t rows, int64_t depth, Left<T> left, Matrix<const Item> right,
    Matrix<T> result, bool add) {
  const auto step = [&](auto width, int64_t panels) {
    if (panels > 0) {
      multiply_panels<T, decltype(width)::value, Item>(
          panels, rows, depth, left, right, result, add);
      right.at += panels * width * LANES<T>;
      result.at += panels * width * LANES<T>;
      vectors -= panels * width;
    }
  };
  if (rows == 1) {  // of decoding: B is read as it lies in memory, and eight sums hide the latency
    step(std::integral_constant<int, 8>{}, vectors / 8);
  }
  // one vector is left rather as two twos
  const int64_t rest = vectors % VECTORS;
  step(
      std::integral_constant<int, VECTORS>{},
      vectors / VECTORS - (VECTORS == 3 && rest == 1 && vectors > 1 ? 1 : 0));
  if constexpr (VECTORS == 4) {
    step(std::integral_constant<int, 3>{}, vectors / 3);
  }
  step(std::integral_constant<int, 2>{}, vectors / 2);
  step(std::integral_constant<int, 1>{}, vectors);
}

// The same for A of contiguous columns: each step down one takes a line of memory, and with a power of
// two between rows all lines fall into a few of the first cache's sets. With 32 KiB of it, 64 of them stay
// there, beside B, for the tiles that take the lines' other elements. It is a sum more a tile. `before`
// rows of B come before these, in whose count the 64 begin.
template <typename T>
inline void multiply_columns(
    int64_t vectors, int64_t rows, int64_t before, int64_t depth, Left<T> left,
    Matrix<const T> right, Matrix<T> result, bool add) {
  constexpr int64_t at_once = VECTORS == 3 ? 64 : INT64_MAX;
  for (int64_t some = at_once - before % at_once; depth > some; some = at_once, add = true) {
    multiply<T>(vectors, rows, some, left, right, result, add);
    left.at += some * left.depth;
    right.at += some * right.row;
    depth -= some;
  }
  multiply<T>(vectors, rows, depth, left, right, result, add);
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
