// How the row-wise kernels go over a row: columns in the lanes, the last vector cut.

#pragma once

#include "simd/philox.h"
#include "simd/vector_math.h"

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

// step(index) for each row that this thread takes.
template <typename Call, typename Step>
ROWMAX_INLINE void for_rows(const Call& call, const Step& step) {
  for_grabs(call.work_counter, call.task_rows, call.rows, [&](int64_t first, int64_t end) {
    for (int64_t index = first; index < end; ++index) {
      step(index);
    }
  });
}

template <typename Item, typename Call>
int64_t no_bytes(const Call&) {
  return 0;
}

// Which lanes come before `count`.
template <typename T>
ROWMAX_INLINE Ints<T> lanes_before(int64_t count) {
  return lane_numbers<IntOf<T>>() < static_cast<IntOf<T>>(min<int64_t>(count, LANES<T>));
}

// The largest sign * row; -inf of nothing; NaN is passed over, the exponentials keep it.
template <typename T, typename Item>
inline T row_maximum(const Item* row, T sign, int64_t columns) {
  constexpr int64_t lanes = LANES<T>;
  const Vec<T> signs = splat(sign), nothing = splat(-INFINITE<T>);
  Vec<T> largest[4] = {nothing, nothing, nothing, nothing};
  int64_t c = 0;
  for (; c + 4 * lanes <= columns; c += 4 * lanes) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      largest[n] = maximum(load(row + c + n * lanes) * signs, largest[n]);
    }
  }
  for (; c < columns; c += lanes) {
    const Vec<T> value = load_first(row + c, columns - c) * signs;
    largest[0] = maximum(select(lanes_before<T>(columns - c), value, nothing), largest[0]);
  }
  return largest_lane(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
}

// What dropout multiplies `columns` elements of a row by, `keep_scale` or 0. `first`, the first column,
// is a multiple of 4; `columns` is rounded up to four whole vectors.
template <typename T>
inline void draw_factors(
    T* factors, int64_t row, int64_t first, int64_t columns, int64_t threshold, T keep_scale,
    uint64_t seed) {
  const Vec<T> kept = splat(keep_scale), dropped{};
  for (int64_t c = 0; c < columns; c += 4 * LANES<T>) {
    const RandomWords<T> words = philox_columns<T>(
        static_cast<uint32_t>((first + c) / 4), static_cast<uint32_t>(row),
        static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), NORM_STREAM, seed);
    for (int n = 0; n < 4; ++n) {
      const Ints<T> keep = at_least<T>(words.word[n], threshold);
      store(factors + c + n * LANES<T>, select(keep, kept, dropped));
    }
  }
}

}  // namespace ROWMAX_ISA
}  // namespace rowmax
