"""Memory as kernels see it: typed pointers, and vectors loaded from them and stored to them.

`Pointer(dtype)` is an address of elements: `p + n` moves by n elements, `p[n]` reads or writes
one. Half types are storage only: their vectors load as float32 and are rounded to nearest even when
they are stored.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin

from .host import vector_bits
from .vector import (
    BFLOAT16,
    FLOAT16,
    LANES,
    Pointer,
    Vector,
    broadcast,
    call_llvm,
    constant,
    element_bytes,
    emitted,
    first_lanes,
    float_vector,
    integer_vector,
    llvm_element,
    llvm_vector,
    load_vector,
    store_vector,
    suffix,
)


def _at(dtype: types.Type, *like: types.Type) -> Any:
    kind = llvm_element(dtype).as_pointer()
    sig = Pointer(dtype)(types.int64, *like)
    return emitted(sig, lambda builder, address, *_: builder.inttoptr(address, kind))


@intrinsic
def pointer(typing: Any, address: types.Type, like: types.Type) -> Any:
    """The int64 `address` as a pointer to elements of `like`'s type."""
    return _at(like, like)


@intrinsic
def integers_at(typing: Any, address: types.Type) -> Any:
    """The int64 `address` as a pointer to int64 elements."""
    return _at(types.int64)


@intrinsic
def bytes_at(typing: Any, address: types.Type) -> Any:
    """The int64 `address` as a pointer to bytes (bools)."""
    return _at(types.uint8)


@intrinsic
def bfloat16_at(typing: Any, address: types.Type, like: types.Type) -> Any:
    """The int64 `address` as a pointer to bfloat16 elements, to be computed with in float32.

    Where a kernel computes in float64 there are none, and this is a pointer to float64: so one
    source does both.
    """
    return _at(BFLOAT16 if like == types.float32 else like, like)


@intrinsic
def float16_at(typing: Any, address: types.Type, like: types.Type) -> Any:
    """As `bfloat16_at`, of float16."""
    return _at(FLOAT16 if like == types.float32 else like, like)


def retyped(dtype: types.Type, source: types.Type) -> Any:
    kind = llvm_element(dtype).as_pointer()
    return emitted(Pointer(dtype)(source), lambda builder, at: builder.bitcast(at, kind))


@intrinsic
def as_integers32(typing: Any, source: types.Type) -> Any:
    """The same address as a pointer to int32 elements."""
    return retyped(types.int32, source)


@intrinsic
def item_size(typing: Any, like: types.Type) -> Any:
    """Bytes an element of `like`'s type takes."""
    size = ir.Constant(ir.IntType(64), like.bitwidth // 8)
    return emitted(types.int64(like), lambda *_: size)


def _define(function: Any, sig: Callable[[Pointer], Any]) -> None:
    """The signature of `function` of a pointer and an integer."""

    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, _kws: Any) -> Any:
            known = isinstance(args[0], Pointer) and isinstance(args[1], types.Integer)
            return sig(args[0]) if known else None


_define(operator.add, lambda at: signature(at, at, types.int64))
_define(operator.getitem, lambda at: signature(at.dtype, at, types.int64))
_define(operator.setitem, lambda at: signature(types.none, at, types.int64, at.dtype))


@lower_builtin(operator.add, Pointer, types.int64)
def _pointer_add(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
    return builder.gep(args[0], [args[1]])


@lower_builtin(operator.getitem, Pointer, types.int64)
def _pointer_get(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
    return builder.load(builder.gep(args[0], [args[1]]))


@lower_builtin(operator.setitem, Pointer, types.int64, types.Any)
def _pointer_set(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
    builder.store(args[2], builder.gep(args[0], [args[1]]))
    return context.get_dummy_value()


def stored_vector(dtype: types.Type) -> ir.VectorType:
    """A vector of `dtype`, or of a half type as it lies in memory, as LLVM reads it."""
    if dtype == BFLOAT16:
        return ir.VectorType(ir.IntType(16), LANES[types.float32])
    if dtype == FLOAT16:
        return ir.VectorType(ir.HalfType(), LANES[types.float32])
    return llvm_vector(float_vector(dtype))


def computed_type(dtype: types.Type) -> types.Type:
    """The type that elements stored as `dtype` are computed in."""
    return types.float32 if dtype in (BFLOAT16, FLOAT16) else dtype


def widen(builder: ir.IRBuilder, value: ir.Value, dtype: types.Type) -> ir.Value:
    floats = llvm_vector(float_vector(computed_type(dtype)))
    if dtype == BFLOAT16:  # the high half of a float32
        words = ir.VectorType(ir.IntType(32), floats.count)
        return builder.bitcast(builder.shl(builder.zext(value, words), constant(words, 16)), floats)
    return builder.fpext(value, floats) if dtype == FLOAT16 else value


def narrow(builder: ir.IRBuilder, value: ir.Value, dtype: types.Type) -> ir.Value:
    """Rounded to nearest, ties to even; a NaN stays one."""
    stored = stored_vector(dtype)
    if dtype == BFLOAT16:
        words = ir.VectorType(ir.IntType(32), stored.count)
        bits = builder.bitcast(value, words)
        odd = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 1))
        rounded = builder.add(bits, builder.add(odd, constant(words, 0x7FFF)))
        quiet = builder.or_(bits, constant(words, 0x400000))
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(bits, constant(words, 16)), stored)
    return builder.fptrunc(value, stored) if dtype == FLOAT16 else value


