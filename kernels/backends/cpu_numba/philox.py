"""The random words of dropout, of whole vectors of counters: `reference/philox.py`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..cpu_common.constants import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL
from .host import vector_bits
from .vector import Vector, broadcast, constant, emitted, integer_vector, llvm_vector, part_of


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

    def emit(builder: ir.IRBuilder, values: ir.Value, least: ir.Value) -> ir.Value:
        limit = builder.trunc(least, ir.IntType(32))
        return builder.icmp_unsigned(">=", values, broadcast(builder, llvm_vector(words), limit))

    return emitted(from_words(words, types.int64), emit)


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
        for first_lane in range(0, vector.lanes, counters):
            steps = [ir.Constant(i64, first_lane + lane) for lane in range(counters)]
            group0 = _spread_word(builder, wide, args[0])
            rest = (_spread_word(builder, wide, argument) for argument in args[1:4])
            counter = (builder.add(group0, ir.Constant(wide, steps)), *rest)
            c0, c1, c2, c3 = _philox_rounds(builder, counter, args[4])
            first, second = (
                builder.or_(builder.and_(low, low_half), builder.shl(high, shift))
                for low, high in ((c0, c1), (c2, c3))
            )
            pairs = interleave(first, second, counters)
            for start in (0, counters):
                part = part_of(builder, pairs, start, counters)
                columns.append(builder.bitcast(part, words))
        if vector.lanes < words.count:
            columns = [
                part_of(builder, pair, at, vector.lanes)
                for pair in columns
                for at in range(0, words.count, vector.lanes)
            ]
        return context.make_tuple(builder, sig.return_type, columns)

    i64 = types.int64
    result = types.UniTuple(vector, 4)
    return result(i64, i64, i64, i64, i64, like), generate
