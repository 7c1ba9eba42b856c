"""The config of an attention kernel: tile sizes, warps and pipeline stages.

The configs are data: `configs.json` holds, for each (architecture, kernel, bits of the type,
head size, features), the config that was found best, or else the largest that compiles without
spilling registers. An architecture or a size that the table lacks takes the entry of the nearest
architecture that serves it, of the nearest size above it and of all features, or `SAFE`, which fits
everywhere.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

import torch
import triton

from ...ops.problem import AttentionProblem
from . import interpreting


class Config(NamedTuple):
    """BLOCK_M queries and BLOCK_N keys a tile, warps a program, stages of the pipeline.

    In decoding BLOCK_M is the maximal rows of a tile: all queries of all heads of a group.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """The key of the table: a config is chosen by it."""

    arch: str  # "sm_90"; AMD: "gfx942"
    kernel: str
    bits: int  # of the factors of a product: q's type, or TF32
    dim: int  # the larger one of D and Dv, rounded up to a power of two
    # "base"; "dropout"; "score_mod": scores are masked one by one or changed; "score_mod_dropout"
    features: str


# The table may have an entry for these alone: a config that fits with them fits with fewer.
ALL_FEATURES = "score_mod_dropout"
# 8 of the exponent, 10 of the fraction and the sign: all that TF32 takes of a float32.
TF32_BITS = 19
# Small tiles: several of them even at the lengths of the tests.
INTERPRETED = Config(32, 32, 4, 1)
# GPUs with 163 KiB of shared memory a program and more; and those with 99 KiB, which take the
# configs made for SMALL.
LARGE_SHARED_MEMORY = ("sm_80", "sm_87", "sm_90", "sm_100", "sm_103", "sm_110")
SMALL = "sm_89"
SMALL_SHARED_MEMORY = ("sm_86", SMALL, "sm_120", "sm_121")
SAFE = Config(16, 16, 4, 1)
_SAFE_NARROW = Config(32, 32, 4, 1)  # half types and TF32, heads of 128 at most


def candidates(kernel: str, problem: AttentionProblem) -> tuple[Config, ...]:
    """The configs of `kernel` for this problem on its device, the first to try first."""
    if interpreting():
        return (INTERPRETED,)
    return ranked(key_of(kernel, problem, architecture(problem.query.device)))


def launch_config(
    kernel: Any, extent: tuple[int, int, int], config: Config
) -> tuple[int, dict[str, int]]:
    """The number of programs, and the arguments of `kernel` that `config` decides."""
    rows, columns, planes = extent
    block_m = config.block_m
    if kernel.fn.__name__ == "decode":  # often a single row: its tile is as small as a product's
        block_m = min(block_m, max(16, triton.next_power_of_2(rows)))
    sizes = {"BLOCK_M": block_m, "BLOCK_N": config.block_n}
    programs = triton.cdiv(rows, block_m) * triton.cdiv(columns, config.block_n) * planes
    return programs, {
        **{name: size for name, size in sizes.items() if name in kernel.arg_names},
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def key_of(kernel: str, problem: AttentionProblem, arch: str) -> Key:
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    # empty rows are sorted out of tiles in registers, which takes as many registers as a mask
    score_mod = (
        problem.alibi_slopes is not None
        or problem.softcap is not None
        or may_have_empty_rows(problem)
    )
    features = ("score_mod" if score_mod else "", "dropout" if problem.dropout_p > 0.0 else "")
    in_tf32 = precision(problem.query.dtype) == "tf32"
    return Key(
        arch,
        kernel,
        TF32_BITS if in_tf32 else 8 * problem.query.element_size(),
        max(16, triton.next_power_of_2(max(head_dim, value_dim))),
        "_".join(filter(None, features)) or "base",
    )


def precision(dtype: torch.dtype) -> str:
    """How products of this type are computed: torch's setting for float32, else "ieee"."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def may_have_empty_rows(problem: AttentionProblem) -> bool:
    """Whether some row that a kernel reads may attend nothing."""
    mask = problem.mask
    _, _, query_len, key_len = problem.shape
    if mask.dense is not None or mask.query_documents is not None or problem.bias is not None:
        return True
    if mask.band is not None or (mask.band_upper is not None and mask.band_upper < 0):
        return True
    lower = mask.band_lower
    if lower is None:
        return False
    cut = mask.key_lengths is not None or mask.prefix_lengths is not None
    return cut or query_len + lower > key_len


@functools.cache
def architecture(device: torch.device) -> str:
    """The device's compute capability as "sm_90", or AMD's name, "gfx942"."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def lookup(key: Key) -> Config:
    """The table's entry for `key`, or the nearest one that is safe for it."""
    return ranked(key)[0]


@functools.cache
def ranked(key: Key) -> tuple[Config, ...]:
    """The entries of the table that may serve `key`, the nearest first, then the safe configs."""
    entries = table()
    near = (
        entries.get(key._replace(arch=arch, dim=dim, features=features))
        for arch in serving(key.arch)
        for dim in (key.dim, 2 * key.dim, 4 * key.dim)
        for features in (key.features, ALL_FEATURES)
    )
    wide = key.bits > TF32_BITS or key.dim >= 256
    safe = (SAFE,) if wide else (_SAFE_NARROW, SAFE)
    return tuple(dict.fromkeys((*filter(None, near), *safe)))


def serving(arch: str) -> list[str]:
    """The architectures whose configs this one may take, the nearest first.

    An unknown one is served as the nearest lower known one.
    """
    if not arch.startswith("sm_") or _number(arch) < 80:
        return [arch]
    known = max(
        (
            name
            for name in (*LARGE_SHARED_MEMORY, *SMALL_SHARED_MEMORY)
            if _number(name) <= _number(arch)
        ),
        key=_number,
    )
    if known in SMALL_SHARED_MEMORY:
        return [arch, SMALL]
    return [
        arch,
        *(name for name in reversed(LARGE_SHARED_MEMORY) if _number(name) <= _number(known)),
    ]


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


@functools.cache
def table() -> dict[Key, Config]:
    text = resources.files(__package__).joinpath("configs.json").read_text("utf-8")
    return {
        Key(arch, kernel, int(bits), int(dim), features): Config(*config)
        for name, config in json.loads(text)["configs"].items()
        for arch, kernel, bits, dim, features in (name.split("/"),)
    }
