"""Compiles the Triton attention kernels for GPUs that are not there, and reads what ptxas says.

A process that compiles must not have TRITON_INTERPRET set: Triton decides at its import.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..kernels import Causal, Dense, KeyLengths, Mask
from ..kernels.functional import attention_problem
from ..kernels.gpu_triton.attention_launch import attention, attention_backward, compiled_form
from ..kernels.gpu_triton.configurations import Configuration
from ..kernels.problem import AttentionProblem

# Bytes of shared memory that one program may have.
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}
FEATURES = ("plain", "dropout", "rich", "rich_dropout")
DTYPES = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs of a multiprocessor."""

    registers: int
    spilled: int  # bytes of spill stores
    shared: int  # bytes
    wgmma: int  # Hopper's asynchronous matrix instructions
    serialized: bool  # ptxas could not overlap them

    def fits(self, arch: str) -> bool:
        return self.spilled == 0 and not self.serialized and self.shared <= SHARED_LIMIT[arch]


class _Driver:
    """Stands in for a GPU of the given architecture: enough for Triton to specialise a call."""

    def __init__(self, arch: str) -> None:
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


def problem_of(bits: int, dim: int, features: str) -> AttentionProblem:
    """A problem with all that `features` names at once, and a band with both bounds in any case."""
    batch, heads, length = 2, 4, 1024
    q, k, v = (torch.empty(batch, heads, length, dim, dtype=DTYPES[bits]) for _ in range(3))
    mask: Mask = Causal() & KeyLengths(torch.tensor([1000, 900]))
    options: dict[str, Any] = {"bias": None, "softcap": None, "sinks": None}
    if "rich" in features:
        mask = mask & Dense(torch.ones(length, length, dtype=torch.bool))
        options = {
            "bias": torch.empty(batch, heads, length, length, dtype=q.dtype),
            "softcap": 30.0,
            "sinks": torch.empty(heads),
        }
    dropout_p = 0.1 if "dropout" in features else 0.0
    return attention_problem(
        q, k, v, mask, scale=None, dropout_p=dropout_p, seed=7, draw_seed=True, **options
    )


def compile_kernel(kernel: str, problem: AttentionProblem, config: Configuration) -> Compiled:
    """The kernel called `kernel` as `problem` would launch it in the form `config`."""
    found: list[Any] = []

    def launch(function: Any, _problem: Any, _extent: Any, arguments: dict[str, Any]) -> None:
        if function.fn.__name__ == kernel:
            form = compiled_form(function, config)
            found.append(function.warmup(**arguments, **form, grid=(1,)))

    out, lse = attention(problem, launch)
    bias = problem.bias
    if kernel == "bias_gradients":
        assert bias is not None
        problem = problem._replace(bias=bias[:1])  # shared, so that there is something to sum
    attention_backward(problem, out, None, out, lse, bias is not None, False, launch)
    return examine(found[0])


def examine(compiled: Any) -> Compiled:
    """Registers and spills of a kernel compiled by Triton, from ptxas's own words."""
    arch = compiled.metadata.target.arch
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        said = subprocess.run(
            [_ptxas(arch), "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return Compiled(
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        shared=int(compiled.metadata.shared),
        wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
        serialized="serialized" in said,
    )


def _ptxas(arch: int) -> Path:
    """The assembler in Triton's wheel; its newer one for Blackwell."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    return blackwell if arch >= 100 and blackwell.exists() else folder / "ptxas"
