"""A self-contained HTML page: no script, no outside request, light and dark, phone and print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...console import from_extra

_OF_NUMBERS = ("", *"0123456789.-+<>~=")  # what a cell of a number begins with


class Section(NamedTuple):
    """Each part that is not empty, in this order."""

    heading: str = ""
    text: str = ""
    style: str = ""  # of the text: soft, good or bad
    figures: Sequence[str] = ()  # SVG, see charts.py
    head: Sequence[str] = ()  # of a table; a cell that begins with ✓ or ✗ is coloured
    rows: Sequence[Sequence[str]] = ()

    def text_columns(self) -> frozenset[int]:
        """The columns that hold words, not numbers alone: these begin at the left."""
        return frozenset(
            at for row in self.rows for at, cell in enumerate(row) if cell[:1] not in _OF_NUMBERS
        )


def page(title: str, sections: Iterable[Section], *, refresh: int | None = None) -> str:
    """The page of these sections, by the template `page.html`; it loads itself again after
    `refresh` seconds.
    """
    with from_extra("bench"):
        import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        title=title, sections=list(sections), refresh=refresh
    )
