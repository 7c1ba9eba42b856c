"""`rowmax` itself: its version, its names, and that it loads nothing before it is asked."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import rowmax
from rowmax import kernels

from ..processes import python

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python(*arguments, cwd=cwd, PYTHONUNBUFFERED="")


def test_the_version_is_that_of_the_installation() -> None:
    assert rowmax.__version__ == metadata.version("rowmax")


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert versions[0] == rowmax.__version__


def test_every_public_name_of_the_kernels() -> None:
    for name in kernels.__all__:
        assert getattr(rowmax, name) is getattr(kernels, name)
    assert set(kernels.__all__) | {"bench", "kernels", "transformer"} <= set(dir(rowmax))
    names: dict[str, object] = {}
    exec("from rowmax import *", names)
    assert names.keys() - {"__builtins__"} == set(kernels.__all__)
    with pytest.raises(AttributeError, match="module 'rowmax' has no attribute 'attentoin'"):
        rowmax.attentoin  # noqa: B018
    with pytest.raises(ImportError, match="attentoin"):
        exec("from rowmax import attentoin")


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    script = """
import sys, rowmax
assert rowmax.__version__
loaded = {"torch", "numpy", "rowmax.kernels"} & sys.modules.keys()
assert not loaded, loaded
from rowmax import attention
assert not {"rowmax.transformer", "rowmax.kernels.testing"} & sys.modules.keys()
assert rowmax.transformer.__name__ == "rowmax.transformer"
print(attention.__module__)
"""
    done = run("-c", script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "rowmax.kernels.api.attention\n"), done.stderr


def test_the_report(tmp_path: Path) -> None:
    """What `python -m rowmax.kernels` says, and the extras."""
    done = run("-m", "rowmax", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run("-m", "rowmax.kernels", cwd=tmp_path).stdout in done.stdout
    extras = done.stdout.partition("\nextras\n")[2].splitlines()
    extras = [line for line in extras if " pip install " not in line]
    assert [line.split()[0] for line in extras] == [
        *("transformer", "pictures", "bench", "peers", "huggingface", "triton")
    ]
    assert extras[0].split()[1] == "installed"
    # as where tokenizers and mpmath are not installed
    script = """
import runpy
from importlib import metadata

found = metadata.version

def version(name):
    if name in ("tokenizers", "mpmath"):
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.version = version
runpy.run_module("rowmax", run_name="__main__")
"""
    report = run("-c", script, cwd=tmp_path).stdout
    for extra, purpose, missing in (
        ("transformer", "python -m rowmax.transformer: train, translate", "tokenizers"),
        ("bench", "python -m rowmax.bench: verify, speed", "mpmath"),
    ):
        fix = f'pip install "rowmax[{extra}]" brings {missing}'
        assert f"  {extra:<12} missing    {purpose}\n{'':>26}{fix}\n" in report


def test_transformers_in_the_checkout() -> None:
    """Its folder `kernels` is not the package of that name that transformers looks for."""
    script = """
from transformers import BertConfig, BertModel
from transformers.utils.import_utils import is_kernels_available
import rowmax.kernels
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
print(is_kernels_available(), rowmax.kernels.swap(BertModel(BertConfig(vocab_size=9, **sizes))))
import kernels
try:
    kernels.attention
except AttributeError as error:
    print(error)
"""
    checkout = Path(kernels.__file__).parents[1]
    if checkout.name == "rowmax":
        pytest.skip("rowmax is installed from a wheel, and there is no checkout")
    done = run("-c", script, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False BertModel: 4 of 4 sites swapped")
    assert done.stdout.endswith(
        "module 'kernels' has no attribute 'attention': import rowmax.kernels\n"
    )


def test_private_names_of_torch_stand_in_one_file() -> None:
    private = re.compile(
        r"\btorch(\.\w+)*\._[a-zA-Z]|from torch[.\w]* import (\(\s*)?_|forward_ad\._", re.MULTILINE
    )
    found = {path.name for path in ROOT.glob("kernels/**/*.py") if private.search(path.read_text())}
    assert found == {"torch_internals.py"}
