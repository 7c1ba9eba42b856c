// A norm from tensors' views to its kernel, for calls straight from Python.

#pragma once

#include <optional>

#include "binding/launch.h"

namespace rowmax {

// y = (total - mean) * rstd * weight + bias over rows, total = x + residual, or x itself without one, and
// then `total` is not written; without `subtract_mean` mean is 0. All are contiguous; weight and bias
// (columns,) are of any float dtype.
void fast_path_norm(
    const View& x, const std::optional<View>& residual, const std::optional<View>& weight,
    const std::optional<View>& bias, const View& y, const View& total, int64_t rows, double eps,
    bool subtract_mean);

// The operators of norms and masked softmax, and what is asked of this processor.
void register_rows();

}  // namespace rowmax
