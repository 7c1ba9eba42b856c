"""A hook of mkdocs: pages that lie outside docs/, and the sources that pages link to.

GitHub shows README.md, CONTRIBUTING.md and links such as `../kernels/api/masks.py` as they are. The
site has no such files: here the former become pages, and of each linked source a page is made.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# page -> the file that it is
GUESTS = {
    "index.md": ROOT / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "examples.md": ROOT / "examples" / "README.md",
}
PACKAGES = ("kernels", "transformer", "bench")
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """The packages under their import names, through links, as `make lint` has them for mypy."""
    links = ROOT / "build" / "typing" / "rowmax"
    links.mkdir(parents=True, exist_ok=True)
    for source in (*(ROOT / name for name in PACKAGES), *(ROOT / "package").glob("*.py")):
        link = links / source.name
        if not link.exists():
            link.symlink_to(os.path.relpath(source, links))
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the guests, and a page for each source that any page links to."""
    texts = {file.src_uri: Path(file.abs_src_path) for file in files.documentation_pages()} | GUESTS
    for name, path in GUESTS.items():
        content = rewritten(path.read_text("utf-8"), path.parent)
        files.append(File.generated(config, name, content=content))
    linked = {
        outside(path.parent, target)
        for path in texts.values()
        for target, _ in LINK.findall(path.read_text("utf-8"))
    }
    for source in filter(None, linked):
        files.append(File.generated(config, page_of(source), content=listing(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page's links to sources lead to the pages made of them."""
    return markdown if page.file.src_uri in GUESTS else rewritten(markdown, DOCS)


def rewritten(text: str, folder: Path) -> str:
    """`text`, which lies in `folder`, with links as a page in docs/ has them."""

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        source = outside(folder, target)
        if source is not None:
            return f"]({page_of(source)}{anchor})"
        at = (folder / target).resolve()
        guest = {path: name for name, path in GUESTS.items()}.get(at)
        if guest is None and not at.exists():
            return found[0]
        return f"]({guest or os.path.relpath(at, DOCS)}{anchor})"

    return LINK.sub(link, text)


def outside(folder: Path, target: str) -> Path | None:
    """The file or folder of the repository that a link leads to, if it has no page yet."""
    at = (folder / target).resolve()
    is_own = at in GUESTS.values() or DOCS in at.parents
    return None if is_own or "://" in target or not at.exists() else at


def page_of(source: Path) -> str:
    return f"source/{source.relative_to(ROOT).as_posix()}.md"


def listing(source: Path) -> str:
    """A source as a page; of a folder the names in it."""
    title = f"# {source.relative_to(ROOT).as_posix()}\n\n"
    if source.is_dir():
        return title + "\n".join(f"- `{path.name}`" for path in sorted(source.iterdir()))
    language = {".py": "python", ".ipynb": "json", ".sh": "bash"}.get(source.suffix, "text")
    return f"{title}``` {{.{language}}}\n{source.read_text('utf-8')}\n```\n"
