"""Builds that can't have the extension: they succeed without it, and the package says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
        env={**os.environ, "ROWMAX_EXTENSION": "auto", **variables},
    )


def build(
    checkout: Path, before: str = "", **variables: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """`setup.py build`, and its folder."""
    library = checkout / "build" / "lib"
    shutil.rmtree(library, ignore_errors=True)
    return run_setup(checkout, ["build", "--build-lib", str(library)], before, **variables), library


def old_compiler(folder: Path) -> str:
    path = folder / "old-c++"
    path.write_text("#!/bin/sh\necho \"error: unrecognized option '-std=c++20'\" >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler(checkout: Path) -> None:
    expect_reason(
        build(checkout, CXX="no-such-compiler"),
        "no C++ compiler: no-such-compiler is not on the PATH",
    )


def test_with_a_compiler_that_is_too_old(checkout: Path, tmp_path: Path) -> None:
    compiler = old_compiler(tmp_path)
    expect_reason(
        build(checkout, CXX=compiler),
        f"{compiler} can't compile it; GCC >= 12 with Python's headers can: error: unrecognized",
    )


def test_without_torch(checkout: Path) -> None:
    """As in an isolated build, where pip installs what pyproject.toml names and no torch."""
    expect_reason(
        build(checkout, before="sys.modules['torch'] = None"), "torch can't be imported where"
    )


def test_not_wanted(checkout: Path) -> None:
    expect_reason(build(checkout, ROWMAX_EXTENSION="skip"), "ROWMAX_EXTENSION=skip")


def test_an_editable_install_whose_compilation_fails(checkout: Path, tmp_path: Path) -> None:
    """It leaves the reason in the checkout itself, where its packages are read from."""
    before = """
from torch.utils.cpp_extension import BuildExtension
def fail(self):
    raise RuntimeError("the compiler crashed")
BuildExtension.build_extensions = fail
"""
    done = run_setup(checkout, ["editable_wheel", "--dist-dir", str(tmp_path)], before)
    assert done.returncode == 0, done.stderr
    reason = checkout / "kernels" / "missing_extension.txt"
    assert "the compiler crashed" in reason.read_text("utf-8")
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
    report = subprocess.run(
        [sys.executable, "-c", REPORT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(library)},
    ).stdout
    assert f"native     does not work here: the C++ extension is not built ({reason}" in report
    assert "`pip install --no-build-isolation .` in the checkout builds it" in report


@pytest.mark.parametrize(
    "before, reason",
    [("", "no C++ compiler"), ("sys.modules['torch'] = None", "No module named 'torch")],
    ids=["compiler", "torch"],
)
def test_an_extension_that_is_required(checkout: Path, before: str, reason: str) -> None:
    done, _ = build(checkout, before, CXX="no-such-compiler", ROWMAX_EXTENSION="require")
    assert done.returncode != 0
    assert reason in done.stderr


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
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(library)},
    )
    version, *files = run.stdout.split()
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
