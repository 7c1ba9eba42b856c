// The backward kernel of layer norm, add-and-norm and RMS norm: columns in the lanes, row by row.
//
// With x^ = (x - mean) * rstd and g = dy * weight, both never stored:
//
//     d_weight = sum over rows of dy * x^          d_bias = sum over rows of dy
//     d_total = rstd * (g - mean(g) - x^ * mean(g * x^))  (+ grad_total, in add-and-norm)
//     d_x = d_total * keep / (1 - p)               only in add-and-norm with dropout
//
// RMS norm is the same without mean and mean(g). The mean comes rounded to T, which is too coarse where
// it is thousands of deviations; the mean of x - mean, summed beside the others, is the rest of it.
// Rows are summed in chunks whose number follows from the shape alone, and the chunks in their order,
// so that the bits do not depend on the threads. Half types are widened in registers; what is summed is
// float or wider.

#include "kernels/dispatch.h"
#include "kernels/rows.h"

namespace rowmax {
namespace ROWMAX_ISA {
namespace {

// x^ = (x - mean) * rstd + shift with shift = -rstd * mean(x - mean); and rstd * mean(g),
// -rstd * mean(g * x^).
template <typename T>
struct RowTerms {
  T mean, rstd, shift, g_mean, gx_mean;
};

template <typename Item, typename T = Computed<Item>>
struct Backward {
  const NormCall& call;
  T* factors;            // FACTOR_BLOCK: what dropout multiplies by
  T* block;              // (GROUP, FACTOR_BLOCK): d_total before it is rounded
  T *d_weight, *d_bias;  // of the chunk, in whole vectors
  const int64_t columns = call.columns;
  const T* weight = static_cast<const T*>(call.weight);

  const Item* x(int64_t row) const { return static_cast<const Item*>(call.x) + row * call.x_row; }
  const Item* grad_y(int64_t row) const {
    return static_cast<const Item*>(call.grad_y) + row * call.grad_y_row;
  }

  // The means of g and of g * x^ over a row, and what follows from them.
  RowTerms<T> terms_of(int64_t row) const {
    constexpr int64_t lanes = LANES<T>;
    const T mean = call.subtract_mean ? static_cast<const T*>(call.mean)[row] : T(0);
    const T rstd = static_cast<const T*>(call.rstd)[row];
    const Item *x_at = x(row), *grad_at = grad_y(row);
    const Vec<T> means = splat(mean);
    Vec<T> first[4] = {}, second[4] = {}, rest_of_mean[4] = {};
    const auto add = [&](int n, Vec<T> difference, Vec<T> g) __attribute__((always_inline)) {
      first[n] = first[n] + g;
      second[n] = multiply_add(g, difference, second[n]);
      rest_of_mean[n] = rest_of_mean[n] + difference;
    };
    int64_t c = 0;
    for (; c + 4 * lanes <= columns; c += 4 * lanes) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const int64_t at = c + n * lanes;
        add(n, load(x_at + at) - means, load(grad_at + at) * load(weight + at));
      }
    }
    for (; c < columns; c += lanes) {
      const int64_t rest = columns - c;
      const Vec<T> g = load_first(grad_at + c, rest) * load_first(weight + c, rest);
      const Vec<T> difference = load_first(x_at + c, rest) - means;
      add(0, select(lanes_before<T>(rest), difference, Vec<T>{}), g);
    }
    const auto mean_of = [&](const Vec<T>(&sums)[4]) {
      return static_cast<double>(add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]))) / columns;
    };
    const double scale = static_cast<double>(rstd);
    const double g_mean = call.subtract_mean ? mean_of(first) : 0.0;
    const double shift = call.subtract_mean ? -scale * mean_of(rest_of_mean) : 0.0;
    const double gx_mean = mean_of(second) * scale + shift * g_mean;
    return {
        mean, rstd, static_cast<T>(shift), static_cast<T>(g_mean * scale),
        static_cast<T>(-gx_mean * scale)};
  }

  // `width` columns of d_total from `first` on, for `group` (1 or GROUP) rows from `index` on; their
  // terms are added to d_weight and d_bias.
  template <int group, typename Target>
  void differentiate(
      int64_t index, int64_t first, int64_t width, const RowTerms<T>* terms, Target* target,
      int64_t target_row) const {
    const Item *x_at = x(index) + first, *grad_at = grad_y(index) + first;
    const int64_t x_row = call.x_row, grad_row = call.grad_y_row;
    const T* weight_at = weight + first;
    T *to_weight = d_weight + first, *to_bias = d_bias + first;
    // by value: behind a pointer they would be read again after every store
    Vec<T> mean[group], rstd[group], shift[group], g_mean[group], gx_mean[group];
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      mean[r] = splat(terms[r].mean);
      rstd[r] = splat(terms[r].rstd);
      shift[r] = splat(terms[r].shift);
      g_mean[r] = splat(terms[r].g_mean);
      gx_mean[r] = splat(terms[r].gx_mean);
    }
    for_vectors<T>(width, [&](int64_t c, int64_t count) {
      const Vec<T> w = load_first(weight_at + c, count);
      Vec<T> d_y[group], hat[group];
#pragma GCC unroll 4
      for (int r = 0; r < group; ++r) {
        d_y[r] = load_first(grad_at + r * grad_row + c, count);
        const Vec<T> x_of = load_first(x_at + r * x_row + c, count);
        hat[r] = multiply_add(x_of - mean[r], rstd[r], shift[r]);
        const Vec<T> level = d_y[r] * w * rstd[r] - g_mean[r];
        store_first(target + r * target_row + c, multiply_add(hat[r], gx_mean[r], level), count);
      }
      if constexpr (group == 1) {
        store(to_weight + c, multiply_add(d_y[0], hat[0], load(to_weight + c)));
        store(to_bias + c, load(to_bias + c) + d_y[0]);
      } else {
        const Vec<T> products = multiply_add(d_y[0], hat[0], d_y[1] * hat[1]) +
                                multiply_add(d_y[2], hat[2], d_y[3] * hat[3]);
        store(to_weight + c, load(to_weight + c) + products);
        store(to_bias + c, load(to_bias + c) + ((d_y[0] + d_y[1]) + (d_y[2] + d_y[3])));
      }
    });
  }

  template <typename Target>
  void differentiate_rows(
      int64_t index, int64_t group, int64_t first, int64_t width, const RowTerms<T>* terms,
      Target* target, int64_t target_row) const {
    if (group == GROUP) {
      return differentiate<GROUP>(index, first, width, terms, target, target_row);
    }
    for (int64_t r = 0; r < group; ++r) {
      differentiate<1>(index + r, first, width, terms + r, target + r * target_row, target_row);
    }
  }

  // d_total = block (+ grad_total) and d_x = d_total * keep, for at most FACTOR_BLOCK columns.
  void finish_block(int64_t row, int64_t first, int64_t width, T* of) const {
    const int64_t at = row * columns + first;
    if (call.grad_total != nullptr) {
      const Item* grad = static_cast<const Item*>(call.grad_total) + row * call.grad_total_row;
      for (int64_t c = 0; c < width; c += LANES<T>) {
        store(of + c, load(of + c) + load_first(grad + first + c, width - c));
      }
    }
    Item* d_total = static_cast<Item*>(call.d_total) + at;
    for_vectors<T>(
        width, [&](int64_t c, int64_t count) { store_first(d_total + c, load(of + c), count); });
    if (call.d_x != nullptr) {
      Item* d_x = static_cast<Item*>(call.d_x) + at;
      const T keep_scale = static_cast<T>(call.keep_scale);
      draw_factors(factors, row, first, width, call.threshold, keep_scale, call.seed);
      for_vectors<T>(width, [&](int64_t c, int64_t count) {
        store_first(d_x + c, load(of + c) * load(factors + c), count);
      });
    }
  }

  void rows(int64_t start, int64_t end) const {
    const int64_t step = columns >= GROUPED_COLUMNS ? static_cast<int64_t>(GROUP) : 1;
    for (int64_t index = start; index < end; index += step) {
      const int64_t group = min(step, end - index);
      RowTerms<T> terms[GROUP];
      for (int64_t r = 0; r < group; ++r) {
        terms[r] = terms_of(index + r);
      }
      if (call.grad_total == nullptr && call.d_x == nullptr) {
        Item* d_total = static_cast<Item*>(call.d_total) + index * columns;
        differentiate_rows(index, group, 0, columns, terms, d_total, columns);
        continue;
      }
      for (int64_t first = 0; first < columns; first += FACTOR_BLOCK) {
        const int64_t width = min<int64_t>(FACTOR_BLOCK, columns - first);
        differentiate_rows(index, group, first, width, terms, block, FACTOR_BLOCK);
        for (int64_t r = 0; r < group; ++r) {
          finish_block(index + r, first, width, block + r * FACTOR_BLOCK);
        }
      }
    }
  }
};

