"""The compiled CPU backend: the C++ extension `rowmax.kernels._C` (sources in csrc/)."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

from ..cpu_common.preparation import declines
from ..launches import on_first_use

__all__ = ["declines", "left_out_on_purpose", "unavailable"]

__getattr__ = on_first_use(
    __name__, fast_path_attention="attention_launch", fast_path_norm="norm_launch"
)

_REASON = Path(__file__).parents[2] / "missing_extension.txt"  # written by setup.py


def left_out_on_purpose() -> bool:
    """Whether rowmax was built with ROWMAX_EXTENSION=skip."""
    return _REASON.is_file() and _REASON.read_text().strip() == "ROWMAX_EXTENSION=skip"


@functools.cache
def extension() -> Any:
    """The extension's module; loading it registers its operators."""
    return importlib.import_module("..._C", __package__)


@functools.cache
def unavailable() -> str | None:
    """Loads the extension; why that fails, where it does."""
    try:
        extension()
    except ModuleNotFoundError:
        why = f" ({_REASON.read_text().strip()})" if _REASON.is_file() else ""
        return (
            f"the C++ extension is not built{why}; with GCC >= 12 and Python's headers, "
            "`pip install --no-deps --force-reinstall --no-cache-dir .` in the checkout builds it"
        )
    except ImportError as error:
        return f"the C++ extension does not load with torch {torch.__version__}: {error}"
    try:
        torch.ops.rowmax_native.vector_bits()
        torch.ops.rowmax_native.bfloat16_dots()
    except RuntimeError as error:
        return str(error)
    return None
