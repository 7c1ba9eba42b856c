"""The pages of `speed` and `verify`: sound as they stand, and in a real browser."""

from __future__ import annotations

import copy
import itertools
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowmax.bench import cli, diverge, verify
from rowmax.bench.render import charts, speed_page
from rowmax.bench.render.charts import Bar, Point
from rowmax.bench.verification import command

from .results import document

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    report = verify(
        backends=["reference"],
        kinds=["causal", "weight"],
        dtypes=["float32"],
        quick=True,
        ops=["attention", "layer_norm"],
        checks=["oracle", "accuracy", "invariants"],
    )
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3, enable_nested_tensor=False
    )
    parted = diverge(model, copy.deepcopy(model).bfloat16(), torch.randn(2, 5, 16))
    noisy = document(complaints=("the load average was 9.0",))
    return {
        "speed": speed_page.html(noisy),
        "empty": speed_page.html({**noisy, "rows": []}),
        "verify": report.as_html(),
        "diverge": parted.as_html(),
    }


class Reader(HTMLParser):
    """Elements that are opened and closed in order, and all that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        assert tag not in ("script", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ["speed", "empty", "verify", "diverge"])
def test_a_page_is_whole_and_asks_for_nothing(name: str, pages: dict[str, str]) -> None:
    page = pages[name]
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    inside = [link for link in reader.fetched if link.startswith("#")]
    assert [link for link in reader.fetched if link not in inside] == ["data:,"]
    for link in inside:
        assert f'id="{link[1:]}"' in page
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page
    for figure in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(figure)
    assert "NaN" not in re.sub(r"<td.*?</td>", "", page)


@pytest.mark.parametrize("name", ["speed", "verify", "diverge"])
def test_a_page_needs_no_mouse(name: str, pages: dict[str, str]) -> None:
    """What is shown when a mark is pointed at stands in a list, and what scrolls has the focus."""
    page = pages[name]
    for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL):
        marks = re.findall(r"<title>(.*?)</title>", figure, re.DOTALL)
        assert marks
        assert f"<summary>{len(marks)} values</summary>" in figure
        assert re.findall(r"<li>(.*?)</li>", figure, re.DOTALL) == marks
    wide = re.findall(r'<div class="wide"([^>]*)>', page)
    assert wide
    assert all('tabindex="0" role="region" aria-label="' in attributes for attributes in wide)
    assert ":focus-visible" in page
    assert ("<nav" in page) == (page.count("<h2") > 2)


def test_verify_writes_its_page_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "page.html", []

    class Module:
        @staticmethod
        def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
            if path.exists() and path.stat().st_size:
                seen.append(path.read_text("utf-8"))
            return F.rms_norm(x, x.shape[-1:], weight, eps)

    monkeypatch.setattr(command, "EVERY", 0.0)
    monkeypatch.setitem(sys.modules, "as_it_goes", Module)
    chosen = ["--check", "accuracy", "--dtype", "float32", "--quick", "--contract", "torch"]
    arguments = ["verify", "--function", "as_it_goes:rms_norm", *chosen, "--html", str(path)]
    assert cli.main(arguments) == 0
    assert seen
    assert re.search(r"still running, \d+ of \d+ checks, at as_it_goes:rms_norm, float32", seen[-1])
    assert 'http-equiv="refresh"' in seen[-1]
    assert "✓ passed" not in seen[-1]
    final = path.read_text("utf-8")
    assert "✓ passed" in final
    assert "still running" not in final
    assert "refresh" not in final


def test_what_the_speed_page_shows(pages: dict[str, str]) -> None:
    page = pages["speed"]
    assert "Some CPU &lt;of ours&gt;" in page
    assert "noisy: the load average was 9.0" in page
    assert page.count('<rect class="s0"') == 2  # faster
    assert page.count('<rect class="s7"') == 1  # level
    assert page.count('<rect class="s1"') == 1  # slower
    assert page.count('<polyline class="line') == 3  # one length chart, three candidates
    assert page.count('<polyline class="roof"') == 2
    assert "Roofline" in page


def test_what_the_verify_page_shows(pages: dict[str, str]) -> None:
    page = pages["verify"]
    for text in ("attention: error / allowed", "rows sum to 1", "mpmath", "ulp, up to"):
        assert text in page
    # a dot for each case
    assert page.count("<circle") > 8


def test_bars_lie_in_the_order_of_their_values() -> None:
    items = [Bar(f"b{value}", value, value, value, "text") for value in (0.5, 1.0, 2.0, 8.0)]
    figure = charts.bars("title", items, "axis", reference=1.0)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', figure)]
    assert widths[3] == pytest.approx(3 * widths[2], rel=0.01)  # logarithms: 8 = 2 ** 3
    assert widths[0] == pytest.approx(widths[2], rel=0.01)


def test_the_ticks_of_a_ladder_have_room_and_long_names_their_end() -> None:
    name = "model.layers.11.post_attention_layernorm"
    rungs = {name: ((1e-7, 0.2), 1e-6, "text"), "b": ((1e-6, 0.1), 1e-6, "more")}
    figure = charts.ladder("title", ("one", "two"), rungs, "axis")
    assert f">…{name[-27:]}<" in figure
    at = [float(x) for x in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle"', figure)]
    ticks = at[:-1]  # the last is the axis
    assert len(ticks) > 1
    assert min(b - a for a, b in itertools.pairwise(ticks)) >= 40


def test_curves_are_straight_for_powers() -> None:
    points = [Point(x, x**2, "p") for x in (1.0, 10.0, 100.0)]
    figure = charts.curves("title", {"a": points}, ("x", "y"))
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', figure)[:3]
    (x0, y0), (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y in found)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("name", ["speed", "verify", "diverge"])
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(name: str, width: int, pages: dict[str, str], tmp_path: Path) -> None:
    """It renders, logs no error, asks nobody for anything, and is no wider than its window."""
    path = tmp_path / f"{name}.html"
    probe = (
        "<script>document.title=document.documentElement.scrollWidth+' '+innerWidth+' '"
        "+performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length"
        "+' '+[...document.querySelectorAll('svg')].map(s=>s.getBoundingClientRect().width)"
        ".filter(w=>w<200||w>640).length</script>"
    )
    path.write_text(pages[name].replace("</body>", probe + "</body>"), "utf-8")
    shot = tmp_path / "page.png"
    done = _browse(path, width, ["--dump-dom", "--enable-logging=stderr", "--log-level=0"])
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr  # what a page logs, errors among it
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", done.stdout)
    assert title is not None
    scrolled, inner, requests, odd = map(int, title.groups())
    assert scrolled <= inner
    assert requests == 0
    assert odd == 0  # neither too small to be read, nor, where it stands alone, blown up
    _browse(path, width, [f"--screenshot={shot}"])
    assert shot.stat().st_size > 10_000


def _browse(path: Path, width: int, options: list[str]) -> Any:
    return subprocess.run(
        [
            *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},1600"),
            *(*options, path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
