"""`python -m rowmax.bench configs`: compiles the Triton attention kernels with their configs.

For GPUs that need not be here. A Markdown table has a line for each key: its config, and the
registers and memory that it takes. The command only reports; the checks are in `make compile`.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..options import names_of, told
from .tune import FOREMOST, SHARED_LIMIT, add_key_options, check_compiler, keys_chosen

if TYPE_CHECKING:  # they need Triton
    from ...kernels.backends.gpu_triton.configs import Key

COLUMNS = (
    *("kernel", "bits", "head", "features", "config", "registers", "spilled", "shared", "wgmma"),
    *("loop", "cycles"),
)
EXPLANATION = (
    "config: BLOCK_M x BLOCK_N, warps, stages; registers: of a thread; spilled: bytes of a thread "
    "(AMD: registers); shared: KiB of a program; wgmma: instructions in the code; loop: those of a "
    "turn over a whole block; cycles: in which a multiprocessor issues them, for 4,096 scores"
)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--arch", metavar="NAMES", default=FOREMOST, help="default: %(default)s")
    add_key_options(command)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit status, 0 whatever the compiler says."""
    if options.command == "forms":
        print("rowmax.bench: the command forms is deprecated: use configs", file=sys.stderr)
    chosen = keys_chosen(options)
    archs = names_of("--arch", options.arch, SHARED_LIMIT)
    check_compiler("configs", "compiled")
    for arch in archs:
        print(f"\n{arch}, at most {SHARED_LIMIT[arch] / 1024:g} KiB of shared memory a program\n")
        print(_line(COLUMNS))
        print(_line(["---"] * len(COLUMNS)))
        for key in chosen([arch]):
            print(_line(_cells(key)), flush=True)
    return 0


def _cells(key: Key) -> list[str]:
    from ...kernels.backends.gpu_triton.configs import lookup
    from .ahead_of_time import compile_config

    config = lookup(key)
    text = f"{config.block_m} x {config.block_n}, {config.num_warps}, {config.num_stages}"
    name = [key.kernel, str(key.bits), str(key.dim), key.features, text]
    try:
        compiled = compile_config(key, config)
    except Exception as error:
        # any stage of the compiler may give up, each with an error of its own: that is a finding
        return [*name, f"does not compile: {told(error)}", *[""] * 5]
    shared = f"{compiled.shared / 1024:.0f}"
    numbers = [str(compiled.registers), str(compiled.spilled), shared, str(compiled.wgmma)]
    if compiled.loop is not None:
        return [*name, *numbers, str(compiled.loop.instructions), f"{compiled.cycles:.0f}"]
    return [*name, *numbers, "", ""]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
