"""What Numba compiles for: which instructions, and how wide the vectors are."""

from __future__ import annotations

import functools
import os
import platform

from numba.core.registry import cpu_target

WIDTH_VARIABLE = "ROWMAX_VECTOR_BITS"
WIDTHS = (512, 256, 128)
DOTS_VARIABLE = "ROWMAX_BFLOAT16_DOTS"


@functools.cache
def features() -> frozenset[str]:
    """LLVM's names of the instructions that Numba compiles for: the host's, or what its variables
    (NUMBA_CPU_FEATURES, say) make of them. LLVM ends a process that asks for others by name."""
    _, _, found = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name.removeprefix("+") for name in found.split(",") if name.startswith("+"))


def lacking() -> str:
    """Instructions without which LLVM calls functions of C, where kernels have none; or ""."""
    needed = ("fma", "f16c") if platform.machine() in ("x86_64", "AMD64") else ()
    return ", ".join(name for name in needed if name not in features())


@functools.cache
def native_vector_bits() -> int:
    """The widest float vectors there: 512 (AVX-512), 256 (AVX), 128 (SSE, NEON)."""
    if "avx512f" in features():
        return 512
    return 256 if "avx" in features() else 128


@functools.cache
def vector_bits() -> int:
    """The width the kernels are compiled for: the host's, or less if ROWMAX_VECTOR_BITS says so."""
    asked = os.environ.get(WIDTH_VARIABLE)
    if asked is None:
        return native_vector_bits()
    if asked not in {str(width) for width in WIDTHS} or int(asked) > native_vector_bits():
        raise ValueError(
            f"{WIDTH_VARIABLE}: expected one of {WIDTHS}, at most {native_vector_bits()} here, "
            f"got {asked!r}"
        )
    return int(asked)


@functools.cache
def bfloat16_dots() -> bool:
    """Whether bfloat16 is multiplied as it is, by AVX512-BF16: not if Numba may not use it, if
    vectors are narrower, or if ROWMAX_BFLOAT16_DOTS is 0."""
    asked = os.environ.get(DOTS_VARIABLE, "1")
    if asked not in ("0", "1"):
        raise ValueError(f"{DOTS_VARIABLE}: expected 0 or 1, got {asked!r}")
    return asked == "1" and vector_bits() == 512 and "avx512bf16" in features()
