"""Functions of single vectors: the exponential of the softmax, tanh and log2."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..cpu_common.constants import (
    EXP2_DOUBLE,
    EXP2_FLOAT,
    LOG2_SERIES,
    TANH_DOUBLE,
    TANH_FLOAT,
)
from .jit import jit
from .vector import (
    Vector,
    constant,
    fma,
    llvm_vector,
    maximum,
    select,
    splat_like,
)

_EXP2_COEFFICIENTS = {types.float32: EXP2_FLOAT, types.float64: EXP2_DOUBLE}
# mantissa bits, exponent bias, and the number whose addition leaves round(x) + bias in the low bits
_FORMAT = {
    types.float32: (23, 127, 1.5 * 2.0**23 + 127),
    types.float64: (52, 1023, 1.5 * 2.0**52 + 1023),
}


@intrinsic
def exp2(typing: Any, x: Vector) -> Any:
    """2^x for x <= 0, lane by lane; 0 below the smallest normal number, -inf included; NaN of NaN.

    2^x = 2^n * 2^f with n = round(x): a polynomial in f, and n + bias for the exponent's bits.
    """
    mantissa_bits, exponent_bias, rounder = _FORMAT[x.dtype]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        kind = llvm_vector(x)
        bits = ir.VectorType(ir.IntType(64 if x.dtype == types.float64 else 32), x.lanes)
        # With x = -bias the exponent's bits come out as 0, and so does the result. The comparison
        # is false for NaN, which stays.
        smallest = constant(kind, -float(exponent_bias))
        clamped = builder.select(builder.fcmp_ordered("<", args[0], smallest), smallest, args[0])
        shifted = builder.fadd(clamped, constant(kind, rounder))
        fraction = builder.fsub(clamped, builder.fsub(shifted, constant(kind, rounder)))
        powers = _EXP2_COEFFICIENTS[x.dtype]
        value: ir.Value = constant(kind, powers[-1])
        for coefficient in reversed(powers[:-1]):
            value = fma(builder, value, fraction, constant(kind, coefficient))
        exponent = builder.shl(builder.bitcast(shifted, bits), constant(bits, mantissa_bits))
        return builder.fmul(value, builder.bitcast(exponent, kind))

    return x(x), generate


_TANH_SERIES = {types.float32: TANH_FLOAT, types.float64: TANH_DOUBLE}


@intrinsic
def _tanh_below_quarter(typing: Any, x: Vector) -> Any:
    """tanh(x) for |x| <= 1/4, by its series."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        kind = llvm_vector(x)
        square = builder.fmul(args[0], args[0])
        *lower, value = [constant(kind, c) for c in _TANH_SERIES[x.dtype]]
        for coefficient in reversed(lower):
            value = fma(builder, value, square, coefficient)
        return builder.fmul(value, args[0])

    return x(x), generate


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

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        kind = llvm_vector(wide)
        words = ir.VectorType(ir.IntType(64), x.lanes)
        value = args[0] if x == wide else builder.fpext(args[0], kind)
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

    return wide(x), generate
