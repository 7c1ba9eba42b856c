"""A self-contained HTML page: no script, no outside request, light and dark, phone and print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...console import from_extra


class Section(NamedTuple):
    """Each part that is not empty, in this order."""

    heading: str = ""
    text: str = ""
    style: str = ""  # of the text: soft, good or bad
    figures: Sequence[str] = ()  # SVG, see charts.py
    head: Sequence[
        str
    ] = ()  # of a table; a cell that begins with a check mark or cross is coloured
    rows: Sequence[Sequence[str]] = ()


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
