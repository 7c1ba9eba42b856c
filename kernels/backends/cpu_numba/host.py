"""How wide this host's vectors are, and how many threads may work."""

from __future__ import annotations

import functools
import os

import llvmlite.binding as llvm

WIDTH_VARIABLE = "ROWMAX_VECTOR_BITS"
WIDTHS = (512, 256, 128)
DOTS_VARIABLE = "ROWMAX_BFLOAT16_DOTS"


@functools.cache
def native_vector_bits() -> int:
    """The widest float vectors of this host: 512 (AVX-512), 256 (AVX), 128 (SSE, NEON)."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 512
    return 256 if features.get("avx") else 128


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
    """Whether bfloat16 is multiplied as it is, by AVX512-BF16: not if the host lacks it, if vectors
    are narrower, if Numba is told to compile for another host, or if ROWMAX_BFLOAT16_DOTS is 0."""
    asked = os.environ.get(DOTS_VARIABLE, "1")
    if asked not in ("0", "1"):
        raise ValueError(f"{DOTS_VARIABLE}: expected 0 or 1, got {asked!r}")
    if asked == "0" or vector_bits() != 512:
        return False
    from numba.core.registry import cpu_target

    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return "+avx512bf16" in features.split(",")
