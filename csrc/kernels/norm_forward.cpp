// The forward kernel of layer norm, add-and-norm and RMS norm: columns in the lanes, row by row.
//
// A row is read from memory once and from the cache afterwards:
//
//     total = residual + x * keep / (1 - p)                       only in add-and-norm
//     near = the mean of the row's first elements
//     shift, square = sum(row - near) / N, sum((row - near)^2) / N
//     rstd = 1 / sqrt(square - shift^2 + eps)
//     y = ((row - near) - shift) * rstd * weight + bias
//
// Where `near` is not near the mean (shift^2 not small beside square), it becomes near + shift and the
// two sums are taken again: so the statistics hold where the mean is thousands of deviations, as in
// the 'corrected two-pass algorithm' (Chan, Golub & LeVeque 1983). RMS norm is the same with near =
// shift = 0. Half types are widened in registers; `total` is rounded to them before it is normalised.
//
// A sum ends in a chain of dependent instructions in which memory would stand still. Short rows are
// therefore written while a later one is summed, and long rows taken GROUP at a time.

#include "kernels/dispatch.h"
#include "kernels/rows.h"

namespace rowmax {
namespace ROWMAX_ISA {
namespace {

// What a row becomes: ((x - near) * rstd + shift) * weight + bias, with shift = -shift * rstd.
template <typename T>
struct Statistics {
  T near, shift, rstd;
};

template <typename T>
struct Moments {
  double first, second;
};

// The same, each in all lanes. A loop that stores elements needs them by value: it would read numbers
// behind a reference again after every store.
template <typename T>
struct Spread {
  Vec<T> near, shift, rstd;

  ROWMAX_INLINE explicit Spread(const Statistics<T>& row)
      : near(splat(row.near)), shift(splat(row.shift)), rstd(splat(row.rstd)) {}
  ROWMAX_INLINE Vec<T> affine(Vec<T> x, Vec<T> weight, Vec<T> bias) const {
    return multiply_add(multiply_add(x - near, rstd, shift), weight, bias);
  }
};

// Sums of row - near and of its square, in four independent chains.
template <typename T>
struct Sums {
  Vec<T> first[4] = {}, second[4] = {};

  ROWMAX_INLINE void add(int chain, Vec<T> difference) {
    first[chain] = first[chain] + difference;
    second[chain] = multiply_add(difference, difference, second[chain]);
  }
  Moments<T> means(int64_t columns) const {
    const T sum = add_lanes((first[0] + first[1]) + (first[2] + first[3]));
    const T square = add_lanes((second[0] + second[1]) + (second[2] + second[3]));
    return {static_cast<double>(sum) / columns, static_cast<double>(square) / columns};
  }
};

template <typename Item, typename T = Computed<Item>>
struct Forward {
  const NormCall& call;
  T* factors;  // FACTOR_BLOCK: what dropout multiplies by
  const int64_t columns = call.columns;
  const T* weight = static_cast<const T*>(call.weight);
  const T* bias = static_cast<const T*>(call.bias);

  Item* y(int64_t index) const { return static_cast<Item*>(call.y) + index * columns; }
  const Item* normalised(int64_t index) const {
    return call.residual == nullptr ? static_cast<const Item*>(call.x) + index * call.x_row
                                    : static_cast<const Item*>(call.total) + index * columns;
  }

  // One row of total = residual + x * keep / (1 - p).
  void add_row(int64_t index) const {
    const Item* x = static_cast<const Item*>(call.x) + index * call.x_row;
    const Item* residual = static_cast<const Item*>(call.residual) + index * call.residual_row;
    Item* total = static_cast<Item*>(call.total) + index * columns;
    for (int64_t first = 0; first < columns; first += FACTOR_BLOCK) {
      const int64_t width = min<int64_t>(FACTOR_BLOCK, columns - first);
      if (call.dropout) {
        const T keep_scale = static_cast<T>(call.keep_scale);
        draw_factors(factors, index, first, width, call.threshold, keep_scale, call.seed);
      }
      for_vectors<T>(width, [&](int64_t c, int64_t count) {
        const Vec<T> dropped = load_first(x + first + c, count) * load(factors + c);
        store_first(total + first + c, load_first(residual + first + c, count) + dropped, count);
      });
    }
  }

