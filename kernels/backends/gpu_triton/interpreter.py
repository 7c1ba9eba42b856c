"""Repairs of Triton's interpreter (3.6 to 3.9), where it computes something else than a GPU does.

They are part of the package, not of its tests alone: whoever sets TRITON_INTERPRET=1 would get
numbers of the order of 1e8, without a word. bfloat16 is kept as bit patterns in uint16: `tl.dot`
multiplies the patterns, and the conversion from float32 cuts bits off where a GPU rounds to nearest
even.

It spends a third of its time on replacing the functions of triton.language by its own at every
call of a device function. Here they are replaced once: a process that interprets never compiles.
Half of the rest it spends on looking whether integers overflow, to report it in debug mode alone.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@functools.cache
def repair() -> None:
    """For the whole process, at the first call."""
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
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    _replace_once()


def _replace_once() -> None:
    original, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    dtype_of_number = functools.cache(dtype_of)
    replaced: set[int] = set()

    def patch_lang(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values()}
        found = seen & {id(tl), id(tl.core)}
        if not found <= replaced:
            original(function)
            replaced.update(found)
        return interpreter._LangPatchScope()  # with nothing to put back

    def np_dtype(kind: Any) -> np.dtype:
        """It builds a table of all types at every call."""
        return dtype_of(kind) if kind.scalar.is_ptr() else dtype_of_number(kind.scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, np_dtype


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns."""
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bit patterns of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
