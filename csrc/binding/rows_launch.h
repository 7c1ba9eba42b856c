// A norm from tensors' views to its kernel, for calls straight from Python.

#pragma once

#include <optional>

#include "binding/launch.h"

namespace rowmax {

// y = (x - mean) * rstd * weight + bias over rows of contiguous x and y; without `subtract_mean` mean is 0.
// weight and bias (columns,) are of any float dtype, contiguous.
void fast_path_norm(
    const View& x, const std::optional<View>& weight, const std::optional<View>& bias,
    const View& y, int64_t rows, double eps, bool subtract_mean);

// The operators of norms and masked softmax, and what is asked of this processor.
void register_rows();

}  // namespace rowmax