@intrinsic
def load(typing: Any, source: types.Type) -> Any:
    """One vector from LANES consecutive elements, of any alignment."""
    stored = stored_vector(source.dtype)

    def emit(builder: ir.IRBuilder, at: ir.Value) -> ir.Value:
        return widen(builder, load_vector(builder, at, stored), source.dtype)

    return emitted(float_vector(computed_type(source.dtype))(source), emit)


@intrinsic
def load_integers(typing: Any, source: types.Type, like: types.Type) -> Any:
    """int32 elements, as many as a vector of `like` has lanes."""
    kind = integer_vector(like)
    return emitted(
        kind(source, like), lambda builder, at, _: load_vector(builder, at, llvm_vector(kind))
    )


@intrinsic
def store(typing: Any, target: types.Type, value: types.Type) -> Any:
    """The vector to consecutive elements, of any alignment."""

    def emit(builder: ir.IRBuilder, at: ir.Value, vector: ir.Value) -> None:
        store_vector(builder, narrow(builder, vector, target.dtype), at)

    return emitted(types.void(target, value), emit)


@intrinsic
def load_first(typing: Any, source: types.Type, count: types.Type) -> Any:
    """The first `count` elements and zeros; what lies beyond is not read."""
    stored = stored_vector(source.dtype)

    def emit(builder: ir.IRBuilder, at: ir.Value, n: ir.Value) -> ir.Value:
        value = load_masked(builder, at, first_lanes(builder, n, stored.count), stored)
        return widen(builder, value, source.dtype)

    return emitted(float_vector(computed_type(source.dtype))(source, types.int64), emit)


@intrinsic
def store_first(typing: Any, target: types.Type, value: types.Type, count: types.Type) -> Any:
    """Stores the first `count` lanes; what lies beyond is not touched."""

    def emit(builder: ir.IRBuilder, at: ir.Value, vector: ir.Value, n: ir.Value) -> None:
        rounded = narrow(builder, vector, target.dtype)
        store_masked(builder, rounded, at, first_lanes(builder, n, rounded.type.count))

    return emitted(types.void(target, value, types.int64), emit)


def load_masked(
    builder: ir.IRBuilder, pointer: ir.Value, mask: ir.Value, kind: ir.VectorType
) -> ir.Value:
    """The elements where `mask` is true, and zeros."""
    address = builder.bitcast(pointer, kind.as_pointer())
    align = ir.Constant(ir.IntType(32), element_bytes(kind))
    name = f"llvm.masked.load.{suffix(kind)}.p0"
    return call_llvm(builder, name, kind, [address, align, mask, ir.Constant(kind, None)])


def store_masked(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value, mask: ir.Value) -> None:
    """The elements where `mask` is true."""
    kind = value.type
    address = builder.bitcast(pointer, kind.as_pointer())
    align = ir.Constant(ir.IntType(32), element_bytes(kind))
    name = f"llvm.masked.store.{suffix(kind)}.p0"
    call_llvm(builder, name, ir.VoidType(), [value, address, align, mask])


@intrinsic
def load_flags(typing: Any, source: types.Type, like: types.Type) -> Any:
    """Bools from consecutive bytes, as many as a vector of `like` has lanes."""
    kind = ir.VectorType(ir.IntType(8), LANES[like])

    def emit(builder: ir.IRBuilder, at: ir.Value, _: ir.Value) -> ir.Value:
        flags = load_vector(builder, at, kind)
        return builder.icmp_unsigned("!=", flags, ir.Constant(kind, None))

    return emitted(Vector(types.boolean, kind.count)(source, like), emit)


@intrinsic
def load_first_flags(typing: Any, source: types.Type, like: types.Type, count: types.Type) -> Any:
    """The first `count` bools and False; what lies beyond is not read."""
    kind = ir.VectorType(ir.IntType(8), LANES[like])

    def emit(builder: ir.IRBuilder, at: ir.Value, _: ir.Value, n: ir.Value) -> ir.Value:
        flags = load_masked(builder, at, first_lanes(builder, n, kind.count), kind)
        return builder.icmp_unsigned("!=", flags, ir.Constant(kind, None))

    return emitted(Vector(types.boolean, kind.count)(source, like, types.int64), emit)


