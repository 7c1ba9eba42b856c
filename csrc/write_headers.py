"""Write the headers that the CPU backends' Python defines: `python csrc/write_headers.py FOLDER`.

`constants.h` has the numbers of `kernels/backends/cpu_common/constants.py`, and `call_records.h`
the structs that `call_records.py` beside it describes.
"""

from __future__ import annotations

import itertools
import runpy
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFINITIONS = ROOT / "kernels" / "backends" / "cpu_common"
WIDTH = 100


def constants() -> list[str]:
    """One constant for every public number, one array for every public tuple of numbers."""
    lines = []
    for name, value in runpy.run_path(str(DEFINITIONS / "constants.py")).items():
        if name.startswith("_") or not name.isupper():
            continue
        kind = "double" if _is_float(value) else "long long"
        if isinstance(value, tuple):
            elements = ", ".join(map(repr, value))
            lines.append(f"inline constexpr {kind} {name}[] = {{{elements}}};")
        else:
            lines.append(f"inline constexpr {kind} {name} = {value!r};")
    return lines


def _is_float(value: object) -> bool:
    return isinstance(value[0] if isinstance(value, tuple) else value, float)


def call_records() -> list[str]:
    """A struct for each record: pass by pass, a line for neighbours that share type and comment."""
    lines = ["// Strides are in elements; T is the type computed in."]
    for record in _records():
        lines += ["", f"// {record.comment}", f"struct {record.name} {{"]
        for name, fields in record.passes.items():
            if name != "all" and fields:
                lines += ["", f"  // Of the {name} kernel alone."]
            for (kind, comment), group in itertools.groupby(fields, lambda f: (f.type, f.comment)):
                lines += _declaration(kind, comment, [field.name for field in group])
        lines.append("};")
    return lines


def call_fields() -> list[str]:
    """Where each record has its fields, by name."""
    lines = ["struct CallField {", "  const char* name;", "  size_t offset, size;", "};"]
    lines += ["template <typename Call>", "inline constexpr CallField CALL_FIELDS[1] = {};"]
    for record in _records():
        of = record.name
        names = [field.name for field in record.every_field()]
        lines += ["template <>", f"inline constexpr CallField CALL_FIELDS<{of}>[] = {{"]
        lines += [f'    {{"{n}", offsetof({of}, {n}), sizeof({of}::{n})}},' for n in names]
        lines.append("};")
    return lines


def _declaration(kind: str, comment: str, names: list[str]) -> list[str]:
    item = kind.rstrip("*")
    line = f"  {kind} {names[0]};"
    if len(names) > 1:
        line = f"  {item} {', '.join(kind[len(item) :] + name for name in names)};"
    beside = f"{line}  // {comment}"
    if comment and len(beside) > WIDTH:
        return [*(f"  // {part}" for part in textwrap.wrap(comment, WIDTH - 5)), line]
    return [beside if comment else line]


def _records() -> Iterable[Any]:
    return runpy.run_path(str(DEFINITIONS / "call_records.py"))["RECORDS"]  # type: ignore[no-any-return]


def write_header(path: Path, includes: Iterable[str], body: list[str]) -> None:
    """Write the header unless it stands there already, so that nothing is built anew."""
    lines = [
        "// Made by csrc/write_headers.py.",
        "#pragma once",
        *(f"#include {name}" for name in includes),
        "namespace rowmax {",
        *body,
        "}  // namespace rowmax",
    ]
    text = "\n".join([*lines, ""])
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write(folder: Path) -> None:
    write_header(folder / "constants.h", (), constants())
    write_header(folder / "call_records.h", ("<stdint.h>",), call_records())


def write_fields(folder: Path) -> None:
    """What a program that is told fields by name needs, beside the others."""
    write_header(folder / "call_fields.h", ("<stddef.h>", '"call_records.h"'), call_fields())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python csrc/write_headers.py FOLDER")
    write(Path(sys.argv[1]))
