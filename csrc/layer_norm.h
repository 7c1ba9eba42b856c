// Layer normalisation over rows, forward and backward: plain C++, no torch.
//
//   forward   y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
//   backward  with xhat = (x - mean) * rstd and g = dy * weight, per row of D elements,
//             dx      = rstd * (g - sum(g) / D - xhat * sum(g * xhat) / D)
//             dweight = sum over rows of dy * xhat
//             dbias   = sum over rows of dy
//
// Every sum has one fixed order that depends on the shape alone, so results are bitwise the same
// for any number of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace rowmax {

// Sums run in this many independent lanes, which the compiler keeps in vector registers.
template <typename T>
inline constexpr int64_t kLanes = 64 / sizeof(T);

// Two sums over i in [0, n): of first(i) and of second(i).
template <typename T>
struct TwoSums {
  T first;
  T second;
};

template <typename T, typename Terms>
inline TwoSums<T> sum_terms(int64_t n, Terms terms) {
  constexpr int64_t lanes = kLanes<T>;
  T first[lanes] = {};
  T second[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const TwoSums<T> term = terms(i + lane);
      first[lane] += term.first;
      second[lane] += term.second;
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const TwoSums<T> term = terms(i);
    first[lane] += term.first;
    second[lane] += term.second;
  }
  for (int64_t width = lanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      first[lane] += first[lane + width];
      second[lane] += second[lane + width];
    }
  }
  return {first[0], second[0]};
}

// A mean as high + low, each a T. x - high is exact or nearly so for x close to the mean, which
// keeps rows with a large mean and a small deviation accurate where one T would not.
template <typename T>
struct SplitMean {
  T high;
  T low;

  explicit SplitMean(double mean)
      : high(static_cast<T>(mean)), low(static_cast<T>(mean - static_cast<double>(high))) {}

  T centre(T value) const {
    return (value - high) - low;
  }
};

template <typename T>
struct LayerNormForward {
  const T* x;       // (rows, columns)
  const T* weight;  // (columns,) or null, which means 1
  const T* bias;    // (columns,) or null, which means 0
  T* y;             // (rows, columns)
  double* mean;     // (rows,)
  double* rstd;     // (rows,)
  int64_t columns;
  double eps;
};

// Rows [begin, end). Statistics in two passes: a first mean, then the sums of the differences
// from it and of their squares, the first of which corrects the mean and the variance.
template <typename T>
void layer_norm_forward(const LayerNormForward<T>& args, int64_t begin, int64_t end) {
  const int64_t columns = args.columns;
  const double count = static_cast<double>(columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = args.x + row * columns;
    T* y = args.y + row * columns;

    const T sum = sum_terms<T>(columns, [&](int64_t i) { return TwoSums<T>{x[i], T(0)}; }).first;
    const T rough = static_cast<T>(static_cast<double>(sum) / count);
    const TwoSums<T> sums = sum_terms<T>(columns, [&](int64_t i) {
      const T difference = x[i] - rough;
      return TwoSums<T>{difference, difference * difference};
    });
    const double shift = static_cast<double>(sums.first) / count;
    const double mean = static_cast<double>(rough) + shift;
    // Rounding can take a variance of zero a little below it.
    const double variance =
        std::max(static_cast<double>(sums.second) / count - shift * shift, 0.0);
    const double rstd = 1.0 / std::sqrt(variance + args.eps);
    args.mean[row] = mean;
    args.rstd[row] = rstd;

    const SplitMean<T> split(mean);
    const T scale = static_cast<T>(rstd);
    for (int64_t i = 0; i < columns; ++i) {
      T value = split.centre(x[i]) * scale;
      value = args.weight != nullptr ? value * args.weight[i] : value;
      y[i] = args.bias != nullptr ? value + args.bias[i] : value;
    }
  }
}

template <typename T>
struct LayerNormBackward {
  const T* dy;         // (rows, columns)
  const T* x;          // (rows, columns)
  const T* weight;     // (columns,) or null, which means 1
  const double* mean;  // (rows,)
  const double* rstd;  // (rows,)
  T* dx;               // (rows, columns)
  // Sums over each block's rows, or null where no one asked for them.
  double* partial_dweight;  // (blocks, columns)
  double* partial_dbias;    // (blocks, columns)
  int64_t rows;
  int64_t columns;
  int64_t blocks;
};

// How many blocks of rows the backward is cut into: set by the shape, never by the threads.
inline int64_t layer_norm_blocks(int64_t rows) {
  constexpr int64_t most = 64;
  return std::min(rows, most);
}

// The rows of one block, and their share of the column sums. The partials start as zero.
template <typename T>
void layer_norm_backward_block(const LayerNormBackward<T>& args, int64_t block) {
  const int64_t columns = args.columns;
  const double count = static_cast<double>(columns);
  const int64_t begin = args.rows * block / args.blocks;
  const int64_t end = args.rows * (block + 1) / args.blocks;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = args.dy + row * columns;
    const T* x = args.x + row * columns;
    T* dx = args.dx + row * columns;
    const SplitMean<T> split(args.mean[row]);
    const T rstd = static_cast<T>(args.rstd[row]);

    const auto gradient = [&](int64_t i) {
      return args.weight != nullptr ? dy[i] * args.weight[i] : dy[i];
    };
    const TwoSums<T> sums = sum_terms<T>(columns, [&](int64_t i) {
      const T g = gradient(i);
      return TwoSums<T>{g, g * (split.centre(x[i]) * rstd)};
    });
    const T mean_g = static_cast<T>(static_cast<double>(sums.first) / count);
    const T mean_gx = static_cast<T>(static_cast<double>(sums.second) / count);
    for (int64_t i = 0; i < columns; ++i) {
      dx[i] = rstd * (gradient(i) - mean_g - split.centre(x[i]) * rstd * mean_gx);
    }

    if (args.partial_dweight != nullptr) {
      double* dweight = args.partial_dweight + block * columns;
      for (int64_t i = 0; i < columns; ++i) {
        dweight[i] += static_cast<double>(dy[i] * (split.centre(x[i]) * rstd));
      }
    }
    if (args.partial_dbias != nullptr) {
      double* dbias = args.partial_dbias + block * columns;
      for (int64_t i = 0; i < columns; ++i) {
        dbias[i] += static_cast<double>(dy[i]);
      }
    }
  }
}

// Adds up the blocks' column sums, in the order of the blocks.
template <typename T>
void sum_blocks(const double* partial, T* out, int64_t blocks, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      total += partial[block * columns + i];
    }
    out[i] = static_cast<T>(total);
  }
}

}  // namespace rowmax