@intrinsic
def load_first_equal(
    typing: Any, source: types.Type, value: types.Type, like: types.Type, count: types.Type
) -> Any:
    """Which of the first `count` int64 elements equal `value`; what lies beyond is not read."""
    kind = ir.VectorType(ir.IntType(64), LANES[like])

    def emit(
        builder: ir.IRBuilder, at: ir.Value, wanted: ir.Value, _: ir.Value, n: ir.Value
    ) -> ir.Value:
        mask = first_lanes(builder, n, kind.count)
        numbers = load_masked(builder, at, mask, kind)
        equal = builder.icmp_signed("==", numbers, broadcast(builder, kind, wanted))
        return builder.and_(equal, mask)

    i64 = types.int64
    return emitted(Vector(types.boolean, kind.count)(source, i64, like, i64), emit)


@intrinsic
def add_across(typing: Any, source: types.Type) -> Any:
    """The sums of LANES consecutive vectors: lane n is the sum of the lanes of vector n.

    Rounds of adding neighbours, of two vectors into one: first within 128 bits, where shuffles cost
    least.
    """
    kind = llvm_vector(float_vector(source.dtype))

    def emit(builder: ir.IRBuilder, at: ir.Value) -> ir.Value:
        lanes = kind.count
        part = 128 * lanes // vector_bits()
        index = ir.VectorType(ir.IntType(32), lanes)
        vectors = [
            load_vector(builder, builder.gep(at, [ir.Constant(ir.IntType(64), n * lanes)]), kind)
            for n in range(lanes)
        ]
        while len(vectors) > 1:
            # neighbouring lanes within 128 bits, then neighbours of 128 bits
            block, group = (part, 1) if len(vectors) * part > lanes else (lanes, part)
            both = np.arange(2 * lanes).reshape(2, lanes // block, -1, 2, group)
            even, odd = (
                ir.Constant(index, both[..., n, :].swapaxes(0, 1).ravel().tolist()) for n in (0, 1)
            )
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))
                for a, b in pairs
            ]
        return vectors[0]

    return emitted(float_vector(source.dtype)(source), emit)


def _prefetching(write: int, level: int) -> Any:
    def emit(builder: ir.IRBuilder, address: ir.Value) -> None:
        at = builder.inttoptr(address, ir.IntType(8).as_pointer())
        hints = (ir.Constant(ir.IntType(32), value) for value in (write, level, 1))
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [at, *hints])

    return emitted(types.void(types.int64), emit)


@intrinsic
def prefetch(typing: Any, address: types.Type) -> Any:
    """Ask for the cache line at the int64 `address`; one that is not there does no harm."""
    return _prefetching(0, 2)


@intrinsic
def prefetch_to_write(typing: Any, address: types.Type) -> Any:
    """The same for a line that will be written: no other core may keep it."""
    return _prefetching(1, 3)


def _increment(ordering: str) -> Any:
    def emit(builder: ir.IRBuilder, at: ir.Value) -> ir.Value:
        return builder.atomic_rmw("add", at, ir.Constant(ir.IntType(64), 1), ordering)

    return emitted(types.int64(Pointer(types.int64)), emit)


@intrinsic
def take_work(typing: Any, counter: types.Type) -> Any:
    """Atomically: the number at the int64 pointer, which then is one more."""
    return _increment("monotonic")


@intrinsic
def finish_task(typing: Any, counter: types.Type) -> Any:
    """As `take_work`, and a barrier: who draws the last number sees what all others wrote."""
    return _increment("acq_rel")


@intrinsic
def published(typing: Any, counter: types.Type) -> Any:
    """Atomically: the int64 at the pointer, and all that was written before it was published."""
    return emitted(types.int64(counter), lambda builder, at: builder.load_atomic(at, "acquire", 8))


@intrinsic
def publish(typing: Any, counter: types.Type, value: types.Type) -> Any:
    """Atomically: the int64 at the pointer becomes `value`, after all that was written before."""

    def emit(builder: ir.IRBuilder, at: ir.Value, number: ir.Value) -> None:
        builder.store_atomic(number, at, "release", 8)

    return emitted(types.void(counter, types.int64), emit)


@intrinsic
def yield_processor(typing: Any) -> Any:
    """Lets another thread run: who is waited for may be waiting for this core."""

    def emit(builder: ir.IRBuilder) -> None:
        if sys.platform != "win32":
            call_llvm(builder, "sched_yield", ir.IntType(32), [])

    return emitted(types.void(), emit)
