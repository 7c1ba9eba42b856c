"""Compiles the Triton kernels for GPUs that are not there, and reads the compiler's log.

A process that compiles must not have TRITON_INTERPRET set: Triton decides at its import.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ...kernels import ALiBi, Causal, Dense, Documents, KeyLengths, Mask, Window
from ...kernels.api.attention import attention_problem
from ...kernels.backends.gpu_triton import plans
from ...kernels.backends.gpu_triton.attention_decode import CHUNK, MAX_ROWS
from ...kernels.backends.gpu_triton.attention_launch import Launch, attention, attention_backward
from ...kernels.backends.gpu_triton.configs import TF32_BITS, Config, Key, launch_config
from ...kernels.ops.problem import AttentionProblem, BackwardInputs
from .sass import Loop, loops_of
from .tune import SHARED_LIMIT

DTYPES = {16: torch.bfloat16, TF32_BITS: torch.float32, 32: torch.float32, 64: torch.float64}


# Bytes of a thread that may be spilled, if the loop over whole blocks, where almost all time goes,
# has next to nothing of it. Most lies before and after the loops, and in those over the few blocks
# that a mask cuts.
MAX_SPILLED_BYTES = 128
MAX_SPILL_SHARE = 0.01  # of the loop's


@dataclass(frozen=True)
class Compiled:
    """The resources of a multiprocessor that a compiled kernel takes."""

    registers: int
    spilled: int  # bytes of spill stores; AMD: registers
    shared: int  # bytes
    wgmma: int  # Hopper's asynchronous matrix instructions
    serialized: bool  # ptxas could not overlap them
    copies: int = 0  # asynchronous ones of 16 bytes, in the code
    cubin: bytes = field(default=b"", repr=False)
    config: Config | None = None

    def fits(self, arch: str) -> bool:
        return self.bearable and not self.serialized and self.shared <= SHARED_LIMIT[arch]

    @property
    def bearable(self) -> bool:
        """Whether it spills nothing, or a little that its loop does not notice."""
        if self.spilled == 0:
            return True
        if self.spilled > MAX_SPILLED_BYTES or self.loop is None:
            return False
        return self.loop.spills <= MAX_SPILL_SHARE * self.loop.instructions

    @functools.cached_property
    def loop(self) -> Loop | None:
        """The shortest loop that has an exponential for each score: that over whole blocks.

        None for AMD, and where exponentials are computed by other means (float64).
        """
        if self.config is None or not self.cubin:
            return None
        loops = [loop for loop in loops_of(self.cubin) if loop.exponentials >= self.scores]
        return min(loops, key=lambda loop: loop.instructions, default=None)

    @property
    def scores(self) -> float:
        """Of a tile, for each thread."""
        assert self.config is not None
        return self.config.block_m * self.config.block_n / (32 * self.config.num_warps)

    @property
    def cycles(self) -> float:
        """Cycles in which a multiprocessor's four schedulers issue the loop for 4,096 scores."""
        return math.inf if self.loop is None else 32 * self.loop.instructions / self.scores


class _Driver:
    """Stands in for a GPU of the given architecture: enough for Triton to specialise a call."""

    def __init__(self, arch: str) -> None:
        if arch.startswith("gfx"):
            self.target = GPUTarget("hip", arch, 64)
        else:
            self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu


def pretend(arch: str) -> None:
    """From now on Triton compiles for `arch`."""
    triton.runtime.driver.set_active(_Driver(arch))


def problem_of(key: Key) -> AttentionProblem:
    """A padded causal problem with all that `key.features` names at once.

    For decoding, one with as many rows as a tile may have.
    """
    heads, key_heads, query_len, key_len = 4, 4, 1024, 1024
    if key.kernel in ("decode", "combine"):
        heads, key_heads, query_len, key_len = 8, 1, MAX_ROWS.value // 8, 2 * CHUNK
    mask: Mask = Causal("lower_right") & KeyLengths(torch.tensor([1000, 900]))
    options: dict[str, Any] = {}
    if "score_mod" in key.features:
        mask = mask & Dense(torch.ones(query_len, key_len, dtype=torch.bool))
        bias = torch.empty(2, heads, query_len, key_len, dtype=DTYPES[key.bits])
        options = {"bias": bias, "softcap": 30.0, "sinks": torch.empty(heads)}
    return _problem(key, (heads, key_heads, query_len, key_len), mask, **options)


