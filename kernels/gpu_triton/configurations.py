"""Which form of an attention kernel runs: tile sizes, warps and pipeline stages.

The forms are data: `configurations.json` holds, for each (architecture, kernel, bits of the type,
head size, features), the form that was found best, or else the largest that compiles without
spilling registers. An architecture or a size that the table lacks takes the entry of the nearest
architecture below it, of the nearest size above it and of all features, or `SAFE`, which fits
everywhere.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import NamedTuple

import torch
import triton

from ..problem import AttentionProblem
from . import interpreting


class Configuration(NamedTuple):
    """BLOCK_M queries and BLOCK_N keys a tile, warps a program, stages of the pipeline.

    Of decoding BLOCK_M is the most rows of a tile, those of all queries and heads of a group.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """What a form is chosen by."""

    arch: str  # "sm_90"; AMD: "gfx942"
    kernel: str
    bits: int  # of q's type
    dim: int  # the larger one of D and Dv, rounded up to a power of two
    features: (
        str  # "plain", "dropout", "rich" (scores changed or masked one by one), "rich_dropout"
    )


# The features that the table may have alone for a size: a form that bears them bears fewer.
EVERYTHING = "rich_dropout"
# Small tiles: several of them even at the lengths of the tests.
INTERPRETED = Configuration(32, 32, 4, 1)
SAFE = Configuration(16, 16, 4, 1)
_SAFE_HALF = Configuration(32, 32, 4, 1)


def configuration(kernel: str, problem: AttentionProblem) -> Configuration:
    """The form of `kernel` for this problem on its device."""
    if interpreting():
        return INTERPRETED
    return lookup(key_of(kernel, problem, architecture(problem.query.device)))


def key_of(kernel: str, problem: AttentionProblem, arch: str) -> Key:
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    rich = (
        problem.mask.dense is not None
        or problem.mask.query_documents is not None
        or problem.bias is not None
        or problem.alibi_slopes is not None
        or problem.softcap is not None
    )
    features = ("rich" if rich else "", "dropout" if problem.dropout_p > 0.0 else "")
    return Key(
        arch,
        kernel,
        8 * problem.query.element_size(),
        max(16, triton.next_power_of_2(max(head_dim, value_dim))),
        "_".join(filter(None, features)) or "plain",
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """The device's compute capability as "sm_90", or AMD's name, "gfx942"."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


@functools.cache
def lookup(key: Key) -> Configuration:
    """The table's entry for `key`, or the nearest one that is safe for it."""
    entries = table()
    archs = sorted({entry.arch for entry in entries if entry.arch.startswith("sm_")}, key=_number)
    below = [
        arch for arch in archs if key.arch.startswith("sm_") and _number(arch) <= _number(key.arch)
    ]
    for arch in (key.arch, *reversed(below)):
        for dim in (key.dim, *(2 * key.dim, 4 * key.dim)):
            for features in (key.features, EVERYTHING):
                found = entries.get(key._replace(arch=arch, dim=dim, features=features))
                if found is not None:
                    return found
    return SAFE if key.bits > 16 else _SAFE_HALF


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


@functools.cache
def table() -> dict[Key, Configuration]:
    text = resources.files(__package__).joinpath("configurations.json").read_text("utf-8")
    return {
        Key(arch, kernel, int(bits), int(dim), features): Configuration(*form)
        for name, form in json.loads(text)["forms"].items()
        for arch, kernel, bits, dim, features in (name.split("/"),)
    }
