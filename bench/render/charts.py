"""Charts as inline SVG: a few hundred marks at most, no script, colours by the page's style.

Each is 420 units wide, so that its text can be read on a phone, and holds a <title> for every mark.
Colours are the classes s0 to s7 (series), `grid`, `mark` and `label` of `page.html`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH = 420
SERIES = 8  # colours that there are; a ninth series begins again with the first
MAX_TICKS = 7
_LEFT, _RIGHT, _TOP = 52, 12, 14
_PLOT = 230  # height of a plot with two axes
_TICK_ROOM = 44  # of a tick like 0.0001
_NAME = 28  # characters of a layer's name


class Point(NamedTuple):
    x: float
    y: float
    text: str  # what it is, shown when pointed at


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    low: float  # of the interval; value where there is none
    high: float
    text: str
    series: int = 0


@dataclass(frozen=True)
class _Scale:
    """From values to coordinates, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(x, 1e-300)) for x in (value, low, high))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            step = 10 ** math.floor(math.log10(max(self.high - self.low, 1e-300)))
            if (self.high - self.low) / step < 3:
                step /= 2
            first = math.ceil(self.low / step)
            return [at * step for at in range(first, math.floor(self.high / step) + 1)]
        decades = math.log10(self.high / self.low)
        steps: tuple[float, ...] = (1, 2, 5) if decades < 2.5 else (1,)
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = [factor * 10.0**exponent for exponent in exponents for factor in steps]
        slack = 1e-9
        return [x for x in marks if self.low * (1 - slack) <= x <= self.high * (1 + slack)]


def bars(title: str, items: Sequence[Bar], axis: str, reference: float | None = None) -> str:
    """Horizontal bars with whiskers on a logarithmic axis, a line at `reference`."""
    values = [x for bar in items for x in (bar.value, bar.low, bar.high)]
    marks = [*values, *(() if reference is None else (reference,))]
    left = _room_of(bar.label for bar in items)
    scale = _log_scale(marks, left, WIDTH - 44)
    base = scale(reference if reference is not None else scale.low)
    step = 21
    height = _TOP + step * len(items) + 34
    found = [_vertical(tick, scale, _TOP, height - 34) for tick in scale.ticks()]
    for at, bar in enumerate(items):
        y = _TOP + step * at
        end = scale(bar.value)
        found.append(
            f'<g><title>{escape(bar.text)}</title><rect class="s{bar.series % SERIES}" '
            f'x="{min(base, end):.1f}" y="{y + 3}" width="{max(1.0, abs(end - base)):.1f}" '
            f'height="{step - 8}" rx="2"/>'
            f'<path class="mark" d="M{scale(bar.low):.1f} {y + 9.5}H{scale(bar.high):.1f}"/></g>'
            + _text(left - 6, y + 13, bar.label, "end")
            + _text(max(end, base, scale(bar.high)) + 4, y + 13, f"{bar.value:.2f}")
        )
    if reference is not None:
        found.append(f'<path class="rule" d="M{base:.1f} {_TOP}V{height - 34}"/>')
    found.append(_text((left + WIDTH - 44) / 2, height - 4, axis, "middle"))
    return _svg(title, height, found)