// target = the sum of all chunks' partial sums in their order, with Kahan's compensation.
template <typename T>
void sum_chunks(const T* partials, int64_t stride, int64_t chunks, T* target, int64_t columns) {
  for_vectors<T>(columns, [&](int64_t c, int64_t count) {
    Vec<T> total{}, lost{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Vec<T> term = load(partials + chunk * stride + c) - lost;
      const Vec<T> grown = total + term;
      lost = (grown - total) - term;
      total = grown;
    }
    store_first(target + c, total, count);
  });
}

template <typename Item>
void backward(const NormCall& call, void* memory) {
  using T = Computed<Item>;
  T* factors = static_cast<T*>(memory);
  const int64_t padded = round_up(call.columns, LANES<T>);
  T* partials = static_cast<T*>(call.partials);
  while (true) {
    const int64_t chunk = take_work(call.work_counter);
    if (chunk >= call.chunks) {
      break;
    }
    T* d_weight = partials + chunk * 2 * padded;
    fill(d_weight, 2 * padded, T(0));
    const Backward<Item> kernel{call, factors, factors + FACTOR_BLOCK, d_weight, d_weight + padded};
    const int64_t start = chunk * call.chunk_rows;
    kernel.rows(start, min(start + call.chunk_rows, call.rows));
    if (finish_task(call.work_counter + 1) == call.chunks - 1) {
      if (call.d_weight != nullptr) {
        T* target = static_cast<T*>(call.d_weight);
        sum_chunks(partials, 2 * padded, call.chunks, target, call.columns);
      }
      if (call.d_bias != nullptr) {
        T* target = static_cast<T*>(call.d_bias);
        sum_chunks(partials + padded, 2 * padded, call.chunks, target, call.columns);
      }
    }
  }
}

template <typename Item>
int64_t scratch_bytes(const NormCall&) {
  return (1 + GROUP) * FACTOR_BLOCK * sizeof(Computed<Item>);
}

template <typename Item>
constexpr NormKernel KERNEL{backward<Item>, scratch_bytes<Item>};

}  // namespace

const NormKernel norm_backward[4] = {
    KERNEL<float>, KERNEL<double>, KERNEL<Bfloat16>, KERNEL<Float16>};

}  // namespace ROWMAX_ISA
}  // namespace rowmax
