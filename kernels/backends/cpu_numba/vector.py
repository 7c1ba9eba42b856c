"""SIMD vectors and raw pointers as Numba values, so that kernels read like ordinary Python.

`Pointer(dtype)` is an address of elements: `p + n` moves by n elements, `p[n]` reads or writes
one. `Vector(dtype)` is one register of LANES[dtype] elements, an LLVM vector: + - * work lane by
lane, comparisons give a `Vector` of booleans for `select`. LLVM lowers both to whatever the host
has; the number of lanes follows `host.vector_bits()`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

from .host import vector_bits

LANES = {types.float32: vector_bits() // 32, types.float64: vector_bits() // 64}
# The half types as they lie in memory; Numba computes with neither.
BFLOAT16, FLOAT16 = types.uint16, types.int16


class Pointer(types.Type):
    """The address of elements of `dtype`."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(f"Pointer({dtype})")


class Vector(types.Type):
    """`lanes` elements of `dtype` in one register."""

    def __init__(self, dtype: types.Type, lanes: int) -> None:
        self.dtype = dtype
        self.lanes = lanes
        super().__init__(f"Vector({dtype}, {lanes})")


def llvm_element(dtype: types.Type) -> ir.Type:
    if dtype == types.float32:
        return ir.FloatType()
    if dtype == types.float64:
        return ir.DoubleType()
    if dtype == types.boolean:
        return ir.IntType(1)
    return ir.IntType(dtype.bitwidth)


def llvm_vector(vector: Vector) -> ir.VectorType:
    return ir.VectorType(llvm_element(vector.dtype), vector.lanes)


@register_model(Pointer)
class _PointerModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Pointer) -> None:
        super().__init__(manager, kind, llvm_element(kind.dtype).as_pointer())


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, llvm_vector(kind))


def float_vector(dtype: types.Type) -> Vector:
    return Vector(dtype, LANES[dtype])


def integer_vector(dtype: types.Type) -> Vector:
    """32-bit integers, as many as `dtype` has lanes: positions and random words."""
    return Vector(types.int32, LANES[dtype])


def constant(kind: ir.VectorType, value: float | int) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def broadcast(builder: ir.IRBuilder, kind: ir.VectorType, scalar: ir.Value) -> ir.Value:
    lane0 = ir.Constant(ir.IntType(32), 0)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, lane0)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [lane0] * kind.count)
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), zeros)


def part_of(builder: ir.IRBuilder, value: ir.Value, start: int, lanes: int) -> ir.Value:
    """So many lanes of a vector, from `start`."""
    index = ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(start, start + lanes)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), index)


def call_llvm(
    builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]
) -> ir.Value:
    """A call of the LLVM intrinsic `name`, declared once a module."""
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = ir.Function(module, kind, name)
    return builder.call(function, arguments)


def suffix(kind: ir.VectorType) -> str:
    """The vector type in LLVM's intrinsic names, as v16f32."""
    letters = {ir.HalfType(): "f16", ir.FloatType(): "f32", ir.DoubleType(): "f64"}
    letter = letters.get(kind.element)
    return f"v{kind.count}{letter or f'i{kind.element.width}'}"


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call_llvm(builder, f"llvm.fma.{suffix(a.type)}", a.type, [a, b, c])


def element_bytes(kind: ir.VectorType) -> int:
    sizes = {ir.HalfType(): 2, ir.FloatType(): 4, ir.DoubleType(): 8}
    found: int = sizes.get(kind.element) or kind.element.width // 8
    return found


def load_vector(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.VectorType) -> ir.Value:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=element_bytes(kind))


