"""Every config in the table of Triton attention kernels, compiled for its GPU without one.

Run with TRITON_INTERPRET=0: what is interpreted can't be compiled in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rowmax.bench.tuning import ahead_of_time, tune
from rowmax.kernels import ALiBi, Causal, Dense, Documents, KeyLengths
from rowmax.kernels.api.attention import attention_problem
from rowmax.kernels.backends.gpu_triton.attention_launch import attention, attention_backward
from rowmax.kernels.backends.gpu_triton.configs import (
    TF32_BITS,
    Config,
    Key,
    key_of,
    launch_config,
    lookup,
    table,
)
from rowmax.kernels.ops.problem import AttentionProblem, BackwardInputs

ARCHS = sorted({key.arch for key in table()})
# Forms that a GPU ran faster than any that spills nothing: an H200 took 1.57 ms with this one, and
# 1.69 ms with (32, 64, 4, 2).
MEASURED = {Key("sm_90", "backward_dkdv", 16, 128, "base"): Config(64, 128, 8, 3)}


def suits(compiled: ahead_of_time.Compiled, key: Key) -> bool:
    """Whether it fits the GPU; of a config that was measured, whatever it spills."""
    if MEASURED.get(key) == compiled.config:
        compiled = replace(compiled, spilled=0)
    return compiled.fits(key.arch)


@pytest.mark.parametrize("key", sorted(table()), ids=lambda key: "/".join(map(str, key)))
def test_a_config_fits_its_gpu(key: Key) -> None:
    """Its loop spills no register, shared memory suffices, Hopper's matrix instructions overlap."""
    config = table()[key]
    compiled = ahead_of_time.compile_config(key, config)
    assert suits(compiled, key), compiled
    base = key.arch == "sm_90" and key.bits == 16 and key.features == "base"
    if base and key.kernel in tune.CHAINED and not tune.repeats(key, config):
        # each score once, and a few for the sums of a row
        assert compiled.loop is not None
        assert compiled.loop.exponentials < 1.2 * compiled.scores + 2, (compiled, compiled.loop)
    rows = config.block_n if key.kernel == "backward_dkdv" else config.block_m  # of each product
    if key.arch == "sm_90" and key.bits in (16, TF32_BITS) and rows >= 64:
        assert compiled.wgmma > 0


def test_scores_that_are_computed_twice_are_seen() -> None:
    key = Key("sm_90", "backward_dkdv", 16, 64, "base")
    compiled = ahead_of_time.compile_config(key, Config(64, 64, 8, 2))
    assert compiled.loop is not None
    assert compiled.loop.exponentials >= 2 * compiled.scores


def test_no_config_computes_scores_twice() -> None:
    """For sm_90; the registers of others, and larger heads, leave some no choice."""
    for key, config in table().items():
        if key.arch == "sm_90" and key.bits == 16 and key.dim <= 128:
            assert not tune.repeats(key, config), (key, config)


@pytest.mark.parametrize("kernel", tune.CHAINED)
@pytest.mark.parametrize("dim", [40, 72, 88, 192])
def test_heads_of_other_sizes(dim: int, kernel: str) -> None:
    """They are read 16 bytes at a time, by asynchronous copies, and take no safe config."""
    ahead_of_time.pretend("sm_90")
    problem = ahead_of_time.problem_of(Key("sm_90", kernel, 16, dim, "base"))
    key = key_of(kernel, problem, "sm_90")
    config = lookup(key)
    assert config.block_m * config.block_n >= 2048
    compiled = ahead_of_time.compile_kernel(kernel, problem, config)
    assert suits(compiled, key), compiled
    assert compiled.copies > 0


def test_the_table_is_complete() -> None:
    missing = set(tune.keys(tune.ARCHS)) - set(table())
    assert not missing


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dim", [72, 88, 192, 256])
@pytest.mark.parametrize("features", tune.FEATURES)
def test_large_heads_have_configs_of_their_own(features: str, dim: int, arch: str) -> None:
    """Of half types, none is one of the safe configs, which are for want of any other."""
    for kernel in tune.KERNELS:
        problem = ahead_of_time.problem_of(Key(arch, kernel, 16, dim, features))
        key = key_of(kernel, problem, arch)
        assert lookup(key) not in (Config(32, 32, 4, 1), Config(16, 16, 4, 1)), key


