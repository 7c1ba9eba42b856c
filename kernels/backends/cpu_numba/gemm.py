"""The one product behind every matrix multiplication here, and the transposition beside it.

    C[r, :] (+)= sum over k of A[r, k] * B[k, :]        r < rows, k < depth

A's elements are broadcast, B's and C's rows are vectors: a tile of up to 4 x VECTORS registers of C
stays in registers for the whole depth, with no packing of A or B. The old C is added at the end:
a sum over many blocks is then one of short sums, whose rounding error grows with the root of the
block's depth, not of the whole length. Strides are in elements; only the columns of B and C are
contiguous. Which way a matrix is read is a matter of strides alone:

    S^T = K Q^T         A = K,  rows = keys, depth = D       B = Q^T, columns = queries
    O^T += V^T P^T      A = V,  rows = Dv,   depth = keys    B = P^T, columns = queries
    dV += P^T dO        A = P^T, rows = keys, depth = queries  B = dO, columns = Dv
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .host import vector_bits
from .jit import jit
from .vector import LANES, Pointer, broadcast, emitted, fma, llvm_element, load_vector, store_vector

# A tile of C in registers, at most: 4 x 4 or 8 x 2 of 32 registers (AVX-512, NEON), 4 x 3 or 6 x 2
# of 16 (AVX2). A tile of queries, which TILE_VECTORS are, may be several of these wide: K and V are
# read once for all of it.
_ARM = platform.machine().lower() in ("aarch64", "arm64")
if vector_bits() == 512:
    VECTORS, TILE_VECTORS, _TALL = 4, 4, 8
elif _ARM:
    VECTORS, TILE_VECTORS, _TALL = 4, 8, 8
elif vector_bits() == 256:
    VECTORS, TILE_VECTORS, _TALL = 3, 6, 6
else:
    VECTORS, TILE_VECTORS, _TALL = 2, 2, 4
# Rows of a tile that is so many vectors wide; the last rows take the next number.
_HEIGHTS = {1: (8, 4, 1), 2: tuple(dict.fromkeys((_TALL, 4, 1))), 3: (4, 1), 4: (4, 1), 8: (1,)}


def _tiles_function(module: ir.Module, dtype: types.Type, rows: int, vectors: int) -> ir.Function:
    """Tiles of C of rows x vectors, one below the other and `panels` of them side by side.

    A panel of B stays in the first cache for all tiles below each other, where all of B might not.
    (tiles, panels, depth, a, a_row, a_depth, b, b_depth, c, c_row, add) as one LLVM function, made
    once a module.
    """
    element = llvm_element(dtype)
    name = f"rowmax_tiles_{dtype}_{rows}x{vectors}"
    if name in module.globals:
        return module.globals[name]
    i64, pointer = ir.IntType(64), element.as_pointer()
    parameters = [i64, i64, i64, pointer, i64, i64, pointer, i64, pointer, i64, ir.IntType(1)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    tiles, panels, depth, a, a_row, a_depth, b, b_depth, c, c_row, add = function.args
    lanes = LANES[dtype]
    vector = ir.VectorType(element, lanes)
    cells = [(r, v) for r in range(rows) for v in range(vectors)]

    def number(value: int) -> ir.Value:
        return ir.Constant(i64, value)

    builder = ir.IRBuilder(function.append_basic_block("entry"))
    a_offsets = [builder.mul(a_row, number(r)) for r in range(rows)]
    with cgutils.for_range(builder, panels) as panel, cgutils.for_range(builder, tiles) as tile:
        first_row = builder.mul(tile.index, number(rows))
        column = builder.mul(panel.index, number(vectors * lanes))
        a_first = builder.gep(a, [builder.mul(first_row, a_row)])
        c_first = builder.gep(c, [builder.add(builder.mul(first_row, c_row), column)])
        products = _tile_products(
            *(builder, vector, depth, a_first, a_offsets, a_depth, builder.gep(b, [column])),
            *(b_depth, cells),
        )
        for r, v in cells:
            offset = builder.add(builder.mul(c_row, number(r)), number(v * lanes))
            at = builder.gep(c_first, [offset])
            before = load_vector(builder, at, vector)
            before = builder.select(add, before, ir.Constant(vector, None))
            store_vector(builder, builder.fadd(before, products[r, v]), at)
    builder.ret_void()
    return function


def _tile_products(
    builder: ir.IRBuilder,
    vector: ir.VectorType,
    depth: ir.Value,
    a: ir.Value,
    a_offsets: list[ir.Value],
    a_depth: ir.Value,
    b: ir.Value,
    b_depth: ir.Value,
    cells: list[tuple[int, int]],
) -> dict[tuple[int, int], ir.Value]:
    """sum over k of A[r, k] * B[k, v] for the cells (r, v) of a tile, in registers."""
    i64 = ir.IntType(64)
    before, zero = builder.block, ir.Constant(vector, None)
    loop = builder.append_basic_block("depth")
    done = builder.append_basic_block("depth.done")
    some = builder.icmp_signed(">", depth, ir.Constant(i64, 0))
    builder.cbranch(some, loop, done)

    builder.position_at_end(loop)
    k, a_k, b_k = builder.phi(i64), builder.phi(a.type), builder.phi(b.type)
    sums = {cell: builder.phi(vector) for cell in cells}
    columns = [
        load_vector(builder, builder.gep(b_k, [ir.Constant(i64, v * vector.count)]), vector)
        for v in range(1 + max(v for _, v in cells))
    ]
    after = {}
    for r, offset in enumerate(a_offsets):
        scalar = broadcast(builder, vector, builder.load(builder.gep(a_k, [offset])))
        for v, column in enumerate(columns):
            after[r, v] = fma(builder, scalar, column, sums[r, v])
    following = builder.add(k, ir.Constant(i64, 1))
    for phi, first, step in (
        (k, ir.Constant(i64, 0), following),
        (a_k, a, builder.gep(a_k, [a_depth])),
        (b_k, b, builder.gep(b_k, [b_depth])),
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(step, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

    builder.position_at_end(done)
    products = {}
    for cell in cells:
        products[cell] = builder.phi(vector)
        for phi in (sums[cell], products[cell]):
            phi.add_incoming(zero, before)
            phi.add_incoming(after[cell], loop)
    return products


@intrinsic(prefer_literal=True)
def _panels(
    typing: Any,
    vectors: Any,
    panels: Any,
    rows: Any,
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
    """`multiply` of so many panels of `vectors`, a literal, vectors."""
    if not isinstance(vectors, types.IntegerLiteral):
        return None
    i64, i64_type = types.int64, ir.IntType(64)

    def emit(builder: ir.IRBuilder, *args: ir.Value) -> None:
        _, panels, rows, depth, at, a_row, a_depth, b, b_depth, to, c_row, add = args
        add = builder.trunc(add, ir.IntType(1))
        for height in _HEIGHTS[vectors.literal_value]:
            tall = ir.Constant(i64_type, height)
            tiles = builder.sdiv(rows, tall)
            if height == 6:  # twice 4 rather than 6 and single rows, whose sums are too few
                rest = builder.srem(rows, tall)
                few = builder.or_(
                    builder.icmp_signed("==", rest, ir.Constant(i64_type, 2)),
                    builder.icmp_signed("==", rest, ir.Constant(i64_type, 3)),
                )
                some = builder.icmp_signed(">", tiles, ir.Constant(i64_type, 0))
                tiles = builder.sub(tiles, builder.zext(builder.and_(few, some), i64_type))
            tiles_of = _tiles_function(builder.module, a.dtype, height, vectors.literal_value)
            builder.call(
                tiles_of, [tiles, panels, depth, at, a_row, a_depth, b, b_depth, to, c_row, add]
            )
            done = builder.mul(tiles, tall)
            at = builder.gep(at, [builder.mul(done, a_row)])
            to = builder.gep(to, [builder.mul(done, c_row)])
            rows = builder.sub(rows, done)

    sig = types.void(vectors, i64, i64, i64, a, i64, i64, b, i64, c, i64, types.boolean)
    return emitted(sig, emit)


@jit
def multiply(vectors, rows, depth, left, right, result, add):
    """C[r, :] (+)= sum_k A[r, k] B[k, :] over `vectors` vectors of columns.

    `left` is A as (pointer, row stride, depth stride), `right` B as (pointer, depth stride),
    `result` C as (pointer, row stride). With `add` the product is added to C, else it replaces it.
    """
    a, a_row, a_depth = left
    b, b_depth = right
    c, c_row = result
    lanes = lanes_of(c)
    if rows == 1:  # of decoding: B is read as it lies in memory, and eight sums hide the latency
        count = vectors // 8
        if count > 0:
            _panels(8, count, rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, add)
            b, c, vectors = b + 8 * count * lanes, c + 8 * count * lanes, vectors - 8 * count
    if VECTORS == 4:
        count = vectors // 4
        if count > 0:
            _panels(4, count, rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, add)
            b, c, vectors = b + 4 * count * lanes, c + 4 * count * lanes, vectors - 4 * count
    if VECTORS >= 3:
        count = vectors // 3
        if VECTORS == 3 and vectors % 3 == 1 and count > 0:
            count -= 1  # two twos rather than a three and a one
        if count > 0:
            _panels(3, count, rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, add)
            b, c, vectors = b + 3 * count * lanes, c + 3 * count * lanes, vectors - 3 * count
    count = vectors // 2
    if count > 0:
        _panels(2, count, rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, add)
        b, c, vectors = b + 2 * count * lanes, c + 2 * count * lanes, vectors - 2 * count
    if vectors > 0:
        _panels(1, 1, rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, add)


@jit
def multiply_columns(vectors, rows, before, depth, left, right, result, add):
    """The same for A of contiguous columns.

    Each step down one takes a line of memory, and with a power of two between rows all lines fall
    into a few of the first cache's sets. With 32 KiB of it, 64 of them stay there, beside B, for
    the tiles that take the lines' other elements. It is a sum more a tile. `before` rows of B come
    before these, in whose count the 64 begin.
    """
    a, a_row, a_depth = left
    b, b_depth = right
    some = 64 - before % 64 if VECTORS == 3 else depth
    while True:
        some = min(some, depth)
        multiply(vectors, rows, some, (a, a_row, a_depth), (b, b_depth), result, add)
        a, b, depth = a + some * a_depth, b + some * b_depth, depth - some
        if depth == 0:
            return
        some, add = 64, True


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

    def emit(builder: ir.IRBuilder, _: ir.Value, *args: ir.Value) -> None:
        builder.call(_dots_function(builder.module, q.dtype, rows.literal_value), args)

    return emitted(types.void(rows, i64, q, i64, q, q, i64), emit)


@intrinsic
def lanes_of(typing: Any, like: Any) -> Any:
    """How many elements of `like`'s type (a pointer's element, or a scalar's) a vector holds."""
    lanes = LANES[like.dtype if isinstance(like, Pointer) else like]
    return emitted(types.int64(like), lambda *_: ir.Constant(ir.IntType(64), lanes))


def lanes_in(dtype: torch.dtype) -> int:
    """How many elements of a torch dtype a vector holds."""
    return vector_bits() // (8 * dtype.itemsize)
