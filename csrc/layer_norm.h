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
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace rowmax {

// Sums run in this many independent lanes, which the compiler keeps in vector registers.
template <typename T>
inline constexpr int64_t kLanes = 64 / sizeof(T);

// N sums over i in [0, n) of the N terms that terms(i) gives.
template <typename T, std::size_t N, typename Terms>
inline std::array<T, N> sum_terms(int64_t n, Terms terms) {
  constexpr int64_t lanes = kLanes<T>;
  T sums[N][lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const std::array<T, N> term = terms(i + lane);
      for (std::size_t k = 0; k < N; ++k) {
        sums[k][lane] += term[k];
      }
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const std::array<T, N> term = terms(i);
    for (std::size_t k = 0; k < N; ++k) {
      sums[k][lane] += term[k];
    }
  }
  std::array<T, N> totals;
  for (std::size_t k = 0; k < N; ++k) {
    for (int64_t width = lanes / 2; width > 0; width /= 2) {
      for (int64_t lane = 0; lane < width; ++lane) {
        sums[k][lane] += sums[k][lane + width];
      }
    }
    totals[k] = sums[k][0];
  }
  return totals;
}

// The mean of a row is kept as high + low, each a T: x - high is exact or nearly so for x close to
// the mean, which keeps a row with a large mean and a small deviation accurate where one T would
// not. Only `high` is stored; the backward finds `low` again, as the mean of x - high.

template <typename T>
struct LayerNormForward {
  const T* x;       // (rows, columns)
  const T* weight;  // (columns,) or null, which means 1
  const T* bias;    // (columns,) or null, which means 0
  T* y;             // (rows, columns)
  T* mean;          // (rows,)
  T* rstd;          // (rows,)
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

    const auto [sum] =
        sum_terms<T, 1>(columns, [&](int64_t i) { return std::array<T, 1>{x[i]}; });
    const T rough = static_cast<T>(static_cast<double>(sum) / count);
    const auto [differences, squares] = sum_terms<T, 2>(columns, [&](int64_t i) {
      const T difference = x[i] - rough;
      return std::array<T, 2>{difference, difference * difference};
    });
    const double shift = static_cast<double>(differences) / count;
    const double mean = static_cast<double>(rough) + shift;
    // Rounding can take a variance of zero a little below it.
    const double variance = std::max(static_cast<double>(squares) / count - shift * shift, 0.0);
    const T high = static_cast<T>(mean);
    const T low = static_cast<T>(mean - static_cast<double>(high));
    const T rstd = static_cast<T>(1.0 / std::sqrt(variance + args.eps));
    args.mean[row] = high;
    args.rstd[row] = rstd;

    for (int64_t i = 0; i < columns; ++i) {
      T value = ((x[i] - high) - low) * rstd;
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
  const T* mean;       // (rows,)
  const T* rstd;       // (rows,)
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
    const T high = args.mean[row];
    const T rstd = args.rstd[row];

    const auto gradient = [&](int64_t i) {
      return args.weight != nullptr ? dy[i] * args.weight[i] : dy[i];
    };
    const auto [differences, gradients, products] = sum_terms<T, 3>(columns, [&](int64_t i) {
      const T difference = x[i] - high;
      const T g = gradient(i);
      return std::array<T, 3>{difference, g, g * difference};
    });
    const double shift = static_cast<double>(differences) / count;
    const double mean_g = static_cast<double>(gradients) / count;
    // sum(g * xhat) / D, for xhat = (x - high - shift) * rstd
    const double mean_gx = (static_cast<double>(products) / count - shift * mean_g) * args.rstd[row];
    const T low = static_cast<T>(shift);
    const T level = static_cast<T>(mean_g);
    const T slope = static_cast<T>(mean_gx);
    for (int64_t i = 0; i < columns; ++i) {
      const T xhat = ((x[i] - high) - low) * rstd;
      dx[i] = rstd * (gradient(i) - level - xhat * slope);
    }

    if (args.partial_dweight != nullptr) {
      double* dweight = args.partial_dweight + block * columns;
      for (int64_t i = 0; i < columns; ++i) {
        dweight[i] += static_cast<double>(dy[i] * (((x[i] - high) - low) * rstd));
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
