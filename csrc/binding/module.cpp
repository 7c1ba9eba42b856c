// The importable module rowmax.kernels._C. Loading it registers the operators torch.ops.rowmax_native.*
// of the *_launch.cpp files; its functions leave them out.

#include "binding/fast_path.h"

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

static PyCFunction function(Function with_arguments) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(with_arguments));
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"fast_path_attention", function(rowmax::fast_path_attention_call), METH_FASTCALL,
       "fast_path_attention(query, key, value, align, scale) -> Tensor | None\n\n"
       "Attention without bias, dropout or gradient; None for any other call. align: 0 no\n"
       "mask, 1 causal with as many queries as keys, 2 causal aligned upper left, 3 lower right."},
      {"fast_path_norm", function(rowmax::fast_path_norm_call), METH_FASTCALL,
       "fast_path_norm(x, weight, bias, eps, subtract_mean) -> Tensor | None\n\n"
       "Layer norm, or RMS norm without subtract_mean, without gradient; None for any\n"
       "other call."},
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
  return rowmax::find_torch() ? PyModule_Create(&definition) : nullptr;
}
