"""The results of `speed` as one self-contained HTML page; made from the JSON's document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from ..measure.cases import IN_SHORT
from ..peers.candidates import ROWMAX
from .charts import Bar, Point, bars, curves
from .document import Section, page

MAX_BARS = 16  # of a chart


def html(results: Mapping[str, Any]) -> str:
    return page("rowmax speed", _sections(results))


def _sections(results: Mapping[str, Any]) -> Iterator[Section]:
    machine, rows = results["machine"], results["rows"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    gpu = f"; {machine['gpu']['name']}" if "gpu" in machine else ""
    hardware = f"{machine['cpu']}, {machine['instruction_set']}, {machine['torch_threads']} threads"
    software = f"Python {machine['python']}, {packages}; {results['settings']['started']}"
    yield Section(text=f"{hardware}{gpu}; {software}", style="soft")
    for complaint in results["noise"]["complaints"]:
        yield Section(text=f"✗ noisy: {complaint}", style="bad")
    yield Section(
        text="The ratio is the fastest peer's time over rowmax's, medians of calls timed in turns "
        "in one run: right of the dashed line rowmax is faster. The lines across the bars are 95% "
        "intervals; where those of both times overlap, neither is faster: level."
    )
    yield Section("Ratio to the fastest peer", figures=list(_ratio_charts(rows)))
    length_charts = list(_length_charts(rows))
    if length_charts:
        yield Section("Time against length", figures=length_charts)
    roofs = list(_rooflines(results))
    if roofs:
        yield Section(
            "Roofline",
            "Operations a second against operations for each byte that must be moved. The line is "
            "the limit measured in the same run: the rate of a large copy, then of arithmetic. "
            "What fits the caches may lie above its slope.",
            figures=roofs,
        )
    yield _table(rows)


def _label(row: Mapping[str, Any]) -> str:
    return f"({','.join(map(str, row['shape']))}) {IN_SHORT.get(row['pass'], row['pass'])}"


def _ratio_charts(rows: list[dict[str, Any]]) -> Iterator[str]:
    for (suite, dtype, kind), group in groupby(
        rows, key=lambda row: (row["suite"], row["dtype"], row["kind"])
    ):
        items = [
            Bar(
                _label(row),
                row["ratio"],
                row["ratio_interval"][0],
                row["ratio_interval"][1],
                text=f"{row['ratio']:.2f} times as fast as {row['fastest_peer']}, 95% interval "
                f"{row['ratio_interval'][0]:.2f} to {row['ratio_interval'][1]:.2f}"
                + (", level" if row["level"] else ""),
                series=7 if row["level"] else 0 if row["ratio"] > 1 else 1,
            )
            for row in group
            if row["ratio"] is not None
        ]
        for start in range(0, len(items), MAX_BARS):
            some = items[start : start + MAX_BARS]
            axis = "fastest peer / rowmax (grey: level)"
            yield bars(f"{kind}, {dtype}, {suite}", some, axis, reference=1.0)


def _length_charts(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Of attention: a chart for the shapes that differ in their lengths, by the length of keys."""
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["suite"].endswith("attention"):
            key = (row["suite"], row["dtype"], row["kind"], row["pass"], row["shape"][-1])
            families.setdefault(key, []).append(row)
    for (_, dtype, kind, step, size), family in families.items():
        if len({tuple(row["shape"]) for row in family}) < 2:
            continue
        series: dict[str, list[Point]] = {}
        for row in sorted(family, key=lambda row: int(row["shape"][-2])):
            for name, timing in row["seconds"].items():
                milliseconds = 1e3 * timing["median"]
                text = f"{name} {_label(row)}: {milliseconds:.4g} ms"
                series.setdefault(name, []).append(Point(row["shape"][-2], milliseconds, text))
        title = f"{kind}, {dtype}, {IN_SHORT.get(step, step)}, head size {size}"
        yield curves(title, series, ("length (batch and heads as in the table)", "ms"))


def _rooflines(results: Mapping[str, Any]) -> Iterator[str]:
    limits = results["limits"]
    on_gpu = limits.get("gpu")
    for suite, group in groupby(results["rows"], key=lambda row: row["suite"]):
        if suite.startswith("gpu") and on_gpu is not None:
            peak, copy = on_gpu["matrix_flops_per_s"], on_gpu["copy_bytes_per_s"]
        elif "float32_fma_flops_per_s" in limits:
            peak, copy = limits["float32_fma_flops_per_s"], limits["large_copy_bytes_per_s"]
        else:
            continue
        series: dict[str, list[Point]] = {}
        for row in group:
            timing = row["seconds"].get(ROWMAX)
            if timing is None or not row["flops"] or not row["bytes_to_move"]:
                continue
            rate, intensity = row["flops"] / timing["median"], row["flops"] / row["bytes_to_move"]
            text = f"{row['kind']} {_label(row)} {row['dtype']}: {rate / 1e9:.1f} GFLOP/s"
            series.setdefault(row["kind"], []).append(Point(intensity, rate, text))
        if series:
            xs = [point.x for some in series.values() for point in some]
            ridge = peak / copy
            low, high = min(*xs, ridge) / 2, max(*xs, ridge) * 2
            roof = [(low, low * copy), (ridge, peak), (high, peak)]
            axes = ("operations a byte", "operations a second")
            yield curves(f"{ROWMAX}, {suite}", series, axes, roof, joined=False)


def _table(rows: list[dict[str, Any]]) -> Section:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    head = ["case", *(f"{name}, ms" for name in names), "ratio", "95%", "GFLOP/s", "GB/s"]
    head += ["of limit", "peak MiB", "first call, s"]
    cells = []
    for row in rows:
        timing = row["seconds"].get(ROWMAX)
        interval = row["ratio_interval"]
        cells.append(
            [
                f"{row['kind']} {_label(row)} {row['dtype']}",
                *(_milliseconds(row["seconds"].get(name)) for name in names),
                "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
                "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
                _rate(row["flops"], timing),
                _rate(row["bytes_to_move"], timing),
                "-" if row["share_of_limit"] is None else f"{100 * row['share_of_limit']:.0f}%",
                _mebibytes(timing),
                "-" if timing is None else f"{timing['first_call']:.2g}",
            ]
        )
    return Section("All lines", head=head, rows=cells)


def _milliseconds(timing: Mapping[str, Any] | None) -> str:
    return "-" if timing is None else f"{1e3 * timing['median']:.4g}"


def _rate(work: int | None, timing: Mapping[str, Any] | None) -> str:
    return "-" if work is None or timing is None else f"{work / timing['median'] / 1e9:.3g}"


def _mebibytes(timing: Mapping[str, Any] | None) -> str:
    if timing is None or timing["peak_memory_bytes"] is None:
        return "-"
    return f"{timing['peak_memory_bytes'] / 2**20:.1f}"
