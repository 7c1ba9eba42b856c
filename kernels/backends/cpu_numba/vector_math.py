"""Functions of single vectors: the exponential of the softmax, tanh and log2."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..cpu_common.constants import EXP2_DOUBLE, EXP2_FLOAT, LOG2_SERIES, TANH_DOUBLE, TANH_FLOAT
from .jit import jit
from .vector import Vector, constant, emitted, fma, llvm_vector, maximum, select, splat_like

_EXP2_COEFFICIENTS = {types.float32: EXP2_FLOAT, types.float64: EXP2_DOUBLE}
# mantissa bits, exponent bias, and the number whose addition leaves round(x) + bias in the low bits
_FORMAT = {
    types.float32: (23, 127, 1.5 * 2.0**23 + 127),
    types.float64: (52, 1023, 1.5 * 2.0**52 + 1023),
}


def _exp2_of(builder: Any, of: Vector, x: ir.Value, low: ir.Value | None) -> ir.Value:
    """2^(x + low) for x <= 0 of at least -bias: x = n + f with n = round(x), a polynomial in
    f + low, and n + bias for the exponent's bits. With x = -bias they come out as 0, and so does
    the result."""
    mantissa_bits, _, rounder = _FORMAT[of.dtype]
    kind = llvm_vector(of)
    bits = ir.VectorType(ir.IntType(64 if of.dtype == types.float64 else 32), of.lanes)
    shifted = builder.fadd(x, constant(kind, rounder))
    fraction = builder.fsub(x, builder.fsub(shifted, constant(kind, rounder)))
    if low is not None:
        fraction = builder.fadd(fraction, low)
    powers = _EXP2_COEFFICIENTS[of.dtype]
    value: ir.Value = constant(kind, powers[-1])
    for coefficient in reversed(powers[:-1]):
        value = fma(builder, value, fraction, constant(kind, coefficient))
    exponent = builder.shl(builder.bitcast(shifted, bits), constant(bits, mantissa_bits))
    return builder.fmul(value, builder.bitcast(exponent, kind))


def _at_least(builder: Any, of: Vector, x: ir.Value, least: float) -> ir.Value:
    """The larger, and x where it is NaN."""
    bound = constant(llvm_vector(of), least)
    return builder.select(builder.fcmp_ordered("<", x, bound), bound, x)


@intrinsic
def exp2(typing: Any, x: Vector) -> Any:
    """2^x for x <= 0, lane by lane; 0 below the smallest normal number, -inf included; NaN of
    NaN."""

    def emit(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        clamped = _at_least(builder, x, value, -float(_FORMAT[x.dtype][1]))
        return _exp2_of(builder, x, clamped, None)

    return emitted(x(x), emit)


@intrinsic
def exp2_difference(typing: Any, a: Vector, b: Vector, rest: Vector) -> Any:
    """2^(a - b - rest) for a <= b + rest, with what rounding takes from a - b where |a| <= |b|
    (Dekker 1971); as `exp2` else. A rest of more than 1/8 belongs to numbers from 2^21 on in
    float32, and is taken from the difference itself."""

    def emit(
        builder: ir.IRBuilder, minuend: ir.Value, subtrahend: ir.Value, less: ir.Value
    ) -> ir.Value:
        kind, least = llvm_vector(a), -float(_FORMAT[a.dtype][1])
        zero = constant(kind, 0.0)
        size = builder.select(builder.fcmp_ordered("<", less, zero), builder.fsub(zero, less), less)
        large = builder.select(builder.fcmp_ordered(">", size, constant(kind, 0.125)), less, zero)
        difference = builder.fsub(minuend, subtrahend)
        bounded = _at_least(builder, a, difference, least)
        taken = builder.fsub(minuend, builder.fadd(bounded, subtrahend))
        # The bound is met only where the difference is clamped; NaN where it is NaN.
        taken = _at_least(builder, a, taken, -(2.0**-16))
        low = builder.fsub(taken, builder.fsub(less, large))
        clamped = _at_least(builder, a, builder.fsub(difference, large), least)
        return _exp2_of(builder, a, clamped, low)

    return emitted(a(a, b, rest), emit)


_TANH_SERIES = {types.float32: TANH_FLOAT, types.float64: TANH_DOUBLE}


@intrinsic
def _tanh_below_quarter(typing: Any, x: Vector) -> Any:
    """tanh(x) for |x| <= 1/4, by its series."""

    def emit(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        kind = llvm_vector(x)
        square = builder.fmul(value, value)
        *lower, total = [constant(kind, c) for c in _TANH_SERIES[x.dtype]]
        for coefficient in reversed(lower):
            total = fma(builder, total, square, coefficient)
        return builder.fmul(total, value)

    return emitted(x(x), emit)


@jit
def tanh(x):
    """tanh lane by lane: sign(x) * (1 - e) / (1 + e) with e = exp(-2 |x|)."""
    zero, one = splat_like(0.0, x), splat_like(1.0, x)
    size = maximum(x, zero - x)
    e = exp2(size * splat_like(-2.0 * math.log2(math.e), x))
    large = (one - e) / (one + e)
    large = select(x < zero, zero - large, large)
    return select(size < splat_like(0.25, x), _tanh_below_quarter(x), large)


@intrinsic
def log2_wide(typing: Any, x: Vector) -> Any:
    """log2(x) of finite x > 0 in float64, lane by lane; of 0 anything."""
    wide = Vector(types.float64, x.lanes)

    def emit(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        kind = llvm_vector(wide)
        words = ir.VectorType(ir.IntType(64), x.lanes)
        value = value if x == wide else builder.fpext(value, kind)
        bits = builder.bitcast(value, words)
        # the exponent of x / sqrt(1/2), so that m = x / 2^n lies around 1
        offset = constant(words, 0x3FE6A09E667F3BCD)
        exponent = builder.ashr(builder.sub(bits, offset), constant(words, 52))
        m = builder.bitcast(builder.sub(bits, builder.shl(exponent, constant(words, 52))), kind)
        one = constant(kind, 1.0)
        s = builder.fdiv(builder.fsub(m, one), builder.fadd(m, one))
        square = builder.fmul(s, s)
        *lower, total = [constant(kind, c) for c in LOG2_SERIES]
        for coefficient in reversed(lower):
            total = fma(builder, total, square, coefficient)
        return fma(builder, total, s, builder.sitofp(exponent, kind))

    return emitted(wide(x), emit)
