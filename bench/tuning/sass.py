"""The loops of a kernel for NVIDIA's GPUs, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from triton import knobs

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+[^;]*);")
_ADDRESS = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Loop:
    """The instructions that a warp issues in one iteration."""

    instructions: int
    exponentials: int  # base 2, in the special function unit
    spills: int  # reads and writes of registers that lie in memory


def loops_of(cubin: bytes) -> list[Loop]:
    """Every jump back, with all that lies between its target and itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), operation) for at, operation in _INSTRUCTION.findall(text)]
    loops = []
    for at, operation in code:
        targets = _ADDRESS.findall(operation) if operation.startswith("BRA") else []
        if targets and int(targets[-1], 16) < at:
            start = int(targets[-1], 16)
            loops.append(
                _loop([operation for address, operation in code if start <= address <= at])
            )
    return loops


def _loop(body: list[str]) -> Loop:
    return Loop(
        instructions=len(body),
        exponentials=sum("MUFU.EX2" in operation for operation in body),
        spills=sum(operation.startswith(("LDL", "STL")) for operation in body),
    )
