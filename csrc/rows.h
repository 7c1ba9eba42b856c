// How the row-wise kernels go over a row: columns in the lanes, the last vector cut.

#pragma once

#include "elementwise.h"

namespace rowmax {
namespace ROWMAX_ISA {

// step(c, count) for every vector of `columns` columns, with the lanes as `count`, less in the last.
template <typename T, typename Step>
ROWMAX_INLINE void for_vectors(int64_t columns, const Step& step) {
  constexpr int64_t lanes = LANES<T>;
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) {
    step(c, lanes);
  }
  if (c < columns) {
    step(c, columns - c);
  }
}

// Which lanes come before `count`.
template <typename T>
ROWMAX_INLINE Ints<T> lanes_before(int64_t count) {
  return lane_numbers<IntOf<T>>() < static_cast<IntOf<T>>(min<int64_t>(count, LANES<T>));
}

// Words of the counters (group + n, row % 2^32, row / 2^32, NORM_STREAM) in memory's order: lane l of
// vector v is word i % 4 of counter group + i / 4 with i = v * lanes + l.
template <typename T>
ROWMAX_INLINE RandomWords<T> philox_columns(int64_t group, int64_t row, uint64_t seed) {
  constexpr int counters = LANES<uint64_t>;
  RandomWords<T> result;
  for (int part = 0; part < (sizeof(T) == 8 ? 1 : 2); ++part) {
    const uint64_t first = static_cast<uint64_t>(group + part * counters);
    const Counters c = philox_rounds(
        {{(lane_numbers<uint64_t>() + first) & 0xffffffff,
          Wide{} + (static_cast<uint64_t>(row) & 0xffffffff),
          Wide{} + (static_cast<uint64_t>(row) >> 32), Wide{} + NORM_STREAM}},
        seed);
    const Wide low = (c.word[0] & 0xffffffff) | c.word[1] << 32;
    const Wide high = (c.word[2] & 0xffffffff) | c.word[3] << 32;
    for (int half = 0; half < 2; ++half) {
      const Wide words = interleave(low, high, half);
      if constexpr (sizeof(T) == 8) {
        typedef Lanes<uint32_t, VECTOR_BYTES / 2> Narrow;
        Narrow parts[2];
        __builtin_memcpy(parts, &words, sizeof words);
        result.word[2 * half] = __builtin_convertvector(parts[0], Wide);
        result.word[2 * half + 1] = __builtin_convertvector(parts[1], Wide);
      } else {
        result.word[2 * part + half] = reinterpret_cast<Words<T>>(words);
      }
    }
  }
  return result;
}

// What dropout multiplies `columns` elements of a row by, `keep_scale` or 0. `first`, the first column,
// is a multiple of 4; `columns` is rounded up to four whole vectors.
template <typename T>
inline void draw_factors(
    T* factors, int64_t row, int64_t first, int64_t columns, int64_t threshold, T keep_scale,
    uint64_t seed) {
  const Vec<T> kept = splat(keep_scale), dropped{};
  for (int64_t c = 0; c < columns; c += 4 * LANES<T>) {
    const RandomWords<T> words = philox_columns<T>((first + c) / 4, row, seed);
    for (int n = 0; n < 4; ++n) {
      const Ints<T> keep = at_least<T>(words.word[n], threshold);
      store(factors + c + n * LANES<T>, select(keep, kept, dropped));
    }
  }
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
