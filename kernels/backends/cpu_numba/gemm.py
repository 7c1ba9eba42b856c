"""The one product behind every matrix multiplication here, and the transposition beside it.

    C[r, :] (+)= sum over k of A[r, k] * B[k, :]        r < rows, k < depth

A's elements are broadcast, B's and C's rows are vectors: a tile of up to 4 x VECTORS registers of C
stays in registers for the whole depth, with no packing of A or B. The old C is added at the end:
a sum over many blocks is then one of short sums, whose rounding error grows with the root of the
block's depth, not of the whole length. Strides are in elements; only
the columns of B and C are contiguous. Which way a matrix is read is a matter of strides alone:

    S^T = K Q^T         A = K,  rows = keys, depth = D       B = Q^T, columns = queries
    O^T += V^T P^T      A = V,  rows = Dv,   depth = keys    B = P^T, columns = queries
    dV += P^T dO        A = P^T, rows = keys, depth = queries  B = dO, columns = Dv
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .host import vector_bits
from .jit import jit
from .vector import LANES, Pointer, broadcast, fma, llvm_element, load_vector, store_vector

# Registers of C: 16 of AVX-512's 32, and 8 of the 16 that AVX and NEON's halves leave room for.
VECTORS = 4 if vector_bits() == 512 else 2
TALL_TILES = vector_bits() == 512  # 8 x 2 registers


def _tile_function(module: ir.Module, dtype: types.Type, rows: int, vectors: int) -> ir.Function:
    """C's tile of rows x vectors as one LLVM function, made once a module.

    (depth, a, a_row, a_depth, b, b_depth, c, c_row, add)
    """
    element = llvm_element(dtype)
    name = f"rowmax_tile_{dtype}_{rows}x{vectors}"
    if name in module.globals:
        return module.globals[name]
    i64, pointer = ir.IntType(64), element.as_pointer()
    kind = ir.FunctionType(
        ir.VoidType(), [i64, pointer, i64, i64, pointer, i64, pointer, i64, ir.IntType(1)]
    )
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    depth, a, a_row, a_depth, b, b_depth, c, c_row, add = function.args
    lanes = LANES[dtype]
    vector = ir.VectorType(element, lanes)
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))

    builder = ir.IRBuilder(entry)
    zero = ir.Constant(vector, None)

    def c_at(b: ir.IRBuilder, r: int, v: int) -> ir.Value:
        offset = b.add(b.mul(c_row, ir.Constant(i64, r)), ir.Constant(i64, v * lanes))
        return b.gep(c, [offset])

    cells = [(r, v) for r in range(rows) for v in range(vectors)]
    a_offsets = [builder.mul(a_row, ir.Constant(i64, r)) for r in range(rows)]
    some = builder.icmp_signed(">", depth, ir.Constant(i64, 0))
    builder.cbranch(some, loop, done)

    builder.position_at_end(loop)
    k = builder.phi(i64)
    a_k = builder.phi(pointer)
    b_k = builder.phi(pointer)
    sums = {cell: builder.phi(vector) for cell in cells}
    columns = [
        load_vector(builder, builder.gep(b_k, [ir.Constant(i64, v * lanes)]), vector)
        for v in range(vectors)
    ]
    after = {}
    for r in range(rows):
        scalar = broadcast(builder, vector, builder.load(builder.gep(a_k, [a_offsets[r]])))
        for v in range(vectors):
            after[r, v] = fma(builder, scalar, columns[v], sums[r, v])
    k_next = builder.add(k, ir.Constant(i64, 1))
    a_next, b_next = builder.gep(a_k, [a_depth]), builder.gep(b_k, [b_depth])
    builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)
    for phi, first, following in (
        (k, ir.Constant(i64, 0), k_next),
        (a_k, a, a_next),
        (b_k, b, b_next),
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(following, loop)
    for cell in cells:
        sums[cell].add_incoming(zero, entry)
        sums[cell].add_incoming(after[cell], loop)

    builder.position_at_end(done)
    products = {}
    for cell in cells:
        products[cell] = builder.phi(vector)
        products[cell].add_incoming(zero, entry)
        products[cell].add_incoming(after[cell], loop)
    for cell, product in products.items():
        before = load_vector(builder, c_at(builder, *cell), vector)
        total = builder.fadd(builder.select(add, before, zero), product)
        store_vector(builder, total, c_at(builder, *cell))
    builder.ret_void()
    return function


@intrinsic(prefer_literal=True)
def _tile(
    typing: Any,
    rows: Any,
    vectors: Any,
    depth: Any,
    a: Any,
    a_row: Any,
    a_depth: Any,
    b: Any,
    b_depth: Any,
    c: Any,
    c_row: Any,
    add: Any,
) -> Any:
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(vectors, types.IntegerLiteral):
        return None
    i64 = types.int64

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        function = _tile_function(
            builder.module, a.dtype, rows.literal_value, vectors.literal_value
        )
        builder.call(function, [*args[2:10], builder.trunc(args[10], ir.IntType(1))])
        return context.get_dummy_value()

    sig = types.void(rows, vectors, i64, a, i64, i64, b, i64, c, i64, types.boolean)
    return sig, generate


@jit
def multiply(vectors, rows, depth, left, right, result, add):
    """C[r, :] (+)= sum_k A[r, k] B[k, :] over `vectors` (1 to VECTORS) vectors of columns.

    `left` is A as (pointer, row stride, depth stride), `right` B as (pointer, depth stride),
    `result` C as (pointer, row stride). With `add` the product is added to C, else it replaces it.
    """
    a, a_row, a_depth = left
    b, b_depth = right
    c, c_row = result
    r = 0
    if vectors == 4:
        while r + 4 <= rows:
            _tile(4, 4, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 4
        while r < rows:
            _tile(1, 4, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 1
    elif vectors == 3:
        while r + 4 <= rows:
            _tile(4, 3, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 4
        while r < rows:
            _tile(1, 3, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 1
    elif vectors == 2:
        if TALL_TILES:
            while r + 8 <= rows:
                at, to = a + r * a_row, c + r * c_row
                _tile(8, 2, depth, at, a_row, a_depth, b, b_depth, to, c_row, add)
                r += 8
        while r + 4 <= rows:
            _tile(4, 2, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 4
        while r < rows:
            _tile(1, 2, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 1
    else:
        while r + 8 <= rows:
            _tile(8, 1, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 8
        while r < rows:
            _tile(1, 1, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row, add)
            r += 1


def _dots_function(module: ir.Module, dtype: types.Type, rows: int) -> ir.Function:
    """Lane-wise sums over c of Q[r, c] * k[c], one vector a row, with k read once.

    (columns, q, q_row, k, sums, sums_row); columns are a multiple of the lanes.
    """
    element = llvm_element(dtype)
    name = f"rowmax_dots_{dtype}_{rows}"
    if name in module.globals:
        return module.globals[name]
    i64, pointer = ir.IntType(64), element.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [i64, pointer, i64, pointer, pointer, i64])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    columns, q, q_row, k, sums, sums_row = function.args
    vector = ir.VectorType(element, LANES[dtype])
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))

    builder = ir.IRBuilder(entry)
    zero = ir.Constant(vector, None)
    q_rows = [builder.gep(q, [builder.mul(q_row, ir.Constant(i64, r))]) for r in range(rows)]
    some = builder.icmp_signed(">", columns, ir.Constant(i64, 0))
    builder.cbranch(some, loop, done)

    builder.position_at_end(loop)
    c = builder.phi(i64)
    before = [builder.phi(vector) for _ in range(rows)]
    key = load_vector(builder, builder.gep(k, [c]), vector)
    queries = [load_vector(builder, builder.gep(row, [c]), vector) for row in q_rows]
    after = [fma(builder, queries[r], key, before[r]) for r in range(rows)]
    following = builder.add(c, ir.Constant(i64, vector.count))
    builder.cbranch(builder.icmp_signed("<", following, columns), loop, done)
    c.add_incoming(ir.Constant(i64, 0), entry)
    c.add_incoming(following, loop)

    builder.position_at_end(done)
    totals = [builder.phi(vector) for _ in range(rows)]
    for r in range(rows):
        for phi in (before[r], totals[r]):
            phi.add_incoming(zero, entry)
            phi.add_incoming(after[r], loop)
        at = builder.gep(sums, [builder.mul(sums_row, ir.Constant(i64, r))])
        store_vector(builder, totals[r], at)
    builder.ret_void()
    return function


@intrinsic(prefer_literal=True)
def dots(
    typing: Any, rows: Any, columns: Any, q: Any, q_row: Any, k: Any, sums: Any, sums_row: Any
) -> Any:
    """See `_dots_function`; `rows` is a literal."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    i64 = types.int64

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        function = _dots_function(builder.module, q.dtype, rows.literal_value)
        builder.call(function, args[1:])
        return context.get_dummy_value()

    return types.void(rows, i64, q, i64, q, q, i64), generate


@intrinsic
def lanes_of(typing: Any, like: Any) -> Any:
    """How many elements of `like`'s type (a pointer's element, or a scalar's) a vector holds."""
    dtype = like.dtype if isinstance(like, Pointer) else like

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.IntType(64), LANES[dtype])

    return types.int64(like), generate


def lanes_in(dtype: torch.dtype) -> int:
    """How many elements of a torch dtype a vector holds."""
    return vector_bits() // (8 * dtype.itemsize)
