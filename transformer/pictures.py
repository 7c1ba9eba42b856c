"""Heat maps of attention and of the positional encoding, as PNG or SVG, by matplotlib."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..console import from_extra
from .attend import KINDS, AttendError, Attention
from .model import sinusoids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_FONT = "DejaVu Sans"  # comes with matplotlib
# A weight of zero is a light tint; what the mask forbids is left empty.
_COLOURS = ("#e9eef6", "#9ec1e4", "#3b7dbd", "#123a6b")
_INK, _FAINT = "#1b1f24", "#6a737d"
_PER_ROW = 4


def require_matplotlib() -> None:
    """MissingExtraError where matplotlib is not installed."""
    with from_extra("pictures"):
        import matplotlib  # noqa: F401


def heat_maps(
    attention: Attention, kind: str, layer: int, head: int | None, suffix: str, font: Path | None
) -> bytes:
    """One head, or all heads of a layer as small multiples (``head`` None)."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    queries, keys = attention.tokens(kind)
    weights = attention.weights[kind][layer - 1].float().numpy()
    heads = range(len(weights)) if head is None else [head - 1]
    columns = min(len(heads), _PER_ROW)
    rows = math.ceil(len(heads) / columns)
    families = _families(
        "".join((*queries, *keys, attention.sentence, attention.translation)), font
    )
    size = 11.0 if len(heads) == 1 else 8.0
    # Inches: a cell's side by the font, room for the longest label, and for the titles above.
    cell = size * 1.55 / 72
    wide = max(len(keys) * cell, 1.2) + _longest(queries) * size * 0.62 / 72 + 0.45
    high = max(len(queries) * cell, 1.2) + _longest(keys) * size * 0.62 / 72 + 0.55
    titles = [
        f"{KINDS[kind].capitalize()}, layer {layer} of {len(attention.weights[kind])}",
        attention.sentence,
        f"→ {attention.translation}",
    ]
    title_size = 11.0
    width = max(columns * wide, max(map(_width, titles)) * title_size * 0.62 / 72 + 0.6, 4.5)
    above = 0.95
    height = rows * high + above + 0.75
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - above / height))  # type: ignore[union-attr, call-arg]
    for line, (text, colour) in enumerate(zip(titles, (_FAINT, _INK, _INK), strict=True)):
        figure.text(
            0.25 / width,
            1 - (0.12 + 0.27 * line) / height,
            _plain(text),
            va="top",
            size=title_size,
            color=colour,
            family=families,
        )
    colours = LinearSegmentedColormap.from_list("weights", _COLOURS).with_extremes(bad="white")
    image: Any = None
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(heads):
            axis.set_axis_off()
            continue
        shown = np.array(weights[heads[place]])
        if kind == "decoder":
            shown[np.triu_indices_from(shown, 1)] = np.nan  # forbidden, not merely small
        image = axis.imshow(shown, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(len(keys)), [_plain(k) for k in keys], rotation=90)
        axis.set_yticks(range(len(queries)), [_plain(q) for q in queries])
        axis.xaxis.tick_top()
        axis.tick_params(length=0, labelsize=size, colors=_INK)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_family(families)
        axis.set_xlabel(f"head {heads[place] + 1}", size=size, color=_FAINT)
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(
        image, ax=axes, location="bottom", shrink=min(1.0, 3 / width), aspect=30, pad=0.02
    )
    bar.set_label("weight; each row sums to 1", size=size, color=_FAINT)
    bar.ax.tick_params(labelsize=size, colors=_FAINT)
    return _saved(figure, suffix)


def positions(length: int, d_model: int, suffix: str) -> bytes:
    """The sinusoidal encoding, a row a position, a column a dimension."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axis = figure.subplots()
    values: Tensor = sinusoids(length, d_model)
    image = axis.imshow(
        values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    axis.set_title("Positional encoding: sine in even dimensions, cosine in odd ones", size=11)
    axis.set_xlabel("dimension")
    axis.set_ylabel("position")
    figure.colorbar(image, ax=axis).set_label("added to the embedding")
    return _saved(figure, suffix)


def _saved(figure: Figure, suffix: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # Outlines instead of fonts: an SVG looks the same where the font is missing. Neither date
    # nor random ids: the same picture is the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rowmax"}):
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(buffer, format=suffix[1:], dpi=144, metadata=metadata)
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _width(text: str) -> float:
    """In Latin letters; Hangul and Chinese characters are twice as wide as most of those."""
    return sum(1.7 if ord(character) >= 0x1100 else 1.0 for character in text)


def _longest(tokens: list[str]) -> float:
    return max(map(_width, tokens))


def _families(text: str, font: Path | None) -> list[str]:
    """Font families that together draw this text; AttendError where some character has none."""
    from matplotlib import font_manager

    families = [_FONT]
    missing = _needed(text) - _drawn_by(font_manager.findfont(_FONT))
    if font is not None:
        try:
            font_manager.fontManager.addfont(font)
            name = font_manager.FontProperties(fname=font).get_name()
            missing -= _drawn_by(str(font))
        except (OSError, RuntimeError) as error:
            raise AttendError(f"--font {font}: can't be used: {error}") from error
        families.insert(0, name)
    elif missing:
        # The font that draws most of it; of equals the first by name, a regular one.
        fonts = sorted(
            (
                each
                for each in font_manager.fontManager.ttflist
                # "Last Resort" draws each character as a box that names its script.
                if each.style == "normal" and "lastresort" not in each.name.replace(" ", "").lower()
            ),
            key=lambda each: (str(each.weight) not in ("400", "normal", "regular"), each.name),
        )
        while missing and fonts:
            best = max(fonts, key=lambda each: len(missing & _drawn_by(each.fname)))
            if not missing & _drawn_by(best.fname):
                break
            missing -= _drawn_by(best.fname)
            families.append(best.name)
    if missing:
        some = "".join(map(chr, sorted(missing)))
        raise AttendError(
            f"no font found here draws {some[:20]}: install one (Debian has fonts-nanum for "
            "Korean, fonts-noto-cjk for Chinese and Japanese as well), name one by --font FILE, "
            "or ask for a page, --out FILE.html"
        )
    return families


def _needed(text: str) -> set[int]:
    return {ord(character) for character in text if not character.isspace()}


@functools.cache
def _drawn_by(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # listed, but gone or not readable
        return frozenset()