def store_vector(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    address = builder.bitcast(pointer, value.type.as_pointer())
    builder.store(value, address, align=element_bytes(value.type))


def lane_indices(kind: ir.VectorType) -> ir.Constant:
    """0, 1, 2, ..., one a lane."""
    return ir.Constant(kind, [ir.Constant(kind.element, lane) for lane in range(kind.count)])


def first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    kind = ir.VectorType(ir.IntType(64), lanes)
    return builder.icmp_signed("<", lane_indices(kind), broadcast(builder, kind, count))


def emitted(sig: Any, emit: Callable[..., ir.Value | None]) -> Any:
    """An intrinsic of that signature: `emit(builder, *arguments)` is its value, or None."""

    def generate(context: Any, builder: Any, _sig: Any, args: Any) -> ir.Value:
        value = emit(builder, *args)
        return context.get_dummy_value() if value is None else value

    return sig, generate


@intrinsic
def cast(typing: Any, value: types.Type, like: types.Type) -> Any:
    """The float64 `value` as an element of `like`'s type."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return context.cast(builder, args[0], types.float64, like)

    return like(types.float64, like), generate


@intrinsic
def splat(typing: Any, scalar: types.Type) -> Any:
    """The scalar in every lane."""
    kind = float_vector(scalar)
    return emitted(kind(scalar), lambda builder, x: broadcast(builder, llvm_vector(kind), x))


@intrinsic
def widened(typing: Any, x: types.Type) -> Any:
    """The vector in float64."""
    wide = Vector(types.float64, x.lanes)

    def emit(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        return value if x == wide else builder.fpext(value, llvm_vector(wide))

    return emitted(wide(x), emit)


@intrinsic
def narrowed(typing: Any, x: types.Type, like: types.Type) -> Any:
    """The float64 vector in `like`'s type."""
    kind = Vector(like, x.lanes)

    def emit(builder: ir.IRBuilder, value: ir.Value, _: ir.Value) -> ir.Value:
        return value if x == kind else builder.fptrunc(value, llvm_vector(kind))

    return emitted(kind(x, like), emit)


@intrinsic
def splat_like(typing: Any, scalar: types.Type, x: types.Type) -> Any:
    """The float64 scalar in every lane of a vector of x's type."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        value = context.cast(builder, args[0], types.float64, x.dtype)
        return broadcast(builder, llvm_vector(x), value)

    return x(types.float64, x), generate


@intrinsic
def splat_integer(typing: Any, scalar: types.Type, like: types.Type) -> Any:
    """The low 32 bits of an integer in every lane of a vector as wide as `like`'s."""
    kind = integer_vector(like)

    def emit(builder: ir.IRBuilder, value: ir.Value, _: ir.Value) -> ir.Value:
        return broadcast(builder, llvm_vector(kind), builder.trunc(value, ir.IntType(32)))

    return emitted(kind(types.int64, like), emit)


@intrinsic
def lane_numbers(typing: Any, like: types.Type) -> Any:
    """0, 1, 2, ... as int32, one a lane of `like`."""
    kind = integer_vector(like)
    return emitted(kind(like), lambda *_: lane_indices(llvm_vector(kind)))


@intrinsic
def lane_floats(typing: Any, like: types.Type) -> Any:
    """0.0, 1.0, 2.0, ..., one a lane of `like`."""
    kind = float_vector(like)
    return emitted(kind(like), lambda *_: lane_indices(llvm_vector(kind)))


def _define(function: Any, of_floats: Any, of_integers: Any, *, compares: bool) -> None:
    """Lane-wise `function` of two equal vectors, by one of two instructions."""

    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, _kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                found = Vector(types.boolean, args[0].lanes) if compares else args[0]
                return signature(found, *args)
            return None

    @lower_builtin(function, Vector, Vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return (of_floats if sig.args[0].dtype in LANES else of_integers)(builder, *args)


_IR = ir.IRBuilder
for _function, _float, _int in (
    (operator.add, _IR.fadd, _IR.add),
    (operator.sub, _IR.fsub, _IR.sub),
    (operator.mul, _IR.fmul, _IR.mul),
    (operator.truediv, _IR.fdiv, _IR.sdiv),
    (operator.and_, None, _IR.and_),
):
    _define(_function, _float, _int, compares=False)
for _sign, _name in (("<", "lt"), ("<=", "le"), (">", "gt"), (">=", "ge"), ("==", "eq")):
    _define(
        getattr(operator, _name),
        lambda builder, a, b, sign=_sign: builder.fcmp_ordered(sign, a, b),
        lambda builder, a, b, sign=_sign: builder.icmp_signed(sign, a, b),
        compares=True,
    )


@intrinsic
def multiply_add(typing: Any, a: types.Type, b: types.Type, c: types.Type) -> Any:
    """a * b + c, rounded once."""
    return emitted(a(a, b, c), fma)


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def maximum(typing: Any, a: types.Type, b: types.Type) -> Any:
    """The larger; b where a is NaN. (A NaN score reaches the result through exp2 and the sum.)"""
    return emitted(a(a, b), _larger)


@intrinsic
def select(typing: Any, condition: types.Type, yes: types.Type, no: types.Type) -> Any:
    return emitted(yes(condition, yes, no), ir.IRBuilder.select)


@intrinsic
def any_lane(typing: Any, condition: types.Type) -> Any:
    def emit(builder: ir.IRBuilder, flags: ir.Value) -> ir.Value:
        bits = builder.bitcast(flags, ir.IntType(condition.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return emitted(types.boolean(condition), emit)


def _by_halves(vector: Vector, join: Callable[..., ir.Value]) -> Any:
    """All lanes joined to one, by halves: the same order on every run."""

    def emit(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        lanes = vector.lanes
        while lanes > 1:
            lanes //= 2
            halves = (part_of(builder, value, start, lanes) for start in (0, lanes))
            value = join(builder, *halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return emitted(vector.dtype(vector), emit)


@intrinsic
def add_lanes(typing: Any, vector: types.Type) -> Any:
    """The sum of all lanes."""
    return _by_halves(vector, lambda builder, low, high: builder.fadd(low, high))


@intrinsic
def lanes_before(typing: Any, count: types.Type, like: types.Type) -> Any:
    """True in the first `count` lanes of a vector of `like`."""
    kind = Vector(types.boolean, LANES[like])
    return emitted(
        kind(types.int64, like), lambda builder, n, _: first_lanes(builder, n, kind.lanes)
    )


@intrinsic
def largest_lane(typing: Any, vector: types.Type) -> Any:
    """The largest of all lanes; none may be NaN."""
    return _by_halves(vector, _larger)
