"""Builds without torch, and those that can't have the extension: the package then says why."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from ..processes import printed, python

ROOT = Path(__file__).resolve().parents[2]
PACKED = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("csrc", "package", "kernels", "transformer", "bench")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, without what was built."""
    root = tmp_path_factory.mktemp("checkout")
    built = shutil.ignore_patterns("*.so", "__pycache__", "missing_extension.txt")
    for name in PACKED:
        shutil.copy(ROOT / name, root)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=built)
    return root


def run_setup(
    checkout: Path, arguments: list[str], before: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`setup.py arguments` in a process that runs the lines `before` first."""
    script = f"""
import runpy, sys
{before}
sys.argv = ["setup.py", "-q", *{arguments!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    return python("-c", script, cwd=checkout, **{"ROWMAX_EXTENSION": "auto", **variables})


def build(
    checkout: Path, before: str = "", **variables: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """`setup.py build`, and its folder."""
    library = checkout / "build" / "lib"
    shutil.rmtree(library, ignore_errors=True)
    return run_setup(checkout, ["build", "--build-lib", str(library)], before, **variables), library


def program(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def quick_compiler(folder: Path, *lines: str) -> tuple[str, Path]:
    """A compiler that writes down its commands, does `lines`, and makes empty objects."""
    log = folder / "commands"
    path = program(
        folder / "quick-c++",
        *("case $1 in -dumpmachine) echo $(uname -m)-linux-gnu; exit;; esac", f'echo "$*" >>{log}'),
        *('case "$*" in *-fsyntax-only*) exit 0;; esac', *lines),
        'for made; do :; done; : >"$made"',
    )
    return path, log


def test_without_a_compiler(checkout: Path) -> None:
    expect_reason(
        build(checkout, CXX="no-such-compiler"),
        "no C++ compiler: no-such-compiler is not on the PATH",
    )


def test_with_a_compiler_that_is_too_old(checkout: Path, tmp_path: Path) -> None:
    error = "error: unrecognized option '-std=c++20'"
    compiler = program(tmp_path / "old-c++", f'echo "{error}" >&2', "exit 1")
    expect_reason(
        build(checkout, CXX=compiler),
        f"{compiler} can't compile it; GCC >= 12 with Python's headers can: error: unrecognized",
    )


def test_without_torch(checkout: Path, tmp_path: Path) -> None:
    """As in an isolated build, where pip installs what pyproject.toml names and no torch."""
    compiler, log = quick_compiler(tmp_path)
    without = "sys.modules['torch'] = None"
    done, library = build(checkout, without, CXX=compiler, ROWMAX_EXTENSION="require")
    assert done.returncode == 0, done.stderr
    assert list(library.glob("rowmax/kernels/_C.abi3.so"))
    _, *compilations, link = log.read_text("utf-8").splitlines()
    sources = [command.split(" -c ")[1].split()[0] for command in compilations]
    names = {Path(source).relative_to(checkout / "csrc") for source in sources}
    assert names == {
        path.relative_to(checkout / "csrc") for path in (checkout / "csrc").glob("*/*.cpp")
    }
    assert link.count(".o ") == len(sources)
    assert not re.search(r"site-packages|dist-packages|-l\w*torch", "".join([*compilations, link]))


def test_only_what_has_changed_is_compiled_again(tmp_path: Path) -> None:
    compiler, log = quick_compiler(
        tmp_path, 'while [ "$1" != -MF ]; do shift; done; cp $(dirname "$2")/rule "$2"'
    )
    compile_sources = runpy.run_path(str(ROOT / "csrc" / "compile.py"))["compile_sources"]
    source, header, made = (tmp_path / name for name in ("a b.cpp", "a.h", "made.o"))
    for path in (source, header):
        path.touch()
    (tmp_path / "rule").write_text(f"made.o: {tmp_path}/a\\ b.cpp \\\n  {header}\n")

    def compilations(*flags: str) -> int:
        log.write_text("")
        compile_sources([compiler], [(source, made, list(flags))])
        return len(log.read_text("utf-8").splitlines())

    assert [compilations(), compilations(), compilations("-O1"), compilations("-O1")] == [
        1,
        0,
        1,
        0,
    ]
    later = made.stat().st_mtime_ns + 10**9
    os.utime(header, ns=(later, later))
    assert compilations("-O1") == 1


def test_not_wanted(checkout: Path) -> None:
    expect_reason(build(checkout, ROWMAX_EXTENSION="skip"), "ROWMAX_EXTENSION=skip")


def test_an_editable_install_whose_compilation_fails(checkout: Path, tmp_path: Path) -> None:
    """It leaves the reason in the checkout itself, where its packages are read from."""
    compiler, _ = quick_compiler(tmp_path, "echo the compiler crashed", "exit 1")
    arguments = ["editable_wheel", "--dist-dir", str(tmp_path)]
    done = run_setup(checkout, arguments, before="", CXX=compiler)
    assert done.returncode == 0, done.stderr
    reason = checkout / "kernels" / "missing_extension.txt"
    assert "exit status 1\nthe compiler crashed" in reason.read_text("utf-8")
    assert list(tmp_path.glob("rowmax-*.whl"))
    reason.unlink()


# An editable install beside it would find its own extension.
REPORT = """
import runpy, sys
sys.modules["rowmax.kernels._C"] = None
runpy.run_module("rowmax.kernels", run_name="__main__")
"""


def expect_reason(built: tuple[subprocess.CompletedProcess[str], Path], reason: str) -> None:
    """The build succeeded without the extension; `python -m rowmax.kernels` says why, and more."""
    done, library = built
    assert done.returncode == 0, done.stderr
    assert f"without the C++ extension rowmax.kernels._C: {reason}" in done.stderr
    assert not list(library.glob("rowmax/kernels/_C*"))
    report = printed("-c", REPORT, PYTHONPATH=str(library))
    assert f"native     does not work here: the C++ extension is not built ({reason}" in report
    assert "`pip install --no-deps --force-reinstall --no-cache-dir .` in the checkout" in report


def test_an_extension_that_is_required(checkout: Path, tmp_path: Path) -> None:
    done, _ = build(checkout, CXX="no-such-compiler", ROWMAX_EXTENSION="require")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr
    compiler, _ = quick_compiler(tmp_path, "echo the compiler crashed", "exit 1")
    done, _ = build(checkout, CXX=compiler, ROWMAX_EXTENSION="require")
    assert done.returncode != 0
    assert "the compiler crashed" in done.stderr


def test_the_package_itself_is_built(checkout: Path, tmp_path: Path) -> None:
    """`rowmax` is a package with a version and names, and its subpackages come from beside it, not
    from an editable install that is here as well."""
    done, library = build(checkout, ROWMAX_EXTENSION="skip")
    assert done.returncode == 0, done.stderr
    script = """
import rowmax, rowmax.bench, rowmax.kernels, rowmax.transformer
from rowmax import attention
print(rowmax.__version__)
for package in (rowmax, rowmax.bench, rowmax.kernels, rowmax.transformer):
    print(package.__file__)
"""
    version, *files = printed("-c", script, cwd=tmp_path, PYTHONPATH=str(library)).split()
    assert version == "0.1.0"
    folders = ("", "bench/", "kernels/", "transformer/")
    assert files == [str(library / "rowmax" / f"{folder}__init__.py") for folder in folders]
    for name in ("__main__.py", "console.py", "py.typed"):
        assert (library / "rowmax" / name).is_file()


def test_the_version_stands_in_one_place(checkout: Path) -> None:
    done = run_setup(checkout, ["--version"], before="", ROWMAX_EXTENSION="skip")
    assert done.stdout.split()[-1] == "0.1.0"
    assert '__version__ = "0.1.0"' in (checkout / "package" / "__init__.py").read_text("utf-8")
    assert "0.1.0" not in (checkout / "pyproject.toml").read_text("utf-8")
