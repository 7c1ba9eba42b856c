// The importable module rowmax.kernels._C. Loading it registers the operators torch.ops.rowmax_native.*
// of the *_launch.cpp files; its functions leave them out.

#include "binding/attention_launch.h"
#include "binding/fast_path.h"
#include "binding/rows_launch.h"

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

static PyCFunction function(Function with_arguments) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(with_arguments));
}

// Whether torch's functions were found and the operators registered; false with an exception set.
static bool register_operators() {
  PyObject* path = rowmax::attribute("torch._C", "__file__");
  PyObject* bytes = path == nullptr ? nullptr : PyUnicode_EncodeFSDefault(path);
  const char* text = bytes == nullptr ? nullptr : PyBytes_AsString(bytes);
  if (text != nullptr) {
    try {
      rowmax::find_libtorch(text);
      rowmax::register_attention();
      rowmax::register_rows();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_ImportError, error.what());
    }
  }
  Py_XDECREF(bytes);
  Py_XDECREF(path);
  return PyErr_Occurred() == nullptr;
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"fast_path_attention", function(rowmax::fast_path_attention_call), METH_FASTCALL,
       "fast_path_attention(query, key, value, align, key_lengths, dense, scale) -> Tensor | "
       "None\n\n"
       "Attention without bias, dropout or gradient; None for any other call. align: 0 not\n"
       "causal, 1 causal with as many queries as keys, 2 causal aligned upper left, 3 lower "
       "right."},
      {"fast_path_norm", function(rowmax::fast_path_norm_call), METH_FASTCALL,
       "fast_path_norm(x, residual, weight, bias, eps, subtract_mean) -> (y, total) | None\n\n"
       "Layer norm, or RMS norm without subtract_mean, of total = x + residual, or of x where\n"
       "that is None; without gradient; None for any other call."},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "Registers the operators torch.ops.rowmax_native.*.",
      -1,
      methods,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
  };
  return register_operators() && rowmax::find_torch() ? PyModule_Create(&definition) : nullptr;
}
