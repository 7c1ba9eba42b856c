"""Fused CPU kernels compiled by Numba from Python: online-softmax attention, norms and softmax.

Light to import: Numba is loaded, and a kernel compiled (or read from the disk cache), on first use.
"""

from __future__ import annotations

import importlib
import importlib.util

from ..cpu_common.preparation import declines
from ..launches import on_first_use

__all__ = ["declines", "unavailable"]

__getattr__ = on_first_use(__name__)


def unavailable() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed (pip install numba)"
    try:
        host = importlib.import_module(".host", __package__)
        host.vector_bits()
    except (ImportError, ValueError, OSError) as error:
        return f"Numba does not load here: {error}"
    if importlib.import_module("numba").config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT keeps Numba from compiling"
    lacking = host.lacking()
    return f"Numba compiles for a processor without {lacking}" if lacking else None
