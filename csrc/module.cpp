// The importable module rowmax.kernels._C. Loading it registers the operators torch.ops.rowmax_native.*
// of the *_launch.cpp files; its one function leaves them out.

#include "plain_call.h"

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"plain_attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rowmax::plain_call)),
       METH_FASTCALL,
       "plain_attention(query, key, value, align, scale) -> Tensor | None\n\n"
       "Attention without bias, dropout or gradient; None where the call is not plain. align: 0 no\n"
       "mask, 1 causal with as many queries as keys, 2 causal aligned upper left, 3 lower right."},
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
