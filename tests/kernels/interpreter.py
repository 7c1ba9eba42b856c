"""Repairs of Triton's interpreter (3.6 to 3.9), where it computes something else than a GPU does.

bfloat16 is kept as bit patterns in uint16: `tl.dot` multiplies the patterns, and the conversion
from float32 cuts bits off where a GPU rounds to nearest even.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np


def repair() -> None:
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_dot, original_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(to_float32(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original_dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        wanted = kind.scalar
        if (source.dtype.scalar, wanted) == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(source.data), wanted)
        if (source.dtype.scalar, wanted) == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float32(source.data), wanted)
        return original_cast(self, source, kind)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns."""
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bit patterns of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
