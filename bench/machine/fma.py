"""The float32 fused-multiply-add peak of this machine, from a loop that touches no memory.

The loop keeps CHAINS vectors in registers and does nothing but v = v * a + b on each. It is
written as LLVM vector instructions, so what is counted is what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import thread_time
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ...kernels.backends.cpu_numba.host import features, native_vector_bits

# Independent chains: enough to cover the latency of two units, few enough for 16 registers.
CHAINS = 12
LANES = native_vector_bits() // 32
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def _fma_chains(typingctx: Any, rounds: Any, factor: Any, addend: Any) -> Any:  # noqa: ARG001
    """Sum over chains and lanes, after `rounds` times v = v * factor + addend on each.

    Chain c, lane l starts at c + l / LANES, so that no two chains are the same computation.
    """
    signature = types.float32(types.int64, types.float32, types.float32)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rounds, factor, addend = arguments
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
        )

        def splat(value: Any) -> Any:
            first = builder.insert_element(
                ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
            )
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            return builder.shuffle_vector(first, first, zeros)

        factors, addends = splat(factor), splat(addend)
        return _chains(builder, rounds, lambda v: builder.call(fma, [v, factors, addends]))

    return signature, generate


def _chains(builder: Any, rounds: Any, step: Callable[[Any], Any]) -> Any:
    """LLVM code for the loop around `step`, and for the sum of what it leaves."""
    chains = []
    for chain in range(CHAINS):
        start = ir.Constant(_FLOATS, [chain + lane / LANES for lane in range(LANES)])
        chains.append(cgutils.alloca_once_value(builder, start))
    with cgutils.for_range(builder, rounds):
        for chain in chains:
            builder.store(step(builder.load(chain)), chain)
    total = builder.load(chains[0])
    for chain in chains[1:]:
        total = builder.fadd(total, builder.load(chain))
    result = ir.Constant(ir.FloatType(), 0.0)
    for lane in range(LANES):
        element = builder.extract_element(total, ir.Constant(ir.IntType(32), lane))
        result = builder.fadd(result, element)
    return result


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@intrinsic
def _dot_chains(typingctx: Any, rounds: Any) -> Any:  # noqa: ARG001
    """As `_fma_chains`, of v = v + a0 * b0 + a1 * b1 with all bfloat16 a and b = 1."""
    signature = types.float32(types.int64)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        halves = ir.VectorType(_BFloat(), 2 * LANES)
        dot = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_FLOATS, [_FLOATS, halves, halves]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )
        pairs = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0x3F803F80] * LANES)
        ones = builder.bitcast(pairs, halves)
        return _chains(builder, arguments[0], lambda v: builder.call(dot, [v, ones, ones]))

    return signature, generate


@numba.njit(nogil=True)
def fma_chains(rounds: int, factor: float, addend: float) -> float:
    """The loop; 2 * CHAINS * LANES operations a round."""
    return _fma_chains(rounds, np.float32(factor), np.float32(addend))


@numba.njit(nogil=True)
def dot_chains(rounds: int) -> float:
    """The loop of dot products; twice the operations of `fma_chains`."""
    return _dot_chains(rounds)


def expected(rounds: int, factor: float, addend: float) -> float:
    """The result of `fma_chains`, computed in float64."""
    values = np.arange(CHAINS)[:, None] + np.arange(LANES)[None, :] / LANES
    for _ in range(rounds):
        values = values * factor + addend
    return float(values.sum())


def flops(rounds: int) -> int:
    return 2 * CHAINS * LANES * rounds


def peak(threads: int, seconds: float = 0.05, tries: int = 5) -> float:
    """Operations a second of `threads` loops at once, the best of several tries.

    Each loop is timed by its own thread's processor time, so that other programs on the machine
    lower the measured kernels but not the limit they are held against.

    Raises RuntimeError where the loop does not do what is counted: its result must be right, and
    twice the rounds must take about twice the time.
    """
    right = expected(9, 0.75, 1.0)
    got = fma_chains(9, 0.75, 1.0)
    if abs(got - right) > 1e-4 * abs(right):
        raise RuntimeError(f"FMA peak: the loop is wrong: expected {right}, got {got}")
    return _best_rate(threads, _seconds, flops, seconds, tries)


def has_dot_products() -> bool:
    return LANES == 16 and "avx512bf16" in features()


def dot_product_peak(threads: int, seconds: float = 0.05, tries: int = 5) -> float | None:
    """As `peak`, of the dot-product instructions for bfloat16; None where the CPU has none.

    No limit of rowmax, which computes in float32, but of peers that take them.
    """
    if not has_dot_products():
        return None
    right = expected(9, 1.0, 2.0)
    got = dot_chains(9)
    if got != right:
        raise RuntimeError(f"dot-product peak: the loop is wrong: expected {right}, got {got}")
    return _best_rate(threads, _dot_seconds, lambda rounds: 2 * flops(rounds), seconds, tries)


def _best_rate(
    threads: int,
    time_of: Callable[[int], float],
    operations: Callable[[int], int],
    seconds: float,
    tries: int,
) -> float:
    rounds = 1 << 16
    while time_of(rounds) < seconds:
        rounds *= 2
    once = min(time_of(rounds) for _ in range(tries))
    twice = min(time_of(2 * rounds) for _ in range(tries))
    if not 1.5 < twice / once < 2.7:
        raise RuntimeError(
            "FMA peak: the loop's time does not follow its rounds: expected twice the time for "
            f"twice the rounds, got {twice / once:.2f} times"
        )
    with ThreadPoolExecutor(threads) as pool:
        attempts = [list(pool.map(time_of, [rounds] * threads)) for _ in range(tries)]
    return max(sum(operations(rounds) / taken for taken in attempt) for attempt in attempts)


def _seconds(rounds: int) -> float:
    """Processor time of this thread for one loop."""
    started = thread_time()
    fma_chains(rounds, 0.75, 1.0)
    return thread_time() - started


def _dot_seconds(rounds: int) -> float:
    started = thread_time()
    dot_chains(rounds)
    return thread_time() - started
