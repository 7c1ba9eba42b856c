"""Products of bfloat16 matrices by the instructions that multiply and add two pairs a lane.

Where the host has AVX512-BF16, one instruction does twice the work of a float32 one:

    C[r, n] += A[r, 2k] * B[2k, n] + A[r, 2k + 1] * B[2k + 1, n]        in float32

So the depth goes in pairs, each a 32-bit word: A's word is broadcast, and a row of B is a vector of
words, one a column. K and Q^T have their pairs along the head, V and P^T along the keys:

    S^T = K Q^T         A = K as it lies in memory        B = Q^T, words transposed
    O^T += V^T P^T      A = V, two rows interleaved       B = P^T, two rows rounded and interleaved

(those of the backward in `attention_gradient_products`).

An odd depth ends with a pair whose second half is zero in both. The instruction rounds to nearest
and takes subnormal numbers for zeros.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .jit import jit
from .memory import load_masked, retyped, store_masked
from .transpose import interleaved_rounds
from .vector import (
    BFLOAT16,
    LANES,
    Pointer,
    Vector,
    broadcast,
    call_llvm,
    emitted,
    float_vector,
    fma,
    llvm_vector,
    load_vector,
    store_vector,
)

_WORDS = LANES[types.float32]  # in a vector: a pair of bfloat16 each
PAIRED = 2 * _WORDS  # bfloat16 elements in a vector
_ROW = Vector(BFLOAT16, PAIRED)
_FLOATS = llvm_vector(float_vector(types.float32))
_I64 = ir.IntType(64)


class _BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


_PAIRS = ir.VectorType(_BFloatType(), PAIRED)


def _interleaved_halves(count: int) -> ir.Constant:
    """The order 0, n, 1, n + 1, ... of two vectors' or two halves' elements."""
    order = [i // 2 + count // 2 * (i % 2) for i in range(count)]
    return ir.Constant(ir.VectorType(ir.IntType(32), count), order)


def _first_elements(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """True for the first `count` >= 0 of a vector's elements: one bit for each."""
    size = ir.Constant(_I64, PAIRED)
    inside = builder.select(builder.icmp_signed("<", count, size), count, size)
    one = ir.Constant(_I64, 1)
    bits = builder.trunc(builder.sub(builder.shl(one, inside), one), ir.IntType(PAIRED))
    return builder.bitcast(bits, ir.VectorType(ir.IntType(1), PAIRED))


@intrinsic
def as_bfloat16(typing: Any, source: Any) -> Any:
    """The same address as a pointer to bfloat16 elements."""
    return retyped(BFLOAT16, source)


@intrinsic
def load_paired(typing: Any, source: Any) -> Any:
    """PAIRED consecutive bfloat16 elements, as they are."""
    return emitted(_ROW(source), lambda builder, at: load_vector(builder, at, llvm_vector(_ROW)))


@intrinsic
def load_first_paired(typing: Any, source: Any, count: Any) -> Any:
    """The first `count` elements and zeros; what lies beyond is not read."""

    def emit(builder: ir.IRBuilder, at: ir.Value, n: ir.Value) -> ir.Value:
        return load_masked(builder, at, _first_elements(builder, n), llvm_vector(_ROW))

    return emitted(_ROW(source, types.int64), emit)


@intrinsic
def store_paired(typing: Any, target: Any, row: Any) -> Any:
    """A vector of bfloat16 elements to consecutive words."""

    def emit(builder: ir.IRBuilder, at: ir.Value, elements: ir.Value) -> None:
        store_vector(builder, builder.bitcast(elements, _FLOATS), at)

    return emitted(types.void(target, row), emit)


@intrinsic
def store_interleaved(typing: Any, target: Any, first: Any, second: Any) -> Any:
    """first[0], second[0], first[1], ...: PAIRED words."""

    def emit(builder: ir.IRBuilder, to: ir.Value, a: ir.Value, b: ir.Value) -> None:
        order = _interleaved_halves(2 * PAIRED).constant
        for half in range(2):
            index = ir.VectorType(ir.IntType(32), PAIRED)
            part = ir.Constant(index, order[half * PAIRED : (half + 1) * PAIRED])
            words = builder.shuffle_vector(a, b, part)
            at = builder.gep(to, [ir.Constant(_I64, half * _WORDS)])
            store_vector(builder, builder.bitcast(words, _FLOATS), at)

    return emitted(types.void(target, first, second), emit)


