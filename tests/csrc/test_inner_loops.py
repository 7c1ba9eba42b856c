"""The machine code of the products' innermost loops: nothing but what they need, all in registers.

A compiler that keeps a sum or a row's address in memory costs a tenth of the speed and breaks no
result.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import rowmax.kernels

LIBRARY = Path(rowmax.kernels.__file__).with_name("_C.abi3.so")
# Per form: tiles of rows x vectors, as gemm.h has them.
TILES = {
    "avx512": ((4, 4), (4, 3), (8, 2), (8, 1)),
    "avx2": ((4, 3), (6, 2), (8, 1)),
    "portable": ((4, 4), (8, 2), (8, 1)),  # with fused products on aarch64 alone
}

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="wants objdump"),
    pytest.mark.skipif(not LIBRARY.is_file(), reason="the C++ backend was left out"),
]


def innermost_loop(form: str, rows: int, vectors: int) -> list[str]:
    """The instructions from the target of the first branch back over fused products."""
    name = f"rowmax::{form}::multiply_tiles<float, {rows}, {vectors}, float>"
    code: list[tuple[int, str]] = []
    inside = False
    for line in _disassembled():
        if line.endswith(">:"):
            inside = f"{name}(" in line
        elif inside and (found := re.match(r"\s*([0-9a-f]+):\s+(.*)", line)):
            code.append((int(found[1], 16), found[2]))
    for end, (_, text) in enumerate(code):
        branch = re.match(r"(?:j|b\.|cb)\S*\s+(?:\S+, )?([0-9a-f]+) <", text)
        if branch is None:
            continue
        target = int(branch[1], 16)
        loop = [text for at, text in code[: end + 1] if at >= target]
        if any(re.match(r"vfmadd|fmla", text) for text in loop):
            return loop
    raise AssertionError(f"{name}: no loop over fused products")


_LINES: list[str] = []


def _disassembled() -> list[str]:
    if not _LINES:
        command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(LIBRARY)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        _LINES.extend(done.stdout.splitlines())
    return _LINES


@pytest.mark.parametrize(
    "form, rows, vectors",
    [
        pytest.param(form, *tile, id=f"{form}-{tile[0]}x{tile[1]}")
        for form in (("portable",) if platform.machine() == "aarch64" else ("avx512", "avx2"))
        for tile in TILES[form]
    ],
)
def test_the_loop_of_a_tile_is_all_in_registers(form: str, rows: int, vectors: int) -> None:
    loop = innermost_loop(form, rows, vectors)
    products = [text for text in loop if re.match(r"vfmadd|fmla", text)]
    assert len(products) == rows * vectors
    assert not [text for text in loop if re.search(r"%rsp|%rbp\)|\[sp", text)]
    # the columns' loads, a broadcast a row, and what counts and branches
    assert len(loop) <= rows * vectors + vectors + rows + 6