def curves(
    title: str,
    series: Mapping[str, Sequence[Point]],
    axes: tuple[str, str],
    roof: Sequence[tuple[float, float]] = (),
    *,
    joined: bool = True,
) -> str:
    """Points on two logarithmic axes, joined or not; `roof` is a line above them."""
    points = [point for some in series.values() for point in some]
    xs = [point.x for point in points] + [x for x, _ in roof]
    ys = [point.y for point in points] + [y for _, y in roof]
    x_scale = _log_scale(xs, _LEFT, WIDTH - _RIGHT)
    y_scale = _log_scale(ys, _TOP + _PLOT, _TOP)
    # what was measured, where it is a handful of lengths, rather than round numbers beside it
    own = sorted(set(xs))
    ticks = own if joined and len(own) <= MAX_TICKS else x_scale.ticks()
    found = [_vertical(tick, x_scale, _TOP, _TOP + _PLOT) for tick in ticks]
    for tick in y_scale.ticks():
        y = y_scale(tick)
        found.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        found.append(_text(_LEFT - 5, y + 4, _number(tick), "end"))
    if roof:
        path = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in roof)
        found.append(f'<polyline class="roof" points="{path}"/>')
    for number, some in enumerate(series.values()):
        colour = f"s{number % SERIES}"
        at = [(x_scale(point.x), y_scale(point.y), point.text) for point in some]
        if joined and len(at) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
            found.append(f'<polyline class="line {colour}" points="{path}"/>')
        found += [
            f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(text)}'
            "</title></circle>"
            for x, y, text in at
        ]
    bottom = _TOP + _PLOT + 36
    found.append(_text((_LEFT + WIDTH) / 2, bottom, axes[0], "middle"))
    found.append(
        f'<text class="label" transform="translate(12 {_TOP + _PLOT / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(axes[1])}</text>'
    )
    legend, height = _legend(list(series), bottom + 10)
    return _svg(title, height, [*found, legend])


def strips(
    title: str, rows: Mapping[str, Sequence[tuple[float, int, str]]], axis: str, limit: float
) -> str:
    """A row of dots (value, series, text) for each name, on a logarithmic axis, and a limit."""
    values = [value for row in rows.values() for value, _, _ in row if value > 0]
    floor = 0.05
    left = _room_of(rows)
    scale = _log_scale([floor, limit * 2, *(max(v, floor) for v in values)], left, WIDTH - 16)
    step = 17
    height = _TOP + step * len(rows) + 34
    found = [_vertical(tick, scale, _TOP, height - 34) for tick in scale.ticks()]
    found.append(f'<path class="rule" d="M{scale(limit):.1f} {_TOP}V{height - 34}"/>')
    for at, (name, row) in enumerate(rows.items()):
        y = _TOP + step * at + 9
        found.append(_text(left - 6, y + 4, name, "end"))
        found += [
            f'<circle class="s{series % SERIES}" cx="{scale(max(value, floor)):.1f}" cy="{y}" '
            f'r="3.5" fill-opacity="0.7"><title>{escape(text)}</title></circle>'
            for value, series, text in row
        ]
    found.append(_text((left + WIDTH) / 2, height - 4, axis, "middle"))
    return _svg(title, height, found)


def ladder(
    title: str,
    series: Sequence[str],
    rungs: Mapping[str, tuple[Sequence[float], float, str]],
    axis: str,
) -> str:
    """For each name a dot of each series and a tick at the limit, on one logarithmic axis.

    rungs: the values, the limit and the text by name, from above.
    """
    found: list[str] = []
    values = [x for dots, limit, _ in rungs.values() for x in (*dots, limit)]
    left = _room_of(map(_end_of, rungs))
    floor = min(_known(values))
    scale = _log_scale(values, left, WIDTH - 16)
    step = 17
    bottom = _TOP + step * len(rungs)
    ticks = scale.ticks()
    while (scale.end - scale.start) / max(1, len(ticks)) < _TICK_ROOM and len(ticks) > 2:
        ticks = ticks[::2]
    found += [_vertical(tick, scale, _TOP, bottom) for tick in ticks]
    for at, (name, (dots, limit, text)) in enumerate(rungs.items()):
        y = _TOP + step * at + 9
        found.append(_text(left - 6, y + 4, _end_of(name), "end"))
        x = scale(max(limit, floor))
        found.append(
            f'<g><title>{escape(text)}</title><path class="rule" d="M{x:.1f} {y - 8}v16"/>'
        )
        found += [
            f'<circle class="s{number % SERIES}" cx="{scale(max(value, floor)):.1f}" cy="{y}" '
            'r="3.5" fill-opacity="0.8"/>'
            for number, value in enumerate(dots)
        ]
        found.append("</g>")
    found.append(_text((left + WIDTH) / 2, bottom + 30, axis, "middle"))
    legend, height = _legend(series, bottom + 38)
    return _svg(title, height, [*found, legend])


