"""The float32 fused-multiply-add peak of this machine, from a loop that touches no memory.

The loop keeps CHAINS vectors in registers and does nothing but v = v * a + b on each. It is
written as LLVM vector instructions, so what is counted is what runs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import thread_time
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Independent chains: enough to cover the latency of two units, few enough for 16 registers.
CHAINS = 12


def _native_lanes() -> int:
    """Floats in the widest vector register of this CPU."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx") else 4


LANES = _native_lanes()


@intrinsic
def _fma_chains(typingctx: Any, rounds: Any, factor: Any, addend: Any) -> Any:  # noqa: ARG001
    """Sum over chains and lanes, after `rounds` times v = v * factor + addend on each.

    Chain c, lane l starts at c + l / LANES, so that no two chains are the same computation.
    """
    signature = types.float32(types.int64, types.float32, types.float32)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        scalar = ir.FloatType()
        vector = ir.VectorType(scalar, LANES)
        rounds, factor, addend = arguments
        fma = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector] * 3),
            f"llvm.fma.v{LANES}f32",
        )

        def splat(value: Any) -> Any:
            first = builder.insert_element(
                ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
            )
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            return builder.shuffle_vector(first, first, zeros)

        factors, addends = splat(factor), splat(addend)
        chains = []
        for chain in range(CHAINS):
            start = ir.Constant(vector, [chain + lane / LANES for lane in range(LANES)])
            chains.append(cgutils.alloca_once_value(builder, start))
        with cgutils.for_range(builder, rounds):
            for chain in chains:
                builder.store(builder.call(fma, [builder.load(chain), factors, addends]), chain)

        total = builder.load(chains[0])
        for chain in chains[1:]:
            total = builder.fadd(total, builder.load(chain))
        result = ir.Constant(scalar, 0.0)
        for lane in range(LANES):
            element = builder.extract_element(total, ir.Constant(ir.IntType(32), lane))
            result = builder.fadd(result, element)
        return result

    return signature, generate


@numba.njit(nogil=True)
def fma_chains(rounds: int, factor: float, addend: float) -> float:
    """The loop; 2 * CHAINS * LANES operations a round."""
    return _fma_chains(rounds, np.float32(factor), np.float32(addend))


def expected(rounds: int, factor: float, addend: float) -> float:
    """What `fma_chains` returns, computed in float64."""
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
    rounds = 1 << 16
    while _seconds(rounds) < seconds:
        rounds *= 2
    once = min(_seconds(rounds) for _ in range(tries))
    twice = min(_seconds(2 * rounds) for _ in range(tries))
    if not 1.5 < twice / once < 2.7:
        raise RuntimeError(
            "FMA peak: the loop's time does not follow its rounds: expected twice the time for "
            f"twice the rounds, got {twice / once:.2f} times"
        )
    with ThreadPoolExecutor(threads) as pool:
        attempts = [list(pool.map(_seconds, [rounds] * threads)) for _ in range(tries)]
    return max(sum(flops(rounds) / taken for taken in attempt) for attempt in attempts)


def _seconds(rounds: int) -> float:
    """Processor time of this thread for one loop."""
    started = thread_time()
    fma_chains(rounds, 0.75, 1.0)
    return thread_time() - started
