// The shared part of the fast paths: reading Python's tensors past torch's dispatcher. See fast_path.h.

#include "binding/fast_path.h"

#include "binding/dlpack.h"

namespace rowmax {
namespace {

Torch torch_;
const dlpack::ExchangeApi* api_;  // null where this torch offers none

ScalarType float_type(dlpack::DataType dtype) {
  if (dtype.code == dlpack::kBfloat && dtype.bits == 16) {
    return ScalarType::BFloat16;
  }
  if (dtype.code == dlpack::kFloat) {
    return dtype.bits == 16   ? ScalarType::Half
           : dtype.bits == 32 ? ScalarType::Float
           : dtype.bits == 64 ? ScalarType::Double
                              : ScalarType::Other;
  }
  return ScalarType::Other;
}

// The tensor as a View; false where it is not on the CPU.
bool describe(const dlpack::Tensor& tensor, View& view) {
  if (tensor.device.type != dlpack::kCpu || tensor.byte_offset != 0 || tensor.dtype.lanes != 1) {
    return false;
  }
  view.dtype = float_type(tensor.dtype);
  view.data = tensor.data;
  view.dimensions = tensor.dimensions;
  view.sizes = tensor.sizes;
  view.strides = tensor.strides;
  return true;
}

// Whether the values stand in the tensor's memory as they are. Zeros without memory and what wraps another
// tensor have a storage at address 0, from which a view's first element is as far as its offset says.
bool holds_its_values(PyObject* object, const dlpack::Tensor& tensor) {
  PyObject* negated = PyObject_CallMethodObjArgs(object, torch_.is_neg, nullptr);
  Py_XDECREF(negated);
  if (negated != Py_False) {
    return false;
  }
  PyObject* offset = PyObject_CallMethodObjArgs(object, torch_.storage_offset, nullptr);
  if (offset == nullptr) {
    return false;
  }
  const auto elements = static_cast<uintptr_t>(PyLong_AsLongLong(offset));
  Py_DECREF(offset);
  return reinterpret_cast<uintptr_t>(tensor.data) != elements * (tensor.dtype.bits / 8);
}

// Reads a tensor whose dtype `fits`.
template <typename Fits>
bool read_if(PyObject* object, View& view, const Fits& fits) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  dlpack::Tensor tensor;
  return api_ != nullptr && (type == torch_.tensor || type == torch_.parameter) &&
         api_->view(object, &tensor) == 0 && fits(tensor.dtype) && describe(tensor, view) &&
         holds_its_values(object, tensor);
}

}  // namespace

const Torch& looked_up() { return torch_; }

PyObject* attribute(const char* module, const char* name) {
  PyObject* imported = PyImport_ImportModule(module);
  PyObject* found = imported == nullptr ? nullptr : PyObject_GetAttrString(imported, name);
  Py_XDECREF(imported);
  return found;
}

bool read(PyObject* object, View& view) {
  return read_if(
      object, view, [](dlpack::DataType dtype) { return float_type(dtype) != ScalarType::Other; });
}

bool read_integers(PyObject* object, View& view) {
  return read_if(object, view, [](dlpack::DataType dtype) {
    return dtype.code == dlpack::kInt && dtype.bits == 64;
  });
}

bool read_flags(PyObject* object, View& view) {
  return read_if(object, view, [](dlpack::DataType dtype) {
    return dtype.code == dlpack::kBool && dtype.bits == 8;
  });
}

bool read_made(PyObject* made, View& view) {
  dlpack::Tensor tensor;
  return api_->view(made, &tensor) == 0 && describe(tensor, view);
}

PyObject* empty_like(PyObject* like) {
  PyObject* arguments = PyTuple_Pack(1, like);
  if (arguments == nullptr) {
    return nullptr;
  }
  PyObject* made = PyObject_Call(torch_.empty_like, arguments, torch_.contiguous);
  Py_DECREF(arguments);
  return made;
}

bool counted(const char* name, Py_ssize_t count, Py_ssize_t expected) {
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", name, expected, count);
  }
  return count == expected;
}

bool find_torch() {
  torch_.tensor = attribute("torch", "Tensor");
  torch_.parameter = attribute("torch.nn", "Parameter");
  torch_.empty_like = attribute("torch", "empty_like");
  torch_.empty_heads = attribute("rowmax.kernels.ops.layout", "empty_heads");
  torch_.is_neg = PyUnicode_InternFromString("is_neg");
  torch_.storage_offset = PyUnicode_InternFromString("storage_offset");
  torch_.contiguous = PyDict_New();
  PyObject* format = attribute("torch", "contiguous_format");
  if (PyErr_Occurred() != nullptr ||
      PyDict_SetItemString(torch_.contiguous, "memory_format", format) != 0) {
    return false;
  }
  Py_DECREF(format);
  PyObject* capsule = PyObject_GetAttrString(torch_.tensor, "__dlpack_c_exchange_api__");
  if (capsule != nullptr) {
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    if (api != nullptr && api->major == dlpack::kMajorVersion && api->view != nullptr) {
      api_ = api;
    }
    Py_DECREF(capsule);
  }
  PyErr_Clear();  // an older torch has none
  return true;
}

}  // namespace rowmax
