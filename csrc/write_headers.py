"""Write the headers that the CPU backends' Python defines: `python csrc/write_headers.py FOLDER`.

`constants.h` has the numbers of `kernels/backends/cpu_common/constants.py`, and `call_records.h`
the structs that `call_records.py` beside it describes. `problems.h` has the fields of the problems
of `kernels/ops/problem.py`, as parameters of operators.
"""

from __future__ import annotations

import ast
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


# What a field's annotation is in torch's schema, in C++ as a parameter and as a member.
_PARAMETERS = {
    "Tensor": ("Tensor", "Tensor", "View"),
    "Tensor | None": ("Tensor?", "MaybeTensor", "MaybeTensor"),
    "int": ("int", "int64_t", "int64_t"),
    "int | None": ("int?", "MaybeInt", "MaybeInt"),
    "float": ("float", "double", "double"),
    "float | None": ("float?", "std::optional<double>", "std::optional<double>"),
}


def problems() -> list[str]:
    """A struct for the mask and for each problem with one, and its fields as parameters."""
    mask = _fields("api/masks.py", "MaskStructure")
    lines = ["struct MaskStructure {", *_members(mask), "};", "template <typename... Type>"]
    lines.append("struct Types {};")
    for name in ("AttentionProblem", "SoftmaxProblem"):
        fields = _fields("ops/problem.py", name)
        lines += ["", f"struct {name} {{", *_members(fields), "};"]
        flat: list[tuple[str, str]] = []
        for field, kind in fields:
            flat += mask if kind == "MaskStructure" else [(field, kind)]
        schema = ", ".join(f"{_PARAMETERS[kind][0]} {field}" for field, kind in flat)
        types = ", ".join(_PARAMETERS[kind][1] for _, kind in flat)
        lines.append(f'inline constexpr const char* k{name} = "{schema}";')
        lines.append(f"using {name}Types = Types<{types}>;")
    return lines


def _members(fields: list[tuple[str, str]]) -> list[str]:
    return [f"  {_PARAMETERS.get(kind, (kind,))[-1]} {field};" for field, kind in fields]


def _fields(file: str, name: str) -> list[tuple[str, str]]:
    """The fields of a NamedTuple and their annotations, read without importing torch."""
    tree = ast.parse((ROOT / "kernels" / file).read_text("utf-8"))
    (found,) = (x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == name)
    fields = []
    for statement in found.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind = statement.annotation
            if isinstance(kind, ast.Subscript) and isinstance(kind.slice, ast.Tuple):
                kind = kind.slice.elts[0]  # of Annotated[kind, spec]
            fields.append((statement.target.id, ast.unparse(kind)))
    return fields


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
    write_header(folder / "problems.h", ("<optional>", '"binding/launch.h"'), problems())


def write_fields(folder: Path) -> None:
    """What a program that is told fields by name needs, beside the others."""
    write_header(folder / "call_fields.h", ("<stddef.h>", '"call_records.h"'), call_fields())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python csrc/write_headers.py FOLDER")
    write(Path(sys.argv[1]))
