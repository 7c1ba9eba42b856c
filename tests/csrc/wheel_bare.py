"""Load the extension into a Python that has no torch: `wheel_bare.py LIBTORCH_FOLDER EXTENSION`.

The extension needs Python's limited interface and libtorch's stable one, and of torch's Python
package some names, which stand-ins have: it registers its operators with libtorch, through which
one is called here.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    libraries, extension = map(Path, sys.argv[1:])
    assert importlib.util.find_spec("torch") is None, "this Python has torch"
    for name in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so", "libtorch.so"):
        path = libraries / name
        if path.is_file():
            libtorch = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    stand_in("torch", Tensor=object, empty_like=None, contiguous_format=None)
    stand_in("torch.nn", Parameter=object)
    stand_in("torch._C", __file__=libtorch._name)
    for name in ("rowmax", "rowmax.kernels", "rowmax.kernels.ops"):
        stand_in(name)
    stand_in("rowmax.kernels.ops.layout", empty_heads=None)
    loader = importlib.machinery.ExtensionFileLoader("_C", str(extension))
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    loader.exec_module(importlib.util.module_from_spec(spec))

    stack = (ctypes.c_uint64 * 1)()
    status = libtorch.aoti_torch_call_dispatcher(b"rowmax_native::vector_bits", b"", stack)
    assert status == 0, f"rowmax_native::vector_bits: error {status}"
    assert stack[0] in (128, 256, 512), stack[0]


def stand_in(name: str, **names: object) -> None:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(names)


if __name__ == "__main__":
    main()