  Moments<T> moments(const Item* row, T near) const {
    Sums<T> sums;
    constexpr int64_t lanes = LANES<T>;
    const Vec<T> nears = splat(near);
    int64_t c = 0;
    for (; c + 4 * lanes <= columns; c += 4 * lanes) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        sums.add(n, load(row + c + n * lanes) - nears);
      }
    }
    for (; c < columns; c += lanes) {
      sums.add(0, tail(row + c, nears, columns - c));
    }
    return sums.means(columns);
  }

  // The first `count` elements less `nears`, and zeros.
  ROWMAX_INLINE static Vec<T> tail(const Item* row, Vec<T> nears, int64_t count) {
    return select(lanes_before<T>(count), load_first(row, count) - nears, Vec<T>{});
  }

  // The `near` of a row, which is written first where it is a sum.
  T prepare(int64_t index) const {
    if (call.residual != nullptr) {
      add_row(index);
    }
    if (!call.subtract_mean) {
      return T(0);
    }
    const Item* row = normalised(index);
    const int64_t count = min<int64_t>(columns, NEAR_VECTORS * LANES<T>);
    Vec<T> sums[NEAR_VECTORS] = {};
    for (int64_t v = 0; v < NEAR_VECTORS; ++v) {
      if (v * LANES<T> < count) {
        sums[v] = load_first(row + v * LANES<T>, count - v * LANES<T>);
      }
    }
    const T sum = add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return static_cast<T>(static_cast<double>(sum) / count);
  }

  // mean and rstd from the moments.
  Statistics<T> keep_statistics(int64_t index, T near, Moments<T> moments_of) const {
    double first = moments_of.first, square = moments_of.second, shift = 0.0;
    if (call.subtract_mean) {
      if (FAR * first * first > square) {
        near = static_cast<T>(static_cast<double>(near) + first);
        const Moments<T> again = moments(normalised(index), near);
        first = again.first;
        square = again.second;
      }
      shift = first;
      static_cast<T*>(call.mean)[index] = static_cast<T>(static_cast<double>(near) + shift);
    }
    double variance = square - shift * shift;
    variance = variance < 0.0 ? 0.0 : variance;
    const T rstd = static_cast<T>(1.0 / __builtin_sqrt(variance + call.eps));
    static_cast<T*>(call.rstd)[index] = rstd;
    return {near, static_cast<T>(-shift * static_cast<double>(rstd)), rstd};
  }

  void write(int64_t index, const Statistics<T>& statistics) const {
    const Item* row = normalised(index);
    Item* to = y(index);
    const Spread<T> spread(statistics);
    for_vectors<T>(columns, [&](int64_t c, int64_t count) {
      const Vec<T> w = load_first(weight + c, count), b = load_first(bias + c, count);
      store_first(to + c, spread.affine(load_first(row + c, count), w, b), count);
    });
  }

  // `write` for GROUP rows at once.
  void write_group(int64_t index, const Statistics<T>* statistics) const {
    const Item *row = normalised(index), *second = normalised(index + 1);
    const int64_t stride = second - row;
    Item* to = y(index);
    const Spread<T> spread[] = {
        Spread<T>(statistics[0]), Spread<T>(statistics[1]), Spread<T>(statistics[2]),
        Spread<T>(statistics[3])};
    static_assert(GROUP == 4);
    for_vectors<T>(columns, [&](int64_t c, int64_t count) {
      const Vec<T> w = load_first(weight + c, count), b = load_first(bias + c, count);
#pragma GCC unroll 4
      for (int64_t r = 0; r < GROUP; ++r) {
        const Vec<T> x = load_first(row + r * stride + c, count);
        store_first(to + r * columns + c, spread[r].affine(x, w, b), count);
      }
    });
  }

