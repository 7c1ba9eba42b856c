"""`make count`: lines of product and tests, files that are too long, circles of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGES = {name: f"rowmax.{name}" for name in ("kernels", "transformer", "bench")}
PRODUCT = ("package/", "kernels/", "transformer/", "bench/", "csrc/", "setup.py")
SUFFIXES = (".py", ".cpp", ".h", ".sh", ".html")
MOST_LINES = 500


def main() -> int:
    """Print the counts; exit status 1 where a file is too long or imports go in a circle."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    files = [Path(name) for name in listed.stdout.split() if name.endswith(SUFFIXES)]
    lines = {file: file.read_text("utf-8").count("\n") for file in files}
    product = {file: lines[file] for file in files if str(file).startswith(PRODUCT)}
    tests = {file: lines[file] for file in files if str(file).startswith("tests/")}
    for name, part in (("product", product), ("tests", tests)):
        print(f"{name:8} {sum(part.values()):7,} lines in {len(part)} files")
    long = {file: count for file, count in lines.items() if count > MOST_LINES}
    for file, count in sorted(long.items()):
        print(f"{file}: {count} lines, more than {MOST_LINES}")
    found = circles({module_of(file): file for file in product if file.suffix == ".py"})
    for circle in found:
        print("circle of imports:", " <-> ".join(circle))
    return 1 if long or found else 0


def module_of(file: Path) -> str:
    folder, *parts = file.with_suffix("").parts
    name = ".".join((PACKAGES.get(folder, "rowmax"), *parts))
    return name.removesuffix(".__init__")


def circles(modules: dict[str, Path]) -> list[list[str]]:
    """The groups of modules that import each other when they are loaded (Tarjan 1972)."""
    graph = {name: imports_of(name, file, modules) for name, file in modules.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def imports_of(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of this project that `file` imports at its top level, types aside."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    nodes = list(ast.parse(file.read_text("utf-8")).body)
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            nodes += [*node.body, *node.orelse]
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            target = f"{base}.{alias.name}"
            found.add(target if target in modules else base)
    return found & modules.keys() - {name}


if __name__ == "__main__":
    sys.exit(main())
