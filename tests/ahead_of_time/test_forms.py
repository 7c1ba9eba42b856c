"""Every form in the table of Triton attention kernels, compiled for its GPU without one.

Run with TRITON_INTERPRET=0: what is interpreted can't be compiled in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rowmax.bench import ahead_of_time, tune
from rowmax.kernels import ALiBi, Causal, Documents, KeyLengths
from rowmax.kernels.functional import attention_problem
from rowmax.kernels.gpu_triton.attention_launch import (
    attention,
    attention_backward,
    compiled_form,
)
from rowmax.kernels.gpu_triton.configurations import Configuration, Key, key_of, lookup, table
from rowmax.kernels.problem import AttentionProblem

ARCHS = sorted({key.arch for key in table()})


@pytest.mark.parametrize("key", sorted(table()), ids=lambda key: "/".join(map(str, key)))
def test_a_form_fits_its_gpu(key: Key) -> None:
    """No spilled register, shared memory within the limit, Hopper's matrix instructions overlap."""
    ahead_of_time.pretend(key.arch)
    problem = ahead_of_time.problem_of(key.kernel, key.bits, key.dim, key.features)
    compiled = ahead_of_time.compile_kernel(key.kernel, problem, table()[key])
    assert compiled.fits(key.arch), compiled
    form = table()[key]
    rows = form.block_n if key.kernel == "key_gradients" else form.block_m  # of each product
    if key.arch == "sm_90" and key.bits == 16 and rows >= 64:
        assert compiled.wgmma > 0


def test_the_table_is_complete_for_half_types() -> None:
    missing = set(tune.keys(tune.ARCHS, bits=[16])) - set(table())
    assert not missing


@pytest.mark.parametrize("arch", ARCHS)
def test_a_form_that_spills_is_seen(arch: str) -> None:
    ahead_of_time.pretend(arch)
    problem = ahead_of_time.problem_of("key_gradients", 16, 256, "plain")
    compiled = ahead_of_time.compile_kernel("key_gradients", problem, Configuration(64, 64, 4, 1))
    assert not compiled.fits(arch)


def test_what_the_table_lacks() -> None:
    """A smaller head takes the next larger one's form, a newer GPU an older one's."""
    key = Key("sm_90", "forward", 16, 128, "plain")
    assert lookup(key._replace(dim=16)) == table()[key._replace(dim=64)]
    assert lookup(key._replace(dim=1024)) == Configuration(32, 32, 4, 1)
    newest = max(ARCHS, key=lambda arch: int(arch.removeprefix("sm_")))
    assert lookup(key._replace(arch="sm_999")) == lookup(key._replace(arch=newest))
    assert lookup(key._replace(arch="sm_75")) == Configuration(32, 32, 4, 1)
    assert lookup(key._replace(arch="gfx90a", bits=64)) == Configuration(16, 16, 4, 1)
    single = key._replace(bits=32, dim=64, features="dropout")
    assert lookup(single) == table()[single._replace(features="rich_dropout")]


@pytest.mark.parametrize("features", ["plain", "rich_dropout"])
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_amd_takes_safe_forms(kernel: str, features: str) -> None:
    """The table has none for it: what fits everywhere fits there too."""
    if kernel == "bias_gradients" and "rich" not in features:
        features = "rich"
    key = Key("gfx942", kernel, 16, 128, features)
    ahead_of_time.pretend(key.arch)
    problem = ahead_of_time.problem_of(kernel, key.bits, key.dim, features)
    compiled = ahead_of_time.compile_kernel(kernel, problem, lookup(key))
    assert compiled.fits(key.arch), compiled


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
    starts = torch.tensor([0, 300, 512])
    problem: AttentionProblem = square(Causal())(dim)
    return problem._replace(
        **{name: getattr(problem, name)[:1] for name in ("query", "key", "value")},
        query_starts=starts,
        key_starts=starts,
        longest_query=300,
        longest_key=300,
    )


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


# The table's keys do not tell these problems apart (grouped heads, bands of each batch element), so
# a key's form may spill for one of them. Worst seen: 184 bytes, key_gradients of grouped heads.
FEW_BYTES = 256
IDS = torch.arange(512).expand(2, -1) // 100
PROBLEMS: dict[str, Callable[[int], AttentionProblem]] = {
    "full": square(),
    "grouped_heads": square(Causal(), key_heads=1),
    "band_per_batch": square(Causal(torch.tensor([0, 100]))),
    "alibi": square(Causal(), ALiBi(torch.rand(4))),
    "softcap": square(Causal(), softcap=30.0),
    "documents": square(Documents(IDS)),
    "bias": square(bias=torch.empty(1, 4, 512, 512, dtype=torch.bfloat16)),
    "packed": packed,
    "decoding": decoding,
    "packed_decoding": packed_decoding,
}


@pytest.mark.parametrize("arch,dim", [("sm_90", 64), ("sm_90", 128), ("sm_80", 128)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_that_the_table_does_not_list(name: str, dim: int, arch: str) -> None:
    """All kernels of one feature at a time, forward and backward, in the form that they take."""
    ahead_of_time.pretend(arch)
    problem = PROBLEMS[name](dim)
    launched: dict[str, ahead_of_time.Compiled] = {}

    def launch(
        kernel: Any,
        problem: AttentionProblem,
        extent: tuple[int, int, int],
        arguments: dict[str, Any],
    ) -> None:
        config = lookup(key_of(kernel.fn.__name__, problem, arch))
        _, form = compiled_form(kernel, extent, config)
        launched[kernel.fn.__name__] = ahead_of_time.compile_call(kernel, **arguments, **form)

    out, lse = attention(problem, launch)
    wants_bias = problem.bias is not None
    attention_backward(problem, out, None, out, lse, wants_bias, False, launch)
    ahead = {"decode", "combine"} if "decoding" in name else {"forward"}
    back = {"prepare", "key_gradients", "query_gradients"}
    assert set(launched) == ahead | back | ({"bias_gradients"} if wants_bias else set())
    for compiled in launched.values():
        assert replace(compiled, spilled=0).fits(arch), launched
        assert compiled.spilled <= FEW_BYTES, launched
