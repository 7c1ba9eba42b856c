// The operators torch.ops.rowmax_native.*, on the LibTorch stable ABI: one binary for every
// torch >= 2.10. Only checks, allocation and threads are here; the arithmetic is in the headers.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "layer_norm.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 32768;

void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  check_rows(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
  STD_TORCH_CHECK(
      tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1),
      name, ": expected the shape of x, (", x.size(0), ", ", x.size(1), "), got (",
      tensor.size(0), ", ", tensor.size(1), ")");
}

void check_vector(const Tensor& tensor, const char* name, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == size,
      name, ": expected shape (", size, ",), got ", tensor.dim(), " dimensions and ",
      tensor.numel(), " elements");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

template <typename T>
void forward(
    const Tensor& x,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    double eps,
    Tensor& y,
    Tensor& mean,
    Tensor& rstd) {
  const rowmax::LayerNormForward<T> args{
      x.const_data_ptr<T>(),
      data_or_null<T>(weight),
      data_or_null<T>(bias),
      y.mutable_data_ptr<T>(),
      mean.mutable_data_ptr<T>(),
      rstd.mutable_data_ptr<T>(),
      x.size(1),
      eps};
  const int64_t grain = std::max<int64_t>(1, kGrain / args.columns);
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    rowmax::layer_norm_forward<T>(args, begin, end);
  });
}

// x (rows, columns), weight and bias (columns,)
// -> y like x, mean and rstd (rows,), all of the dtype of x
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(
    Tensor x,
    std::optional<Tensor> weight,
    std::optional<Tensor> bias,
    double eps) {
  check_rows(x, "x");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double,
      "x: expected float32 or float64, got ", torch::headeronly::toString(dtype));
  if (weight.has_value()) {
    check_vector(*weight, "weight", x.size(1), dtype);
  }
  if (bias.has_value()) {
    check_vector(*bias, "bias", x.size(1), dtype);
  }
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_zeros(x, {x.size(0)});
  Tensor rstd = torch::stable::new_zeros(x, {x.size(0)});
  if (x.numel() > 0) {
    if (dtype == ScalarType::Float) {
      forward<float>(x, weight, bias, eps, y, mean, rstd);
    } else {
      forward<double>(x, weight, bias, eps, y, mean, rstd);
    }
  }
  return {y, mean, rstd};
}

template <typename T>
void backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& weight,
    Tensor& dx,
    Tensor& dweight,
    Tensor& dbias) {
  const int64_t columns = x.size(1);
  const int64_t blocks = rowmax::layer_norm_blocks(x.size(0));
  std::vector<double> partial_dweight(dweight.numel() > 0 ? blocks * columns : 0);
  std::vector<double> partial_dbias(dbias.numel() > 0 ? blocks * columns : 0);
  const rowmax::LayerNormBackward<T> args{
      dy.const_data_ptr<T>(),
      x.const_data_ptr<T>(),
      data_or_null<T>(weight),
      mean.const_data_ptr<T>(),
      rstd.const_data_ptr<T>(),
      dx.mutable_data_ptr<T>(),
      partial_dweight.empty() ? nullptr : partial_dweight.data(),
      partial_dbias.empty() ? nullptr : partial_dbias.data(),
      x.size(0),
      columns,
      blocks};
  const int64_t grain = std::max<int64_t>(1, kGrain * blocks / x.numel());
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      rowmax::layer_norm_backward_block<T>(args, block);
    }
  });
  if (!partial_dweight.empty()) {
    rowmax::sum_blocks<T>(partial_dweight.data(), dweight.mutable_data_ptr<T>(), blocks, columns);
  }
  if (!partial_dbias.empty()) {
    rowmax::sum_blocks<T>(partial_dbias.data(), dbias.mutable_data_ptr<T>(), blocks, columns);
  }
}

// dy and x (rows, columns), mean and rstd as the forward gave them, weight (columns,)
// -> dx like x, and dweight, dbias (columns,), of no elements where they were not asked for
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    Tensor dy,
    Tensor x,
    Tensor mean,
    Tensor rstd,
    std::optional<Tensor> weight,
    bool need_dweight,
    bool need_dbias) {
  check_rows(x, "x");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double,
      "x: expected float32 or float64, got ", torch::headeronly::toString(dtype));
  check_like(dy, x, "dy");
  check_vector(mean, "mean", x.size(0), dtype);
  check_vector(rstd, "rstd", x.size(0), dtype);
  if (weight.has_value()) {
    check_vector(*weight, "weight", x.size(1), dtype);
  }
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_zeros(x, {need_dweight ? x.size(1) : 0});
  Tensor dbias = torch::stable::new_zeros(x, {need_dbias ? x.size(1) : 0});
  if (x.numel() > 0) {
    if (dtype == ScalarType::Float) {
      backward<float>(dy, x, mean, rstd, weight, dx, dweight, dbias);
    } else {
      backward<double>(dy, x, mean, rstd, weight, dx, dweight, dbias);
    }
  }
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY(rowmax_native, m) {
  m.def(
      "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
      " bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(rowmax_native, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}