def harder_problems(key: Key) -> Iterator[AttentionProblem]:
    """Others of the same key that may take more registers: a config must fit them too.

    None for decoding, and none for a wide type with everything at once, the most it can have.
    """
    if key.kernel in ("decode", "combine") or (key.bits > 16 and "score_mod" in key.features):
        return
    sizes = (4, 1, 512, 512)
    if "score_mod" in key.features:
        bias = torch.empty(1, 4, 512, 512, dtype=DTYPES[key.bits])
        yield _problem(key, (4, 4, 512, 512), None, bias=bias)
        if key.kernel != "backward_dbias":
            lengths = KeyLengths(torch.tensor([500, 300]))
            yield _problem(key, sizes, Documents(torch.arange(512).expand(2, -1) // 100))
            yield _problem(key, sizes, lengths, bias=ALiBi(torch.rand(4)))
            yield _problem(key, sizes, Causal(torch.tensor([0, 100])))
    else:
        yield _problem(key, sizes, Window(100, 7))
        yield pack(_problem(key, sizes, Causal()))


def _problem(
    key: Key, sizes: tuple[int, int, int, int], mask: Mask | None, **options: Any
) -> AttentionProblem:
    """Two batch elements of (query heads, key heads, queries, keys)."""
    heads, key_heads, query_len, key_len = sizes
    q = torch.empty(2, heads, query_len, key.dim, dtype=DTYPES[key.bits])
    k = torch.empty(2, key_heads, key_len, key.dim, dtype=q.dtype)
    dropout_p = 0.1 if "dropout" in key.features else 0.0
    settings = {"bias": None, "softcap": None, "sinks": None, "seed": 7} | options
    return attention_problem(
        q, k, k, mask, scale=None, dropout_p=dropout_p, draw_seed=True, **settings
    )


def pack(problem: AttentionProblem) -> AttentionProblem:
    """The first batch element taken for two packed sequences."""
    length = problem.shape[3]
    cut = length // 3
    starts = torch.tensor([0, cut, length])
    return problem._replace(
        **{name: getattr(problem, name)[:1] for name in ("query", "key", "value")},
        query_starts=starts,
        key_starts=starts,
        longest_query=length - cut,
        longest_key=length - cut,
    )


@contextlib.contextmanager
def products_in(bits: int) -> Iterator[None]:
    """torch's setting for float32 products, as a key of these bits means it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if bits == TF32_BITS else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compile_config(key: Key, config: Config) -> Compiled:
    """The kernel of `key`, compiled with `config`."""
    pretend(key.arch)
    with products_in(key.bits):
        return compile_kernel(key.kernel, problem_of(key), config)


def fits_all(key: Key, config: Config) -> bool:
    """Whether `config` fits for the harder problems of `key` as well."""
    pretend(key.arch)
    with products_in(key.bits):
        return all(
            compile_kernel(key.kernel, problem, config).fits(key.arch)
            for problem in harder_problems(key)
        )


def compile_kernel(kernel: str, problem: AttentionProblem, config: Config) -> Compiled:
    """The kernel called `kernel` as `problem` would launch it with `config`."""
    if kernel == "backward_dbias" and problem.bias is not None:
        problem = problem._replace(bias=problem.bias[:1])  # shared, so that there is a sum
    function, extent, arguments = launch_of(kernel, problem)
    _, options = launch_config(function, extent, config)
    return replace(compile_call(function, **arguments, **options), config=config)


def launch_of(
    kernel: str, problem: AttentionProblem, launch: Launch | None = None
) -> tuple[Any, tuple[int, int, int], dict[str, Any]]:
    """`kernel`, its extent and its arguments, as `problem` launches it.

    Nothing runs but by `launch`.
    """
    found: list[tuple[Any, tuple[int, int, int], dict[str, Any]]] = []

    def note(function: Any, launched: AttentionProblem, *given: Any) -> None:
        if launch is not None:
            launch(function, launched, *given)
        if function.fn.__name__ == kernel:
            found.append((function, *given))

    out, lse = attention(problem, note)
    if not found:
        has_bias = problem.bias is not None
        backward = BackwardInputs(torch.randn_like(out), None, out, lse, has_bias)
        attention_backward(problem, backward, note)
    return found[0]


def compile_call(kernel: Any, *arguments: Any, **options: Any) -> Compiled:
    """`kernel` compiled for these arguments: always anew, never from Triton's cache."""
    # the kernel's own cache knows a GPU by its number, not by its architecture
    kernel.device_caches.clear()
    with _compiler_log() as log:
        compiled = kernel.warmup(*arguments, **({"grid": (1,)} | options))
    shared = int(compiled.metadata.shared)
    if compiled.metadata.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        return Compiled(
            registers=_largest(r"\.vgpr_count: +(\d+)", assembly),
            spilled=_largest(r"\.vgpr_spill_count: +(\d+)", assembly),
            shared=shared,
            wgmma=0,
            serialized=False,
        )
    text = log.getvalue()
    return Compiled(
        registers=_largest(r"Used (\d+) registers", text),
        spilled=_largest(r"(\d+) bytes spill stores", text),
        shared=shared,
        wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
        serialized="serialized" in text,
        copies=compiled.asm["ptx"].count("cp.async.cg.shared.global"),
        cubin=compiled.asm["cubin"],
    )


@contextlib.contextmanager
def _compiler_log() -> Iterator[io.StringIO]:
    """The log of ptxas, as Triton calls it, for each kernel that is compiled meanwhile."""
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        yield log


def _largest(pattern: str, text: str) -> int:
    """The largest of the numbers that `pattern` finds; the compiler must have printed one."""
    return max(map(int, re.findall(pattern, text)))


def _launch_nothing(*_: Any) -> None:
    """Stands for Triton's launcher."""


@contextlib.contextmanager
def compiled_launches() -> Iterator[dict[str, Compiled]]:
    """Every kernel that is launched meanwhile is compiled instead: by name, the last of each."""
    found: dict[str, Compiled] = {}
    warmup = JITFunction.warmup

    def compile_only(kernel: Any, **arguments: Any) -> Any:
        JITFunction.warmup = warmup
        try:
            found[kernel.fn.__name__] = compile_call(kernel, **arguments)
        finally:
            JITFunction.warmup = compile_only
        return SimpleNamespace(run=_launch_nothing, function=None, packed_metadata=None)

    cache = plans.cache
    JITFunction.warmup, plans.cache = compile_only, {}
    try:
        yield found
    finally:
        JITFunction.warmup, plans.cache = warmup, cache
