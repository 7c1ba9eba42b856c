// The fast path: a call straight from Python. See fast_path_attention.cpp and fast_path_norm.cpp.

#pragma once

#include <Python.h>

#include <exception>
#include <new>
#include <string>

#include "binding/launch.h"

namespace rowmax {

// The fast path checks the arguments, allocates the result and runs the kernel in one call of C, which
// takes a microsecond; torch's dispatcher takes several of them for an operator's arguments. It returns
// None for any other call and for wrong arguments: the general path raises the error.
//
// fast_path_attention(query, key, value, align, key_lengths, dense, scale) -> Tensor | None
PyObject* fast_path_attention_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
// fast_path_norm(x, residual, weight, bias, eps, subtract_mean) -> (y, total) | None
PyObject* fast_path_norm_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// What is looked up once, when the module is loaded.
struct Torch {
  PyObject *tensor, *parameter;       // the types whose instances are taken
  PyObject *empty_like, *contiguous;  // torch.empty_like and its keywords
  PyObject* empty_heads;              // kernels/ops/layout.py's
  PyObject *is_neg, *storage_offset;  // the methods' names
};
const Torch& looked_up();

// A new reference to a module's attribute; null with an exception set.
PyObject* attribute(const char* module, const char* name);

// Looks that up; false with an exception set where it can't be found.
bool find_torch();

// Whether `object` is a tensor on the CPU, of a float dtype, that a kernel can read as its memory says;
// with an exception or without.
bool read(PyObject* object, View& view);
// The same of a tensor of int64 or of bool; its view's dtype is `Other`.
bool read_integers(PyObject* object, View& view);
bool read_flags(PyObject* object, View& view);
// The same of a tensor that this call has made, which is one; false with an exception.
bool read_made(PyObject* made, View& view);

// torch.empty_like(like), contiguous.
PyObject* empty_like(PyObject* like);

// Whether a call it has `expected` arguments, else with an exception set.
bool counted(const char* name, Py_ssize_t count, Py_ssize_t expected);

// run() without the interpreter's lock; whether it ended, with an exception where not.
template <typename Run>
bool run_unlocked(const Run& run) {
  std::string failure;
  bool memory = true;
  PyThreadState* state = PyEval_SaveThread();
  try {
    run();
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

}  // namespace rowmax