@pytest.mark.parametrize("arch", ARCHS)
def test_a_config_that_spills_is_seen(arch: str) -> None:
    key = Key(arch, "backward_dkdv", 16, 256, "base")
    compiled = ahead_of_time.compile_config(key, Config(64, 64, 4, 1))
    assert not compiled.fits(arch)


def test_what_the_table_lacks() -> None:
    """A smaller head takes the next larger one's config, a newer GPU an older one's."""
    key = Key("sm_90", "forward", 16, 128, "base")
    assert lookup(key._replace(dim=16)) == table()[key._replace(dim=64)]
    assert lookup(key._replace(dim=1024)) == Config(16, 16, 4, 1)
    assert lookup(key._replace(arch="sm_87")) == lookup(key._replace(arch="sm_80"))
    assert lookup(key._replace(arch="sm_103")) == lookup(key._replace(arch="sm_100"))
    assert lookup(key._replace(arch="sm_75")) == Config(32, 32, 4, 1)
    assert lookup(key._replace(arch="gfx90a", bits=64)) == Config(16, 16, 4, 1)
    single = key._replace(bits=32, dim=64, features="dropout")
    assert lookup(single) == table()[single._replace(features="score_mod_dropout")]


@pytest.mark.parametrize("arch", ["sm_86", "sm_120", "sm_999"])
def test_gpus_that_are_not_known_take_configs_for_little_shared_memory(arch: str) -> None:
    for key in tune.keys([arch]):
        serving = [key._replace(arch=tune.SMALL, features=name) for name in tune.FEATURES]
        taken = {table()[one] for one in serving if one in table()}
        if key.dim == 256 or key.bits > 16:
            taken = {Config(32, 32, 4, 1), Config(16, 16, 4, 1)}
        assert lookup(key) in taken


@pytest.mark.parametrize("bits,dim", [(16, 256), (TF32_BITS, 256), (32, 256), (64, 64)])
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_safe_configs_are_safe(kernel: str, bits: int, dim: int) -> None:
    """They run: large heads, everything at once, on a GPU that nothing was tuned for.

    At these sizes some spill, backward_dbias most; there is no smaller tile.
    """
    key = Key("sm_120", kernel, bits, dim, "score_mod_dropout")
    compiled = ahead_of_time.compile_config(key, lookup(key))
    assert compiled.shared <= tune.SHARED_LIMIT[key.arch], compiled


# --- problems that the table does not list --------------------------------------------------------


def square(mask: Any = None, bias: Any = None, key_heads: int = 4, **options: Any) -> Any:
    def make(dim: int) -> AttentionProblem:
        q = torch.empty(2, 4, 512, dim, dtype=torch.bfloat16)
        k = torch.empty(2, key_heads, 512, dim, dtype=q.dtype)
        settings: dict[str, Any] = {"softcap": None, "dropout_p": 0.0, "seed": 7, "sinks": None}
        settings |= options
        return attention_problem(q, k, k, mask, bias, None, draw_seed=True, **settings)

    return make


def packed(dim: int) -> AttentionProblem:
    return ahead_of_time.pack(square(Causal())(dim))


def decoding(dim: int) -> AttentionProblem:
    q = torch.empty(2, 8, 1, dim, dtype=torch.bfloat16)
    k = torch.empty(2, 2, 2048, dim, dtype=q.dtype)
    mask, bias = KeyLengths(torch.tensor([2000, 7])), ALiBi(torch.rand(8), "lower_right")
    return attention_problem(q, k, k, mask, bias, None, None, 0.0, None, None, draw_seed=True)