def _end_of(name: str) -> str:
    """A layer's name, without the beginning of a long one."""
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def columns(
    title: str, names: Sequence[str], series: Mapping[str, Sequence[float]], axis: str
) -> str:
    """Grouped columns from zero: a histogram of each series side by side, in per cent."""
    most = max((share for some in series.values() for share in some), default=1.0) or 1.0
    scale = _Scale(0.0, most, _TOP + _PLOT, _TOP, False)
    found = []
    for tick in scale.ticks():
        found.append(f'<path class="grid" d="M{_LEFT} {scale(tick):.1f}H{WIDTH - _RIGHT}"/>')
        found.append(_text(_LEFT - 5, scale(tick) + 4, f"{tick:g}%", "end"))
    room = (WIDTH - _RIGHT - _LEFT) / max(1, len(names))
    width = room * 0.8 / max(1, len(series))
    for number, (of, shares) in enumerate(series.items()):
        for at, share in enumerate(shares):
            x, y = _LEFT + room * (at + 0.1) + width * number, scale(share)
            found.append(
                f'<rect class="s{number % SERIES}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{_TOP + _PLOT - y:.1f}"><title>{escape(of)}: {share:.2g}% '
                f"{escape(names[at])}</title></rect>"
            )
    for at, name in enumerate(names):
        found.append(_text(_LEFT + room * (at + 0.5), _TOP + _PLOT + 15, name, "middle"))
    found.append(_text((_LEFT + WIDTH) / 2, _TOP + _PLOT + 34, axis, "middle"))
    legend, height = _legend(list(series), _TOP + _PLOT + 44)
    return _svg(title, height, [*found, legend])


def _room_of(names: Iterable[str]) -> float:
    """To the left of the plot, for the longest of them."""
    return 14 + 6.1 * max(map(len, names), default=1)


def _known(values: Iterable[float]) -> list[float]:
    """Those that an axis of logarithms has, or 1."""
    return [value for value in values if value > 0 and math.isfinite(value)] or [1.0]


def _log_scale(values: Iterable[float], start: float, end: float) -> _Scale:
    known = _known(values)
    low, high = min(known), max(known)
    room = max((high / low) ** 0.06, 1.15)
    return _Scale(low / room, high * room, start, end, True)


def _vertical(tick: float, scale: _Scale, top: float, bottom: float) -> str:
    x = scale(tick)
    line = f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>'
    return line + _text(x, bottom + 14, _number(tick), "middle")


def _legend(names: Sequence[str], top: float) -> tuple[str, float]:
    """The names beside their colours, and where the chart ends below them."""
    found, x, y = [], 10.0, top + 10
    for number, name in enumerate(names):
        width = 24 + 6.4 * len(name)
        if x + width > WIDTH and x > 10:
            x, y = 10.0, y + 17
        found.append(f'<circle class="s{number % SERIES}" cx="{x + 5:.1f}" cy="{y}" r="5"/>')
        found.append(_text(x + 14, y + 4, name))
        x += width
    return "".join(found), y + 10


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _number(value: float) -> str:
    if value == int(value) and value < 1e5:
        return f"{value:.0f}"
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:.2g}"


def _svg(title: str, height: float, content: Sequence[str]) -> str:
    """What each mark says when pointed at stands in a list as well, which keys open and scroll."""
    texts = re.findall("<title>(.*?)</title>", "".join(content), re.DOTALL)
    listed = "".join(f"<li>{text}</li>" for text in texts)
    values = (
        f'<details><summary>{len(texts)} values</summary><ul tabindex="0">{listed}</ul></details>'
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" '
        f'role="img" aria-label="{escape(title, quote=True)}" xmlns="http://www.w3.org/2000/svg">'
        + "".join(content)
        + f"</svg>{values if texts else ''}</figure>"
    )
