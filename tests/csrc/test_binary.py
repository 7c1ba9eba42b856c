"""The built library: one file for every Python and torch, which means stable symbols only."""

from __future__ import annotations

import re
import shutil
import subprocess
from types import ModuleType

import pytest

# Mangled names in at::, c10:: or torch::, whose layout changes with every torch release.
UNSTABLE = re.compile(r"_ZN?K?[A-Z]*(2at|3c10|5torch)[0-9]")


@pytest.fixture
def undefined_symbols(extension: ModuleType) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    path = extension.__file__
    assert path is not None
    listing = subprocess.run(
        [nm, "-D", "--undefined-only", path], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines()]


def test_file_name_is_for_any_python(extension: ModuleType) -> None:
    assert str(extension.__file__).endswith("_C.abi3.so")


def test_links_only_stable_torch_symbols(undefined_symbols: list[str]) -> None:
    assert any(name.startswith("aoti_torch_") for name in undefined_symbols)
    assert [name for name in undefined_symbols if UNSTABLE.match(name)] == []


def test_links_no_python_beyond_the_limited_interface(undefined_symbols: list[str]) -> None:
    assert [name for name in undefined_symbols if name.startswith(("Py", "_Py"))] == [
        "PyModule_Create2"
    ]


@pytest.mark.parametrize(
    "name", ["_ZN2at4_ops5empty4callEv", "_ZNK3c1010TensorImpl5sizesEv", "_ZN5torch3jit4loadEv"]
)
def test_the_pattern_knows_an_unstable_symbol(name: str) -> None:
    assert UNSTABLE.match(name)