def packed_decoding(dim: int) -> AttentionProblem:
    problem = decoding(dim)
    key = problem.key[:1]
    return problem._replace(
        query=torch.empty(1, 8, 3, dim, dtype=key.dtype),
        key=key,
        value=key,
        query_starts=torch.tensor([0, 1, 3]),
        key_starts=torch.tensor([0, 2000, 2048]),
        longest_query=2,
        longest_key=2000,
    )


# The table's keys do not tell these apart (grouped heads, bands of each batch element, packing).
IDS = torch.arange(512).expand(2, -1) // 100
PROBLEMS: dict[str, Callable[[int], AttentionProblem]] = {
    "full": square(),
    "grouped_heads": square(Causal(), key_heads=1),
    "band_per_batch": square(Causal(torch.tensor([0, 100]))),
    "prefix": square(Causal(prefix=torch.tensor([3, 100]))),
    "alibi": square(Causal(), ALiBi(torch.rand(4))),
    "softcap": square(Causal(), softcap=30.0),
    "documents": square(Documents(IDS)),
    "dense": square(Dense(torch.ones(2, 4, 512, 512, dtype=torch.bool))),
    "bias": square(bias=torch.empty(1, 4, 512, 512, dtype=torch.bfloat16)),
    "packed": packed,
    "decoding": decoding,
    "packed_decoding": packed_decoding,
}


@pytest.mark.parametrize("arch,dim", [("sm_90", 64), ("sm_90", 128), ("sm_80", 128)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_that_the_table_does_not_list(name: str, dim: int, arch: str) -> None:
    """All kernels of one feature at a time, forward and backward, in the config that they take."""
    ahead_of_time.pretend(arch)
    problem = PROBLEMS[name](dim)
    launched: dict[Key, ahead_of_time.Compiled] = {}

    def launch(
        kernel: Any,
        problem: AttentionProblem,
        extent: tuple[int, int, int],
        arguments: dict[str, Any],
    ) -> None:
        key = key_of(kernel.fn.__name__, problem, arch)
        config = lookup(key)
        _, options = launch_config(kernel, extent, config)
        compiled = ahead_of_time.compile_call(kernel, **arguments, **options)
        launched[key] = replace(compiled, config=config)

    out, lse = attention(problem, launch)
    wants_bias = problem.bias is not None
    attention_backward(problem, BackwardInputs(out, None, out, lse, wants_bias), launch)
    ahead = {"decode", "combine"} if "decoding" in name else {"forward"}
    back = {"backward_preprocess", "backward_dkdv", "backward_dq"}
    kernels = {key.kernel for key in launched}
    assert kernels == ahead | back | ({"backward_dbias"} if wants_bias else set())
    for key, compiled in launched.items():
        assert suits(compiled, key), launched


# Instructions of the loop of forward, D = 64, 128 x 64, that a warp issues for a block: what base
# scores take 280 for. Read key by key, or tested in two layouts, such pairs took 925 to 1,535.
LOOPS = {"documents": 1060, "dense": 880, "bias": 980}


@pytest.mark.parametrize("name", LOOPS)
def test_pairs_are_tested_once(name: str) -> None:
    ahead_of_time.pretend("sm_90")
    config = Config(128, 64, 8, 3)
    compiled = ahead_of_time.compile_kernel("forward", PROBLEMS[name](64), config)
    assert compiled.fits("sm_90"), compiled
    assert compiled.loop is not None
    assert compiled.loop.instructions <= LOOPS[name]


@pytest.mark.parametrize("kind", ["dense", "bias"])
def test_pairs_are_read_in_chunks(kind: str) -> None:
    """By asynchronous copies, into shared memory, unless rows start anywhere."""
    ahead_of_time.pretend("sm_90")
    shared = []
    for width in (512, 517):
        marks = torch.ones(4, 512, width, dtype=torch.bool)[..., :512]
        bias = torch.zeros(4, 512, width, dtype=torch.bfloat16)[..., :512]
        problem = (square(Dense(marks)) if kind == "dense" else square(bias=bias))(64)
        config = Config(128, 64, 8, 3)
        shared.append(ahead_of_time.compile_kernel("forward", problem, config).shared)
    assert shared[0] > shared[1]
