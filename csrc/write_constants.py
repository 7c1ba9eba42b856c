"""Write the CPU backends' constants as a C++ header: `python csrc/write_constants.py HEADER`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "backends" / "cpu_common" / "constants.py"


def header() -> str:
    """One constant for every public number, one array for every public tuple of numbers."""
    lines = [
        "// Made of kernels/backends/cpu_common/constants.py by csrc/write_constants.py.",
        "#pragma once",
        "namespace rowmax {",
    ]
    for name, value in runpy.run_path(str(SOURCE)).items():
        if name.startswith("_") or not name.isupper():
            continue
        kind = "double" if _is_float(value) else "long long"
        if isinstance(value, tuple):
            elements = ", ".join(map(repr, value))
            lines.append(f"inline constexpr {kind} {name}[] = {{{elements}}};")
        else:
            lines.append(f"inline constexpr {kind} {name} = {value!r};")
    return "\n".join([*lines, "}  // namespace rowmax", ""])


def _is_float(value: object) -> bool:
    return isinstance(value[0] if isinstance(value, tuple) else value, float)


def write(path: Path) -> None:
    """Write the header unless it stands there already, so that nothing is built anew."""
    text = header()
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python csrc/write_constants.py HEADER")
    write(Path(sys.argv[1]))
