"""What the documentation shows is what the code does: snippets, signatures, commands, links."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rowmax import kernels
from rowmax.bench.cli import build_parser as bench_parser
from rowmax.kernels.backends import dispatch
from rowmax.transformer.cli import COMMANDS
from rowmax.transformer.options import parser as transformer_parser

from .processes import printed

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PARSERS = {
    "rowmax.transformer": partial(transformer_parser, COMMANDS),
    "rowmax.bench": bench_parser,
}

# a fenced block, with its language and, where a block without one follows at once, its output
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python -m (rowmax\.\w+)((?:[^\n`\\]|\\\n)*)")


SCRIPTS = ["README.md", "backends.md", "masks.md", "norms.md", "swap-examples.md", "verify.md"]


@pytest.mark.parametrize("page", SCRIPTS)
def test_snippets_print_what_the_page_shows(page: str, tmp_path: Path) -> None:
    """All Python of a page as one script in a fresh process, output compared.

    Not in the root, where `kernels/` would pass for Hugging Face's package of that name.
    """
    reason = dispatch.unavailable("native")
    if reason is not None:
        pytest.skip(f"pages show what an installation with the C++ extension prints; {reason}")
    blocks = [block for block in BLOCK.findall(PAGES_TEXT[page]) if block[0] == "python"]
    assert blocks
    script = "\n".join(code for _, code, _ in blocks)
    expected = "".join(output for _, _, output in blocks)
    assert printed("-c", script, cwd=tmp_path) == expected


def test_no_page_has_python_that_nothing_runs() -> None:
    """The contract's is run below, the migration page's by test_migration.py."""
    with_python = {page for page, text in PAGES_TEXT.items() if "```python" in text}
    assert with_python == {*SCRIPTS, "contract.md", "migration.md"}


def test_the_pictures_of_the_masks_are_what_they_draw() -> None:
    """And all are on the page; `python docs/mask_pictures.py` draws them again."""
    drawn: dict[str, str] = runpy.run_path(str(ROOT / "docs" / "mask_pictures.py"))["pictures"]()
    folder = ROOT / "docs" / "pictures" / "masks"
    assert {path.name: path.read_text("utf-8") for path in folder.iterdir()} == drawn
    shown = re.findall(r"\(pictures/masks/(\S+)\)", PAGES_TEXT["masks.md"])
    assert sorted(shown) == sorted(drawn)


def test_the_contracts_example_of_a_test_passes() -> None:
    """And its kernel is held to something: a wrong one fails."""
    (code,) = [
        code
        for language, code, _ in BLOCK.findall(PAGES_TEXT["contract.md"])
        if language == "python" and "assert_as_accurate_as_naive" in code
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    cases = names["named_cases"]("attention", torch.float32, ["causal"], quick=True)
    for case in cases:
        names["test_my_attention"](case)
    torch.manual_seed(0)
    names["test_my_attention_on_my_tensors"]()
    right = names["my_attention"]
    names["my_attention"] = lambda q, k, v, mask=None: right(q, k, v)
    with pytest.raises(AssertionError, match="largest error"):
        names["test_my_attention"](cases[0])


def test_signatures_in_the_contract() -> None:
    """`out = attention(q, k, ...)` in docs/contract.md has the names and defaults of the code."""
    calls = re.findall(
        r"^```python\nout = (\w+)\((.*?)\)\n```", PAGES_TEXT["contract.md"], re.M | re.S
    )
    assert calls
    for name, written in calls:
        parameters = inspect.signature(getattr(kernels, name)).parameters.values()
        expected = [
            parameter.name
            if parameter.default is inspect.Parameter.empty
            else f"{parameter.name}={parameter.default!r}".replace("'", '"')
            for parameter in parameters
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD  # it refuses what comes
        ]
        assert [part.strip() for part in written.split(",")] == expected


def commands() -> list[Any]:
    found = []
    for page, text in PAGES_TEXT.items():
        for module, rest in COMMAND.findall(text):
            if module in PARSERS:
                words = shlex.split(rest.replace("\\\n", " "), comments=True)
                found.append(pytest.param(module, words, id=f"{page}: {module} {' '.join(words)}"))
    return found


PAGES_TEXT = {page.name: page.read_text("utf-8") for page in PAGES}


@pytest.mark.parametrize("module,words", commands())
def test_commands_are_understood(module: str, words: list[str]) -> None:
    """Every command on a page has options that exist and values that they take."""
    parse = PARSERS[module]().parse_args
    if "--help" not in words:
        parse(words)
        return
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.slow
def test_bring_your_kernel_followed_literally(tmp_path: Path) -> None:
    """Each line of each block of commands, in order, in one empty folder."""
    blocks = [code for language, code, _ in BLOCK.findall(PAGES_TEXT["bring-your-kernel.md"])]
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 8
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        expected = 1 if line.endswith("# exit status 1") else 0
        assert done.returncode == expected, f"{line}\n{done.stdout}\n{done.stderr}"