  // `write` of one row and `moments` of a following one, with their bits.
  Moments<T> write_and_sum(
      int64_t index, const Statistics<T>& statistics, const Item* following, T near) const {
    constexpr int64_t lanes = LANES<T>;
    const Item* row = normalised(index);
    Item* to = y(index);
    const Vec<T> nears = splat(near);
    const Spread<T> spread(statistics);
    Sums<T> sums;
    int64_t c = 0;
    for (; c + 4 * lanes <= columns; c += 4 * lanes) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const int64_t at = c + n * lanes;
        sums.add(n, load(following + at) - nears);
        store(to + at, spread.affine(load(row + at), load(weight + at), load(bias + at)));
      }
    }
    for (; c < columns; c += lanes) {
      const int64_t count = columns - c;
      sums.add(0, tail(following + c, nears, count));
      const Vec<T> w = load_first(weight + c, count), b = load_first(bias + c, count);
      store_first(to + c, spread.affine(load_first(row + c, count), w, b), count);
    }
    return sums.means(columns);
  }

  // Rows start to end, as a pipeline: in one step a row is prepared, another one's moments are summed
  // while a third is written, and the statistics of a fourth follow from its moments. Each of these
  // ends in a chain of dependent instructions, and a step is what hides it: what a step computes is
  // first used a step later, or two.
  void one_by_one(int64_t start, int64_t end) const {
    T nears[4];
    Moments<T> moments_of[4];
    Statistics<T> statistics[4];
    for (int64_t index = start - 4; index < end; ++index) {  // the row that is written
      const int64_t prepared = index + 4, summed = index + 3, known = index + 1;
      if (prepared < end) {
        nears[prepared & 3] = prepare(prepared);
      }
      if (start <= known && known < end) {
        statistics[known & 3] = keep_statistics(known, nears[known & 3], moments_of[known & 3]);
      }
      if (start <= summed && summed < end) {
        const T near = nears[summed & 3];
        const Item* row = normalised(summed);
        moments_of[summed & 3] = index < start
                                     ? moments(row, near)
                                     : write_and_sum(index, statistics[index & 3], row, near);
      } else if (index >= start) {
        write(index, statistics[index & 3]);
      }
    }
  }

  // Rows start to end, GROUP at a time.
  void groups(int64_t start, int64_t end) const {
    for (int64_t index = start; index < end; index += GROUP) {
      const int64_t group = min<int64_t>(GROUP, end - index);
      Statistics<T> statistics[GROUP];
      for (int64_t r = 0; r < group; ++r) {
        const T near = prepare(index + r);
        statistics[r] = keep_statistics(index + r, near, moments(normalised(index + r), near));
      }
      if (group == GROUP) {
        write_group(index, statistics);
        continue;
      }
      for (int64_t r = 0; r < group; ++r) {
        write(index + r, statistics[r]);
      }
    }
  }
};

template <typename Item>
void forward(const NormCall& call, void* memory) {
  using T = Computed<Item>;
  T* factors = static_cast<T*>(memory);
  fill(factors, FACTOR_BLOCK, T(1));
  const Forward<Item> kernel{call, factors};
  for_grabs(call.work_counter, call.task_rows, call.rows, [&](int64_t start, int64_t end) {
    if (call.columns >= GROUPED_COLUMNS) {
      kernel.groups(start, end);
    } else {
      kernel.one_by_one(start, end);
    }
  });
}

template <typename Item>
int64_t scratch_bytes(const NormCall&) {
  return FACTOR_BLOCK * sizeof(Computed<Item>);
}

template <typename Item>
constexpr NormKernel KERNEL{forward<Item>, scratch_bytes<Item>};

}  // namespace

const NormKernel norm_forward[4] = {
    KERNEL<float>, KERNEL<double>, KERNEL<Bfloat16>, KERNEL<Float16>};

}  // namespace ROWMAX_ISA
}  // namespace rowmax
