"""The comparison of the architectures as a table, a plot and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"transformer": "#1f6fb2", "lstm": "#e0863a", "gru": "#3f9d5c", "rnn": "#8a67c2"}


def _spread(runs: Sequence[Mapping[str, float]], name: str, digits: int) -> str:
    values = [run[name] for run in runs]
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def table(result: Mapping[str, Any]) -> str:
    """Means over the seeds, with the least and the most in brackets."""
    machine = result["machine"]
    loads = [_loads(machine["load_average"]), _loads(result["load_average_after"])]
    lines = [
        f"{machine['cpu']}, {machine['instruction_set']}, {machine['torch_threads']} threads",
        f"{result['started']}; backend {result['backend']}; load average {' then '.join(loads)}",
        ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
    ]
    for corpus in result["corpora"]:
        lines += _quality(corpus, result["seeds"])
    sequential = result["sequential"]
    for mode, target in (("training", "is known"), ("translating", "is written token by token")):
        title = f"layers one after the other where the target of length L {target}"
        rows = {arch: [f"{at[mode]:,}" for at in steps] for arch, steps in sequential.items()}
        lines += _against_length(title, result["lengths"], rows)
    title = (
        f"ms for a training step, forward and backward, of {result['step_tokens']:,} tokens a side"
    )
    rows = {arch: [f"{time:.1f}" for time in times] for arch, times in result["step_ms"].items()}
    lines += _against_length(title, result["lengths"], rows)
    return "\n".join([*lines, "", f"all of it took {result['minutes']:.1f} minutes"])


def _quality(corpus: Mapping[str, Any], seeds: int) -> list[str]:
    steps, tokens = corpus["steps"], corpus["batch_tokens"]
    lines = [
        "",
        f"{corpus['name']}: {steps:,} steps of at most {tokens:,} tokens a side",
        f"{seeds} seeds: mean (least-most); greedy, {corpus['test_sentences']:,} test sentences",
    ]
    header = f"{'':<12}{'weights':>10}{'width':>6}{'rate':>6}"
    lines.append(header + f"{'exact match %':>19}{'BLEU':>21}{'tokens/s':>24}")
    for arch, model in corpus["models"].items():
        runs = model["runs"]
        lines.append(
            f"{arch:<12}{model['parameters']:>10,}{model['d_model']:>6}{model['learning_rate']:>6g}"
            f"{_spread(runs, 'exact_match', 1):>19}{_spread(runs, 'bleu', 2):>21}"
            f"{_spread(runs, 'tokens_per_second', 0):>24}"
        )
    return lines


def _against_length(
    title: str, lengths: Sequence[int], rows: Mapping[str, Sequence[str]]
) -> list[str]:
    header = f"{'':<12}" + "".join(f"{f'L={length}':>9}" for length in lengths)
    body = [f"{arch:<12}" + "".join(f"{cell:>9}" for cell in row) for arch, row in rows.items()]
    return ["", title, header, *body]


def _loads(loads: Sequence[float] | None) -> str:
    return "unknown" if loads is None else " ".join(f"{load:.2f}" for load in loads)


def write(result: Mapping[str, Any], text: str, folder: Path) -> None:
    """comparison.json, .txt, .png and .svg."""
    content = json.dumps(result, indent=1) + "\n"
    (folder / "comparison.json").write_text(content, encoding="utf-8")
    (folder / "comparison.txt").write_text(text + "\n", encoding="utf-8")
    _plot(result, folder)


def _plot(result: Mapping[str, Any], folder: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    corpora = result["corpora"]
    panels = 2 * len(corpora) + 1
    figure = Figure(figsize=(3.2 * panels + 0.8, 3.6), layout="constrained", facecolor="white")
    axes = iter(figure.subplots(1, panels))
    for corpus in corpora:
        names = list(corpus["models"])
        for name, title in (("bleu", "BLEU"), ("tokens_per_second", "training tokens/s")):
            axis = next(axes)
            for place, arch in enumerate(names):
                values = [run[name] for run in corpus["models"][arch]["runs"]]
                axis.bar(place, statistics.mean(values), color=_COLOURS[arch], alpha=0.55)
                axis.scatter([place] * len(values), values, color=_COLOURS[arch], s=14, zorder=3)
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axis.set_title(f"{corpus['name']}: {title}", size=10)
    axis = next(axes)
    for arch, times in result["step_ms"].items():
        axis.plot(result["lengths"], times, "o-", color=_COLOURS[arch], label=arch)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_xticks(result["lengths"], [str(length) for length in result["lengths"]])
    axis.set_xlabel("length L of the sentences")
    axis.set_title(f"ms a step, {result['step_tokens']:,} tokens a side", size=10)
    axis.legend(frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rowmax"}):
        for suffix in ("png", "svg"):
            metadata = {"Date": None} if suffix == "svg" else {}
            figure.savefig(folder / f"comparison.{suffix}", dpi=144, metadata=metadata)
