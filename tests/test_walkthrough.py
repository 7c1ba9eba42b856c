"""docs/walkthrough.md: its script runs and prints what the page shows; its links hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .processes import printed

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "walkthrough.md").read_text("utf-8")
# [`code`](file): a line of the file holds the code. Numbers of lines would be others tomorrow.
LINKS = re.findall(r"\[`([^`]+)`\]\((\.\./[^)]+\.py)\)", PAGE)


def test_the_script_prints_what_the_page_shows():
    """Which also holds every step's formula against the model, or the script fails."""
    found = printed(str(DOCS / "walkthrough.py"), "--backend", "reference")
    shown = re.search(r"^python docs/walkthrough.py\n```\n\n```\n(.*?)^```$", PAGE, re.M | re.S)
    assert shown is not None
    assert found == shown[1]


def test_there_is_a_line_of_code_for_each_step():
    assert len(LINKS) >= 16


@pytest.mark.parametrize("code,file", LINKS)
def test_linked_files_do_what_is_said(code, file):
    assert code in (DOCS / file).read_text("utf-8"), f"{file} has no {code!r}"
