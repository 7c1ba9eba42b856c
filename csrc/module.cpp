// The importable module rowmax.kernels._C. It holds nothing: loading it registers the operators
// of binding.cpp with torch, under torch.ops.rowmax_native.

#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "Registers the operators torch.ops.rowmax_native.*.",
      -1,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
  };
  return PyModule_Create(&definition);
}
