"""The built library: one file for every Python and torch, which means stable symbols only.

Torch's are looked up when it is loaded (tests/csrc/test_libtorch.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from types import ModuleType

import pytest

# torch's C functions, and mangled names in at::, c10:: or torch::.
OF_TORCH = re.compile(r"(aoti_)?torch_|_ZN?K?[A-Z]*(2at|3c10|5torch)[0-9]")

# What the extension may ask of Python: all in the limited interface of 3.10, and of every later one
# (docs.python.org/3/c-api/stable.html, "Contents of Limited API").
LIMITED = frozenset(
    (
        *("PyBytes_AsString", "PyCapsule_GetPointer", "PyDict_New", "PyDict_SetItemString"),
        *("PyErr_Clear", "PyErr_Format", "PyErr_NoMemory", "PyErr_Occurred"),
        *("PyErr_SetString", "PyEval_RestoreThread", "PyEval_SaveThread", "PyExc_ImportError"),
        *("PyExc_RuntimeError", "PyExc_TypeError", "PyUnicode_EncodeFSDefault"),
        *("PyFloat_AsDouble", "PyFloat_Type", "PyImport_ImportModule", "PyLong_AsLong"),
        *("PyLong_AsLongLong", "PyLong_FromLongLong", "PyModule_Create2", "PyObject_Call"),
        *("PyObject_CallFunctionObjArgs", "PyObject_CallMethodObjArgs", "PyObject_GetAttrString"),
        *("PyTuple_Pack", "PyUnicode_InternFromString"),
        *("_Py_Dealloc", "_Py_DecRef", "_Py_FalseStruct", "_Py_IncRef", "_Py_NoneStruct"),
        "_Py_TrueStruct",
        *("Py_DecRef", "Py_IncRef", "Py_NewRef"),
    )
)


@pytest.fixture
def undefined_symbols(extension: ModuleType) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    path = extension.__file__
    assert path is not None
    listing = subprocess.run(
        [nm, "-D", "--undefined-only", path], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines()]


def test_file_name_is_for_any_python(extension: ModuleType) -> None:
    assert str(extension.__file__).endswith("_C.abi3.so")


def test_links_nothing_of_torch(undefined_symbols: list[str]) -> None:
    assert [name for name in undefined_symbols if OF_TORCH.match(name)] == []


def test_links_no_python_beyond_the_limited_interface(undefined_symbols: list[str]) -> None:
    python = {name for name in undefined_symbols if name.startswith(("Py", "_Py"))}
    assert "PyModule_Create2" in python
    assert python <= LIMITED


@pytest.mark.parametrize(
    "name",
    [
        *("_ZN2at4_ops5empty4callEv", "_ZNK3c1010TensorImpl5sizesEv", "_ZN5torch3jit4loadEv"),
        *("aoti_torch_get_dim", "torch_parallel_for"),
    ],
)
def test_the_pattern_knows_a_symbol_of_torch(name: str) -> None:
    assert OF_TORCH.match(name)
