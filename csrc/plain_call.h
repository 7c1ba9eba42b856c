// See plain_call.cpp.

#pragma once

#include <Python.h>

namespace rowmax {

// plain_attention(query, key, value, align, scale) -> Tensor, or None where the call is not plain.
// align: 0 no mask, 1 causal with as many queries as keys, 2 causal aligned upper left, 3 lower right.
PyObject* plain_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// Looks up what that needs of torch; false with an exception set where it can't be found.
bool find_torch();

}  // namespace rowmax
