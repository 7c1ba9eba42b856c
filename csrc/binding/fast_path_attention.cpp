// The fast path of attention: no bias, no dropout, no gradient, no mask or a causal one.

#include <cmath>

#include "binding/attention_launch.h"
#include "binding/fast_path.h"

namespace rowmax {
namespace {

// How query 0 is aligned with the keys, as kernels/backends/cpu_native/attention_launch.py numbers it.
enum Align : long { kNoMask = 0, kSameLength = 1, kUpperLeft = 2, kLowerRight = 3 };

// Whether `object` is a tensor (B, H, L, D) with contiguous rows; with an exception or without.
bool read_heads(PyObject* object, View& view) {
  return read(object, view) && view.dimensions == 4 && view.strides[3] == 1;
}

bool fit(const View& query, const View& key, const View& value) {
  const int64_t longest = std::max(query.sizes[2], key.sizes[2]);
  return query.dtype == key.dtype && query.dtype == value.dtype && longest < int64_t{1} << 30 &&
         query.sizes[0] == key.sizes[0] && query.sizes[0] == value.sizes[0] &&
         query.sizes[3] == key.sizes[3] && key.sizes[1] == value.sizes[1] &&
         key.sizes[2] == value.sizes[2] && key.sizes[1] > 0 && query.sizes[1] % key.sizes[1] == 0;
}

// What kernels/ops/layout.py's empty_heads(query, value_dim) gives; itself only where no shorter way is.
PyObject* empty_heads(PyObject* query, const View& of, int64_t value_dim) {
  if (of.strides[1] < of.strides[2] || of.sizes[3] != value_dim) {
    PyObject* dim = PyLong_FromLongLong(value_dim);
    PyObject* made = PyObject_CallFunctionObjArgs(looked_up().empty_heads, query, dim, nullptr);
    Py_XDECREF(dim);
    return made;
  }
  return empty_like(query);
}

}  // namespace

PyObject* fast_path_attention_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!counted("fast_path_attention", count, 5)) {
    return nullptr;
  }
  View query, key, value, out;
  if (!read_heads(arguments[0], query) || !read_heads(arguments[1], key) ||
      !read_heads(arguments[2], value) || !fit(query, key, value)) {
    PyErr_Clear();  // the general way says what is wrong
    return Py_NewRef(Py_None);
  }
  std::optional<int64_t> band_upper;
  const int64_t ahead = key.sizes[2] - query.sizes[2];
  const long align = PyLong_AsLong(arguments[3]);
  if (align == kSameLength && ahead != 0) {
    return Py_NewRef(Py_None);
  }
  if (align != kNoMask) {
    band_upper = align == kLowerRight ? ahead : 0;
  }
  double scale;
  if (arguments[4] == Py_None) {
    scale = std::pow(static_cast<double>(query.sizes[3]), -0.5);
  } else if (Py_TYPE(arguments[4]) == &PyFloat_Type) {
    scale = PyFloat_AsDouble(arguments[4]);
  } else {
    return Py_NewRef(Py_None);
  }
  if (!std::isfinite(scale)) {
    return Py_NewRef(Py_None);
  }
  PyObject* made = empty_heads(arguments[0], query, value.sizes[3]);
  if (made == nullptr) {
    return nullptr;
  }
  const auto attend = [&] { fast_path_attention(query, key, value, out, scale, band_upper); };
  if (!read_made(made, out) || !run_unlocked(attend)) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

}  // namespace rowmax
