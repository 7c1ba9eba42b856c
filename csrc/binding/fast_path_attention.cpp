// The fast path of attention: no bias, no dropout, no gradient, at most one mask: a causal one, lengths or
// a dense one.

#include <algorithm>
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

// Whether `object` is None, which leaves `lengths` empty, or a contiguous tensor (B,) of int64.
bool read_lengths(PyObject* object, int64_t batch, std::optional<View>& lengths) {
  return object == Py_None ||
         (read_integers(object, lengths.emplace()) && lengths->dimensions == 1 &&
          lengths->sizes[0] == batch && (lengths->strides[0] == 1 || batch == 1));
}

// Whether `object` is None, which leaves `dense` empty, or bools (B | 1, H | 1, Lq | 1, Lk | 1).
bool read_dense(PyObject* object, const View& query, const View& key, std::optional<View>& dense) {
  if (object == Py_None) {
    return true;
  }
  if (!read_flags(object, dense.emplace()) || dense->dimensions != 4) {
    return false;
  }
  const int64_t shape[] = {query.sizes[0], query.sizes[1], query.sizes[2], key.sizes[2]};
  return std::equal(shape, shape + 4, dense->sizes, [](int64_t size, int64_t own) {
    return own == size || own == 1;
  });
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
  if (!counted("fast_path_attention", count, 7)) {
    return nullptr;
  }
  View query, key, value, out;
  std::optional<View> key_lengths, dense;
  if (!read_heads(arguments[0], query) || !read_heads(arguments[1], key) ||
      !read_heads(arguments[2], value) || !fit(query, key, value) ||
      !read_lengths(arguments[4], query.sizes[0], key_lengths) ||
      !read_dense(arguments[5], query, key, dense)) {
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
  if (arguments[6] == Py_None) {
    scale = std::pow(static_cast<double>(query.sizes[3]), -0.5);
  } else if (Py_TYPE(arguments[6]) == &PyFloat_Type) {
    scale = PyFloat_AsDouble(arguments[6]);
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
  const auto attend = [&] {
    fast_path_attention(query, key, value, out, scale, band_upper, key_lengths, dense);
  };
  if (!read_made(made, out) || !run_unlocked(attend)) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

}  // namespace rowmax
