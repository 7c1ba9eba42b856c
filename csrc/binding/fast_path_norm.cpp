// The fast path of layer norm, RMS norm and add-and-norm: contiguous rows, no dropout, no gradient.

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>

#include "binding/fast_path.h"
#include "binding/rows_launch.h"
#include "constants.h"

namespace rowmax {
namespace {

bool is_contiguous(const View& x) {
  int64_t stride = 1;
  for (int64_t dimension = x.dimensions - 1; dimension >= 0; --dimension) {
    if (x.sizes[dimension] != 1 && x.strides[dimension] != stride) {
      return false;
    }
    stride *= x.sizes[dimension];
  }
  return true;
}

int64_t element_count(const View& x) {
  return std::accumulate(x.sizes, x.sizes + x.dimensions, int64_t{1}, std::multiplies<int64_t>());
}

int64_t item_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Whether `object` is None, which leaves `residual` empty, or as x is; with an exception or without.
bool read_residual(PyObject* object, const View& x, std::optional<View>& residual) {
  if (object == Py_None) {
    return true;
  }
  return read(object, residual.emplace()) && residual->dtype == x.dtype &&
         std::equal(
             x.sizes, x.sizes + x.dimensions, residual->sizes,
             residual->sizes + residual->dimensions) &&
         is_contiguous(*residual);
}

// Whether `object` is None, which leaves `parameter` empty, or a contiguous tensor (columns,); with an
// exception or without.
bool read_parameter(PyObject* object, int64_t columns, std::optional<View>& parameter) {
  if (object == Py_None) {
    return true;
  }
  return read(object, parameter.emplace()) && parameter->dimensions == 1 &&
         parameter->sizes[0] == columns && (parameter->strides[0] == 1 || columns == 1);
}

}  // namespace

PyObject* fast_path_norm_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!counted("fast_path_norm", count, 6)) {
    return nullptr;
  }
  View x, y, total;
  std::optional<View> residual, weight, bias;
  const bool readable = read(arguments[0], x) && x.dimensions > 0 && is_contiguous(x) &&
                        read_residual(arguments[1], x, residual) &&
                        read_parameter(arguments[2], x.sizes[x.dimensions - 1], weight) &&
                        read_parameter(arguments[3], x.sizes[x.dimensions - 1], bias);
  if (!readable || Py_TYPE(arguments[4]) != &PyFloat_Type) {
    PyErr_Clear();  // the general way says what is wrong
    return Py_NewRef(Py_None);
  }
  const double eps = PyFloat_AsDouble(arguments[4]);
  const int64_t columns = x.sizes[x.dimensions - 1], elements = element_count(x);
  // Large results want what kernels/backends/cpu_common/results.py asks of the system for them.
  if (!(eps >= 0.0) || !std::isfinite(eps) || elements == 0 ||
      elements * item_bytes(x.dtype) >= ADVISED_BYTES) {
    return Py_NewRef(Py_None);
  }
  const bool subtract_mean = arguments[5] == Py_True;
  PyObject* made = empty_like(arguments[0]);
  PyObject* sum = residual && made != nullptr ? empty_like(arguments[0]) : Py_XNewRef(made);
  const auto normalise = [&] {
    fast_path_norm(x, residual, weight, bias, y, total, elements / columns, eps, subtract_mean);
  };
  PyObject* results = nullptr;
  if (sum != nullptr && read_made(made, y) && read_made(sum, total) && run_unlocked(normalise)) {
    results = PyTuple_Pack(2, made, sum);
  }
  Py_XDECREF(made);
  Py_XDECREF(sum);
  return results;
}

}  // namespace rowmax
