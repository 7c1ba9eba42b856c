"""The documentation as a site: built without a warning, and every link in it leads somewhere.

Links within the site are followed, to their anchors too; of those that leave it, only the form is
looked at, for tests use no network.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from rowmax import kernels

from .processes import printed

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("mkdocs", reason='needs pip install "rowmax[site]"')
pytest.importorskip("material", reason='needs pip install "rowmax[site]"')
pytest.importorskip("mkdocstrings_handlers.python", reason='needs pip install "rowmax[site]"')


class Page(HTMLParser):
    """What a page refers to, and the places in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.ids: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value is not None:
                self.targets.add(value)
                if tag in ("script", "img", "link"):
                    self.fetched.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = ("-m", "mkdocs", "build", "--strict", "--site-dir", str(folder))
    printed(*build, cwd=ROOT, NO_MKDOCS_2_WARNING="1")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_links_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    followed = 0
    for path, page in pages.items():
        for target in page.targets:
            if path.name == "404.html":  # its links are those of a server's root
                continue
            url = urlsplit(target)
            if url.scheme:
                assert url.scheme in ("https", "mailto", "data"), f"{path.name}: {target}"
                assert url.scheme != "https" or "." in url.netloc, f"{path.name}: {target}"
                assert " " not in target, f"{path.name}: {target}"
                continue
            at = (path.parent / unquote(url.path)).resolve() if url.path else path
            at = at / "index.html" if at.is_dir() else at
            assert at.exists(), f"{path.relative_to(site)}: {target}"
            if url.fragment and at in pages:
                places = pages[at].ids
                assert unquote(url.fragment) in places, f"{path.relative_to(site)}: {target}"
            followed += 1
    assert followed > 1000


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        elsewhere = [target for target in page.fetched if urlsplit(target).netloc]
        assert not elsewhere, path.name


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    places = {place.rpartition(".")[2] for place in pages[site / "reference.html"].ids}
    assert set(kernels.__all__) <= places


@pytest.mark.slow
def test_drawn_masks_are_on_their_page(site: Path, pages: dict[Path, Page]) -> None:
    shown = {target for target in pages[site / "masks.html"].targets if "masks/" in target}
    assert len(shown) == len(list((ROOT / "docs" / "pictures" / "masks").iterdir()))
