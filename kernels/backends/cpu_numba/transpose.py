"""Blocks of LANES x LANES elements turned over in registers: put somewhere, or added to it.

Rows of queries become columns of keys so, and the other way round. Offsets and row strides count
elements; half types are widened as they are read and rounded as they are written.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .gemm import lanes_of
from .host import vector_bits
from .jit import jit
from .memory import computed_type, narrow, stored_vector, widen
from .vector import LANES, broadcast, constant, emitted, llvm_element, load_vector, store_vector


def interleaved_rounds(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The transpose of as many rows as they have lanes, entirely in registers.

    First within 128 bits, where shuffles cost least: rounds of interleaving two rows. Then 128 bits
    as wholes: rounds of taking every other one of two rows.
    """
    lanes = len(rows)
    part = 128 * lanes // vector_bits()
    numbers = np.arange(2 * lanes)
    # of two rows: (row, part, half of it, lane) and (part, lane)
    halves = numbers.reshape(2, lanes // part, 2, part // 2)
    parts = numbers.reshape(-1, part)
    for _ in range(part.bit_length() - 1):
        rows = [
            _shuffled(builder, rows[r], rows[r + part // 2], halves[:, :, half].transpose(1, 2, 0))
            for first in range(0, lanes, part)
            for r in range(first, first + part // 2)
            for half in (0, 1)
        ]
    for _ in range((lanes // part).bit_length() - 1):
        rows = [
            _shuffled(builder, rows[r + c], rows[r + part + c], parts[odd::2])
            for odd in (0, 1)
            for r in range(0, lanes, 2 * part)
            for c in range(part)
        ]
    return rows


def _shuffled(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: Any) -> ir.Value:
    """The elements of two rows that the array `lanes` names, in its order."""
    indices = ir.VectorType(ir.IntType(32), lanes.size)
    return builder.shuffle_vector(a, b, ir.Constant(indices, lanes.ravel().tolist()))


def _block_function(
    module: ir.Module, source: types.Type, target: types.Type, what: str
) -> ir.Function:
    """to[c, r] of the block gets x = factor * from[r, c].

    what: "put" (to = x), "add" (to += x) or "score" (to += x, but -inf where x is, even over NaN).
    """
    name = f"rowmax_turn_{what}_{source}_{target}"
    if name in module.globals:
        return module.globals[name]
    i64, computed = ir.IntType(64), computed_type(source)
    parameters = [
        *(llvm_element(source).as_pointer(), i64, llvm_element(target).as_pointer(), i64),
        llvm_element(computed),
    ]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    from_block, from_row, to_block, to_row, factor = function.args
    lanes = LANES[computed]
    vector = ir.VectorType(llvm_element(computed), lanes)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    scale = broadcast(builder, vector, factor)

    def row(base: ir.Value, stride: ir.Value, r: int) -> ir.Value:
        return builder.gep(base, [builder.mul(stride, ir.Constant(i64, r))])

    rows = []
    for r in range(lanes):
        stored = load_vector(builder, row(from_block, from_row, r), stored_vector(source))
        rows.append(builder.fmul(widen(builder, stored, source), scale))
    for r, turned in enumerate(interleaved_rounds(builder, rows)):
        at = row(to_block, to_row, r)
        value = turned
        if what != "put":
            old = widen(builder, load_vector(builder, at, stored_vector(target)), target)
            value = builder.fadd(old, turned)
        if what == "score":
            nothing = constant(vector, -inf)
            value = builder.select(builder.fcmp_ordered("==", turned, nothing), nothing, value)
        store_vector(builder, narrow(builder, value, target), at)
    builder.ret_void()
    return function


def _turning(what: str) -> Any:
    """The intrinsic that calls this block function."""

    @intrinsic
    def turn(
        typing: Any, source: Any, source_row: Any, target: Any, target_row: Any, factor: Any
    ) -> Any:
        def emit(builder: ir.IRBuilder, *args: ir.Value) -> None:
            builder.call(_block_function(builder.module, source.dtype, target.dtype, what), args)

        i64 = types.int64
        return emitted(types.void(source, i64, target, i64, computed_type(source.dtype)), emit)

    return turn


transpose_block = _turning("put")  # target[c, r] = factor * source[r, c]
add_transposed = _turning("add")  # target[c, r] += factor * source[r, c]
# the same; -inf wherever the source is, even over NaN
add_to_scores = _turning("score")


@jit
def transpose(source, source_row, target, target_row, rows, columns, factor):
    """target[c, r] = factor * source[r, c] for r < rows, c < columns; rows start at multiples of
    their row strides."""
    lanes = lanes_of(source)
    full_rows = rows - rows % lanes
    full_columns = columns - columns % lanes
    for r in range(0, full_rows, lanes):
        for c in range(0, full_columns, lanes):
            transpose_block(
                source + (r * source_row + c),
                source_row,
                target + (c * target_row + r),
                target_row,
                factor,
            )
    for r in range(rows):
        for c in range(full_columns if r < full_rows else 0, columns):
            target[c * target_row + r] = source[r * source_row + c] * factor
