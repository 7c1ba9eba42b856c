"""Functions of single vectors: the exponential of the softmax and the random words of dropout."""

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
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    TANH_DOUBLE,
    TANH_FLOAT,
)
from .host import vector_bits
from .jit import jit
from .vector import (
    Vector,
    broadcast,
    constant,
    fma,
    integer_vector,
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

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        clamped = _at_least(builder, x, args[0], -float(_FORMAT[x.dtype][1]))
        return _exp2_of(builder, x, clamped, None)

    return x(x), generate


@intrinsic
def exp2_difference(typing: Any, a: Vector, b: Vector, rest: Vector) -> Any:
    """2^(a - b - rest) for a <= b and a rest within [-1, 1], with what rounding takes from a - b
    where |a| <= |b| (Dekker 1971); as `exp2` else."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        minuend, subtrahend, less = args
        difference = builder.fsub(minuend, subtrahend)
        clamped = _at_least(builder, a, difference, -float(_FORMAT[a.dtype][1]))
        low = builder.fsub(minuend, builder.fadd(clamped, subtrahend))
        # Below -1 only where the difference is clamped; NaN where it is NaN.
        low = builder.fsub(_at_least(builder, a, low, -1.0), less)
        return _exp2_of(builder, a, clamped, low)

    return a(a, b, rest), generate


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


def _philox_rounds(
    builder: ir.IRBuilder, counter: tuple[ir.Value, ...], seed: ir.Value
) -> tuple[ir.Value, ...]:
    """Philox4x32-10 of four counter words in 64-bit lanes; the words come in the low halves.

    The machine's 32 x 32 -> 64 bit product reads the low halves and ignores the high ones, so in
    64-bit lanes a round is a product, a shift and an exclusive or, twice, with no conversion.
    """
    c0, c1, c2, c3 = counter
    wide = c0.type
    low_half, shift = constant(wide, 0xFFFFFFFF), constant(wide, 32)
    i64, word = ir.IntType(64), ir.IntType(32)
    k0 = builder.trunc(seed, word)
    k1 = builder.trunc(builder.lshr(seed, ir.Constant(i64, 32)), word)

    def product(value: ir.Value, factor: int) -> ir.Value:
        return builder.mul(builder.and_(value, low_half), constant(wide, factor))

    def spread(key: ir.Value) -> ir.Value:
        return broadcast(builder, wide, builder.zext(key, i64))

    for _ in range(PHILOX_ROUNDS):
        product0 = product(c0, PHILOX_MULTIPLIERS[0])
        product1 = product(c2, PHILOX_MULTIPLIERS[1])
        c0 = builder.xor(builder.xor(builder.lshr(product1, shift), c1), spread(k0))
        c2 = builder.xor(builder.xor(builder.lshr(product0, shift), c3), spread(k1))
        c1, c3 = product1, product0
        k0 = builder.add(k0, ir.Constant(word, PHILOX_WEYL[0]))
        k1 = builder.add(k1, ir.Constant(word, PHILOX_WEYL[1]))
    return c0, c1, c2, c3


def _spread_word(builder: ir.IRBuilder, wide: ir.VectorType, scalar: ir.Value) -> ir.Value:
    """The low 32 bits of an int64 in every 64-bit lane."""
    word = builder.trunc(scalar, ir.IntType(32))
    return broadcast(builder, wide, builder.zext(word, ir.IntType(64)))


@intrinsic
def philox(
    typing: Any,
    group: types.Type,
    query: Vector,
    head: types.Type,
    batch: types.Type,
    seed: types.Type,
    like: types.Type,
) -> Any:
    """Philox4x32-10 of the counter (group, query, head, batch) and the 64-bit key `seed`.

    `query` holds a counter word a lane, the others are scalars. Returns four vectors of words.
    """
    vector = integer_vector(like)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        kind = llvm_vector(vector)
        wide = ir.VectorType(ir.IntType(64), vector.lanes)
        counter = (
            _spread_word(builder, wide, args[0]),
            builder.zext(args[1], wide),
            _spread_word(builder, wide, args[2]),
            _spread_word(builder, wide, args[3]),
        )
        words = _philox_rounds(builder, counter, args[4])
        return context.make_tuple(
            builder, sig.return_type, [builder.trunc(word, kind) for word in words]
        )

    i64 = types.int64
    result = types.UniTuple(vector, 4)
    return result(i64, vector, i64, i64, i64, like), generate


@intrinsic
def at_least(typing: Any, words: Vector, threshold: types.Type) -> Any:
    """words >= threshold as unsigned 32-bit numbers: which elements dropout keeps."""
    from_words = Vector(types.boolean, words.lanes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        limit = builder.trunc(args[1], ir.IntType(32))
        return builder.icmp_unsigned(">=", args[0], broadcast(builder, llvm_vector(words), limit))

    return from_words(words, types.int64), generate


@intrinsic
def philox_columns(
    typing: Any,
    group: types.Type,
    word1: types.Type,
    word2: types.Type,
    word3: types.Type,
    seed: types.Type,
    like: types.Type,
) -> Any:
    """The words of consecutive counters (group + n, word1, word2, word3), in memory's order.

    Lane l of vector v, of the four returned, is word i % 4 of counter group + i // 4 with
    i = v * lanes + l: four neighbouring columns share a counter, as in `reference/philox.py`.
    """
    vector = integer_vector(like)
    counters = vector_bits() // 64
    wide = ir.VectorType(ir.IntType(64), counters)
    words = ir.VectorType(ir.IntType(32), 2 * counters)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        low_half = constant(wide, 0xFFFFFFFF)
        shift = constant(wide, 32)
        i64, word = ir.IntType(64), ir.IntType(32)

        def interleave(even: ir.Value, odd: ir.Value, size: int) -> ir.Value:
            """even[0], odd[0], even[1], odd[1], ..."""
            order = [lane + half * size for lane in range(size) for half in range(2)]
            index = ir.Constant(ir.VectorType(word, 2 * size), order)
            return builder.shuffle_vector(even, odd, index)

        columns = []
        for start in range(0, vector.lanes, counters):
            steps = [ir.Constant(i64, start + lane) for lane in range(counters)]
            group0 = _spread_word(builder, wide, args[0])
            rest = (_spread_word(builder, wide, argument) for argument in args[1:4])
            counter = (builder.add(group0, ir.Constant(wide, steps)), *rest)
            c0, c1, c2, c3 = _philox_rounds(builder, counter, args[4])
            first, second = (
                builder.or_(builder.and_(low, low_half), builder.shl(high, shift))
                for low, high in ((c0, c1), (c2, c3))
            )
            pairs = interleave(first, second, counters)
            for half in range(2):
                index = list(range(half * counters, (half + 1) * counters))
                index_kind = ir.VectorType(word, counters)
                part = builder.shuffle_vector(pairs, pairs, ir.Constant(index_kind, index))
                columns.append(builder.bitcast(part, words))
        if vector.lanes < words.count:
            columns = [
                builder.shuffle_vector(
                    pair,
                    pair,
                    ir.Constant(
                        ir.VectorType(word, vector.lanes), list(range(at, at + vector.lanes))
                    ),
                )
                for pair in columns
                for at in range(0, words.count, vector.lanes)
            ]
        return context.make_tuple(builder, sig.return_type, columns)

    i64 = types.int64
    result = types.UniTuple(vector, 4)
    return result(i64, i64, i64, i64, i64, like), generate
