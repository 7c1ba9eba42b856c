// A plain attention straight from Python: no bias, no dropout, no gradient, no mask or a causal one.
//
// Its arguments are checked, its result is allocated and its kernel runs in one call, which takes a
// microsecond; torch's dispatcher takes several of them for an operator's arguments. What is not plain,
// or wrong, is left to the general way, which knows what to say about it.

#include "plain_call.h"

#include <cmath>
#include <exception>
#include <new>
#include <string>

#include "attention_launch.h"
#include "dlpack.h"

namespace rowmax {
namespace {

// What is looked up once, when the module is loaded. `api` is null where this torch offers none.
struct Torch {
  PyObject *tensor, *parameter;      // the types whose instances are taken
  PyObject *empty_like, *contiguous;  // torch.empty_like and its keywords
  PyObject* empty_heads;              // kernels/layout.py's
  PyObject* is_neg;                   // the method's name
  const dlpack::ExchangeApi* api;
};
Torch torch_;

// How query 0 is aligned with the keys, as kernels/cpu_native/attention_launch.py numbers it.
enum Align : long { kNoMask = 0, kSameLength = 1, kUpperLeft = 2, kLowerRight = 3 };

struct Viewed : View {
  int64_t size(int dimension) const { return sizes[dimension]; }
};

// Whether `object` is a tensor that a kernel can read as its memory says; with an exception or without.
bool read(PyObject* object, Viewed& view) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  dlpack::Tensor tensor;
  if ((type != torch_.tensor && type != torch_.parameter) ||
      torch_.api->view(object, &tensor) != 0) {
    return false;
  }
  PyObject* negated = PyObject_CallMethodObjArgs(object, torch_.is_neg, nullptr);
  Py_XDECREF(negated);
  if (negated != Py_False || tensor.device.type != dlpack::kCpu || tensor.dimensions != 4 ||
      tensor.byte_offset != 0 || tensor.dtype.lanes != 1) {
    return false;
  }
  const dlpack::DataType dtype = tensor.dtype;
  if (dtype.code == dlpack::kBfloat && dtype.bits == 16) {
    view.dtype = ScalarType::BFloat16;
  } else if (dtype.code == dlpack::kFloat && dtype.bits == 16) {
    view.dtype = ScalarType::Half;
  } else if (dtype.code == dlpack::kFloat && dtype.bits == 32) {
    view.dtype = ScalarType::Float;
  } else if (dtype.code == dlpack::kFloat && dtype.bits == 64) {
    view.dtype = ScalarType::Double;
  } else {
    return false;
  }
  view.data = tensor.data;
  view.sizes = tensor.sizes;
  view.strides = tensor.strides;
  return tensor.strides[3] == 1;
}

bool fit(const Viewed& query, const Viewed& key, const Viewed& value) {
  const int64_t longest = std::max(query.size(2), key.size(2));
  return query.dtype == key.dtype && query.dtype == value.dtype && longest < int64_t{1} << 30 &&
         query.size(0) == key.size(0) && query.size(0) == value.size(0) &&
         query.size(3) == key.size(3) && key.size(1) == value.size(1) &&
         key.size(2) == value.size(2) && key.size(1) > 0 && query.size(1) % key.size(1) == 0;
}

// What kernels/layout.py's empty_heads(query, value_dim) gives; itself only where no shorter way is.
PyObject* empty_heads(PyObject* query, const Viewed& of, int64_t value_dim) {
  if (of.strides[1] < of.strides[2] || of.size(3) != value_dim) {
    PyObject* dim = PyLong_FromLongLong(value_dim);
    PyObject* made = PyObject_CallFunctionObjArgs(torch_.empty_heads, query, dim, nullptr);
    Py_XDECREF(dim);
    return made;
  }
  PyObject* arguments = PyTuple_Pack(1, query);
  if (arguments == nullptr) {
    return nullptr;
  }
  PyObject* made = PyObject_Call(torch_.empty_like, arguments, torch_.contiguous);
  Py_DECREF(arguments);
  return made;
}

// The kernel, without the interpreter's lock; whether it ran, with an exception where not.
bool attend(
    const Viewed& query, const Viewed& key, const Viewed& value, const Viewed& out, double scale,
    std::optional<int64_t> band_upper) {
  std::string failure;
  bool memory = true;
  PyThreadState* state = PyEval_SaveThread();
  try {
    plain_attention(query, key, value, out, scale, band_upper);
  } catch (const std::bad_alloc&) {
    memory = false;
  } catch (const std::exception& error) {
    failure = error.what();
  }
  PyEval_RestoreThread(state);
  if (!memory) {
    PyErr_NoMemory();
  } else if (!failure.empty()) {
    PyErr_SetString(PyExc_RuntimeError, failure.c_str());
  }
  return memory && failure.empty();
}

// A new reference to a module's attribute.
PyObject* attribute(const char* module, const char* name) {
  PyObject* imported = PyImport_ImportModule(module);
  PyObject* found = imported == nullptr ? nullptr : PyObject_GetAttrString(imported, name);
  Py_XDECREF(imported);
  return found;
}

}  // namespace

PyObject* plain_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    PyErr_Format(PyExc_TypeError, "plain_attention: expected 5 arguments, got %zd", count);
    return nullptr;
  }
  Viewed query, key, value, out;
  if (torch_.api == nullptr || !read(arguments[0], query) || !read(arguments[1], key) ||
      !read(arguments[2], value) || !fit(query, key, value)) {
    PyErr_Clear();  // the general way says what is wrong
    return Py_NewRef(Py_None);
  }
  std::optional<int64_t> band_upper;
  const int64_t ahead = key.size(2) - query.size(2);
  const long align = PyLong_AsLong(arguments[3]);
  if (align == kSameLength && ahead != 0) {
    return Py_NewRef(Py_None);
  }
  if (align != kNoMask) {
    band_upper = align == kLowerRight ? ahead : 0;
  }
  double scale;
  if (arguments[4] == Py_None) {
    scale = std::pow(static_cast<double>(query.size(3)), -0.5);
  } else if (Py_TYPE(arguments[4]) == &PyFloat_Type) {
    scale = PyFloat_AsDouble(arguments[4]);
  } else {
    return Py_NewRef(Py_None);
  }
  if (!std::isfinite(scale)) {
    return Py_NewRef(Py_None);
  }
  PyObject* made = empty_heads(arguments[0], query, value.size(3));
  if (made == nullptr) {
    return nullptr;
  }
  if (!read(made, out) || !attend(query, key, value, out, scale, band_upper)) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

bool find_torch() {
  torch_.tensor = attribute("torch", "Tensor");
  torch_.parameter = attribute("torch.nn", "Parameter");
  torch_.empty_like = attribute("torch", "empty_like");
  torch_.empty_heads = attribute("rowmax.kernels.layout", "empty_heads");
  torch_.is_neg = PyUnicode_InternFromString("is_neg");
  torch_.contiguous = PyDict_New();
  PyObject* format = attribute("torch", "contiguous_format");
  if (PyErr_Occurred() != nullptr ||
      PyDict_SetItemString(torch_.contiguous, "memory_format", format) != 0) {
    return false;
  }
  Py_DECREF(format);
  PyObject* capsule = PyObject_GetAttrString(torch_.tensor, "__dlpack_c_exchange_api__");
  if (capsule != nullptr) {
    const auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    if (api != nullptr && api->major == dlpack::kMajorVersion && api->view != nullptr) {
      torch_.api = api;
    }
    Py_DECREF(capsule);
  }
  PyErr_Clear();  // an older torch has none
  return true;
}

}  // namespace rowmax
