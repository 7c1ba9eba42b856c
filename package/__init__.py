"""rowmax: fused attention and normalisation for PyTorch; `python -m rowmax` tells what works here.

`from rowmax import attention` takes any public name of `rowmax.kernels`. Nothing is imported before
it is asked for: `import rowmax` loads no torch, and a subpackage loads what it needs itself.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels import *  # noqa: F403

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and "torch" not in sys.modules:
    # Now: `python -m` imports a package, and with it torch, before its __main__ runs.
    from . import waiting

    waiting.settle_for(sys.orig_argv)

_SUBPACKAGES = ("bench", "kernels", "transformer")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name == "__all__" or not name.startswith("_"):
        kernels = importlib.import_module(".kernels", __name__)
        if name == "__all__":
            return [*kernels.__all__]
        if name in kernels.__all__:
            return getattr(kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *__getattr__("__all__")})