def _rounded(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Two float vectors, rounded to nearest even, one behind the other."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return builder.bitcast(call_llvm(builder, name, _PAIRS, [second, first]), llvm_vector(_ROW))


@intrinsic
def store_rounded(typing: Any, target: Any, first: Any, second: Any) -> Any:
    """Two float vectors, rounded to nearest even and interleaved, as one vector of words."""

    def emit(builder: ir.IRBuilder, at: ir.Value, a: ir.Value, b: ir.Value) -> None:
        elements = _rounded(builder, a, b)
        words = builder.shuffle_vector(elements, elements, _interleaved_halves(PAIRED))
        store_vector(builder, builder.bitcast(words, _FLOATS), at)

    return emitted(types.void(target, first, second), emit)


@intrinsic
def store_rounded_row(typing: Any, target: Any, first: Any, second: Any) -> Any:
    """Two float vectors, rounded to nearest even, as PAIRED consecutive elements."""

    def emit(builder: ir.IRBuilder, at: ir.Value, a: ir.Value, b: ir.Value) -> None:
        store_vector(builder, builder.bitcast(_rounded(builder, a, b), _FLOATS), at)

    return emitted(types.void(target, first, second), emit)


@intrinsic
def store_first_paired(typing: Any, target: Any, row: Any, count: Any) -> Any:
    """Stores the first `count` elements; what lies beyond is not touched."""

    def emit(builder: ir.IRBuilder, at: ir.Value, elements: ir.Value, n: ir.Value) -> None:
        store_masked(builder, elements, at, _first_elements(builder, n))

    return emitted(types.void(target, row, types.int64), emit)


def _transpose_function(module: ir.Module) -> ir.Function:
    """Word r of row w of the target = word w of row r, for as many rows and words as lanes."""
    name = "rowmax_transpose_words"
    if name in module.globals:
        return module.globals[name]
    half = ir.IntType(16).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [half, _I64, half, _I64]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    source, source_row, target, target_row = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    kind = llvm_vector(_ROW)
    rows = []
    for r in range(_WORDS):
        at = builder.gep(source, [builder.mul(source_row, ir.Constant(_I64, r))])
        rows.append(builder.bitcast(load_vector(builder, at, kind), _FLOATS))
    for r, row in enumerate(interleaved_rounds(builder, rows)):
        at = builder.gep(target, [builder.mul(target_row, ir.Constant(_I64, r))])
        store_vector(builder, builder.bitcast(row, kind), at)
    builder.ret_void()
    return function


@intrinsic
def transpose_words(typing: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """See `_transpose_function`; row strides are in elements."""

    def emit(builder: ir.IRBuilder, *args: ir.Value) -> None:
        builder.call(_transpose_function(builder.module), args)

    return emitted(types.void(source, types.int64, target, types.int64), emit)


def _tile_function(module: ir.Module, rows: int, vectors: int) -> ir.Function:
    """C's tile of rows x vectors as one LLVM function, made once a module.

    (depth, a, a_row, a_depth, b, b_depth, c, c_row, add, factors, scale), with the depth in pairs.
    """
    name = f"rowmax_pairs_{rows}x{vectors}"
    if name in module.globals:
        return module.globals[name]
    flag, real = ir.IntType(1), ir.FloatType()
    half, word = ir.IntType(16).as_pointer(), real.as_pointer()
    parameters = [_I64, half, _I64, _I64, word, _I64, word, _I64, flag, word, real]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    depth, a, a_row, a_depth, b, b_depth, c, c_row, add, factors, scale = function.args
    entry, loop, done, accumulate, replace = (
        function.append_basic_block(label)
        for label in ("entry", "loop", "done", "accumulate", "replace")
    )
    cells = [(r, v) for r in range(rows) for v in range(vectors)]

    builder = ir.IRBuilder(entry)
    zero = ir.Constant(_FLOATS, None)
    a_offsets = [builder.mul(a_row, ir.Constant(_I64, r)) for r in range(rows)]
    some = builder.icmp_signed(">", depth, ir.Constant(_I64, 0))
    builder.cbranch(some, loop, done)

    builder.position_at_end(loop)
    k, a_k, b_k = (builder.phi(kind) for kind in (_I64, half, word))
    sums = {cell: builder.phi(_FLOATS) for cell in cells}
    columns = [
        builder.bitcast(
            load_vector(builder, builder.gep(b_k, [ir.Constant(_I64, v * _WORDS)]), _FLOATS), _PAIRS
        )
        for v in range(vectors)
    ]
    words = ir.VectorType(ir.IntType(32), _WORDS)
    after = {}
    for r in range(rows):
        at = builder.bitcast(builder.gep(a_k, [a_offsets[r]]), words.element.as_pointer())
        pair = builder.bitcast(broadcast(builder, words, builder.load(at, align=2)), _PAIRS)
        for v in range(vectors):
            after[r, v] = call_llvm(
                builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, [sums[r, v], pair, columns[v]]
            )
    k_next = builder.add(k, ir.Constant(_I64, 1))
    a_next, b_next = builder.gep(a_k, [a_depth]), builder.gep(b_k, [b_depth])
    builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)
    for phi, first, following in (
        (k, ir.Constant(_I64, 0), k_next),
        (a_k, a, a_next),
        (b_k, b, b_next),
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(following, loop)

    builder.position_at_end(done)
    products = {cell: builder.phi(_FLOATS) for cell in cells}
    for cell in cells:
        for phi in (sums[cell], products[cell]):
            phi.add_incoming(zero, entry)
            phi.add_incoming(after[cell], loop)
    builder.cbranch(add, accumulate, replace)

    def c_at(r: int, v: int) -> ir.Value:
        offset = builder.mul(c_row, ir.Constant(_I64, r))
        return builder.gep(c, [builder.add(offset, ir.Constant(_I64, v * _WORDS))])

    builder.position_at_end(accumulate)
    shrink = [
        load_vector(builder, builder.gep(factors, [ir.Constant(_I64, v * _WORDS)]), _FLOATS)
        for v in range(vectors)
    ]
    for (r, v), product in products.items():
        before = load_vector(builder, c_at(r, v), _FLOATS)
        store_vector(builder, fma(builder, before, shrink[v], product), c_at(r, v))
    builder.ret_void()

    builder.position_at_end(replace)
    scales = broadcast(builder, _FLOATS, scale)
    for (r, v), product in products.items():
        store_vector(builder, builder.fmul(product, scales), c_at(r, v))
    builder.ret_void()
    return function


@intrinsic(prefer_literal=True)
def _tile(
    typing: Any,
    rows: Any,
    vectors: Any,
    row: Any,
    depth: Any,
    left: Any,
    right: Any,
    result: Any,
    add: Any,
    factors: Any,
    scale: Any,
) -> Any:
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(vectors, types.IntegerLiteral):
        return None

    def emit(builder: ir.IRBuilder, *args: ir.Value) -> None:
        function = _tile_function(builder.module, rows.literal_value, vectors.literal_value)
        a, a_row, a_depth = (builder.extract_value(args[4], i) for i in range(3))
        b, b_depth = (builder.extract_value(args[5], i) for i in range(2))
        c, c_row = (builder.extract_value(args[6], i) for i in range(2))
        a = builder.gep(a, [builder.mul(args[2], a_row)])
        c = builder.gep(c, [builder.mul(args[2], c_row)])
        flag = builder.trunc(args[7], ir.IntType(1))
        arguments = [args[3], a, a_row, a_depth, b, b_depth, c, c_row, flag, *args[8:]]
        builder.call(function, arguments)

    i64 = types.int64
    half, word = Pointer(BFLOAT16), Pointer(types.float32)
    sig = types.void(
        *(rows, vectors, i64, i64),
        *(types.Tuple((half, i64, i64)), types.Tuple((word, i64)), types.Tuple((word, i64))),
        *(types.boolean, word, types.float32),
    )
    return emitted(sig, emit)


@jit
def multiply_pairs(vectors, rows, depth, left, right, result, add, factors, scale):
    """C[r, :] = scale * sum_k A[r, k] B[k, :], or with `add` C[r, :] * factors + that sum, over
    `vectors` (1 to VECTORS) vectors of columns; `depth` counts pairs.

    `left` is A as (pointer to bfloat16, row stride, stride of a pair), in elements; `right` B and
    `result` C are (pointer, row stride), in words.
    """
    r = 0
    if vectors == 4:
        while r + 4 <= rows:
            _tile(4, 4, r, depth, left, right, result, add, factors, scale)
            r += 4
        while r < rows:
            _tile(1, 4, r, depth, left, right, result, add, factors, scale)
            r += 1
    elif vectors == 3:
        while r + 4 <= rows:
            _tile(4, 3, r, depth, left, right, result, add, factors, scale)
            r += 4
        while r < rows:
            _tile(1, 3, r, depth, left, right, result, add, factors, scale)
            r += 1
    elif vectors == 2:
        while r + 8 <= rows:
            _tile(8, 2, r, depth, left, right, result, add, factors, scale)
            r += 8
        while r < rows:
            _tile(1, 2, r, depth, left, right, result, add, factors, scale)
            r += 1
    else:
        while r + 8 <= rows:
            _tile(8, 1, r, depth, left, right, result, add, factors, scale)
            r += 8
        while r < rows:
            _tile(1, 1, r, depth, left, right, result, add, factors, scale)
            r += 1
