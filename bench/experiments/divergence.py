"""`python -m rowmax.bench diverge`: where two models of equal structure part, layer by layer.

Both run on the same inputs, and so does the first one in float64, the truth. A layer of the second
model may be as far from the truth as the rule of rowmax.kernels.testing allows, its naive path
being the first model, in the dtype of the second.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import swap
from ...kernels.api.checks import fail_type, fail_value
from ...kernels.integrations.differences import call_of, real_tokens
from ...kernels.testing.tolerance import CHANCES, expected_of_model, measure, perturbed
from ..candidate.sources import callable_of, module_of
from ..options import UsageError, check_outputs, set_threads, write
from ..render import charts
from ..render.document import Section, page
from ..render.json_text import json_text
from ..verification.model import map_tensors, run_layers

SCHEMA = "rowmax-diverge-1"
STEPS = ("forward", "backward")
SHOWN = 60  # layers of a chart; the first that is beyond its allowance is among them


@dataclass(frozen=True)
class Layer:
    """One layer's output, or the gradient of it, as shares of the largest value of the truth."""

    name: str
    step: str  # of STEPS
    first: float  # error of the first model
    second: float
    allowed: float  # of the second
    fault: str | None

    @property
    def title(self) -> str:
        return self.name or "(the model)"


@dataclass(frozen=True)
class Divergence:
    """What `diverge` found, in the order of computation; `print` shows it."""

    names: tuple[str, str]
    layers: tuple[Layer, ...]

    @property
    def passed(self) -> bool:
        return all(layer.fault is None for layer in self.layers)

    def first_beyond(self, step: str) -> Layer | None:
        """The first layer, as the pass computes them, that is further off than it may be."""
        of_step = (layer for layer in self.layers if layer.step == step)
        return next((layer for layer in of_step if layer.fault is not None), None)

    def verdict(self, step: str) -> str:
        number = sum(layer.step == step for layer in self.layers)
        found = self.first_beyond(step)
        if found is None:
            return f"{step}: none of {number} layers is beyond what is allowed"
        return (
            f"{step}: the first layer beyond what is allowed is {found.title}: error "
            f"{found.second:.1e}, allowed {found.allowed:.1e}"
        )

    def as_json(self) -> str:
        document = {"schema": SCHEMA, "passed": self.passed, **asdict(self)}
        return json_text(document)

    def as_html(self) -> str:
        return page(f"{self.names[0]} and {self.names[1]}: where they part", self._sections())

    def __str__(self) -> str:
        width = max(len(layer.title) for layer in self.layers) + 2
        found = []
        for step in STEPS:
            heads = f"{self.names[0]:>14.14}{self.names[1]:>14.14}{'allowed':>10}"
            found.append(f"{step + ': error':<{width}}{heads}")
            for layer in self.layers:
                if layer.step == step:
                    numbers = f"{layer.first:>14.1e}{layer.second:>14.1e}{layer.allowed:>10.1e}"
                    mark = "" if layer.fault is None else "  BEYOND"
                    found.append(f" {layer.title:<{width - 1}}{numbers}{mark}")
        return "\n".join([*found, *map(self.verdict, STEPS)])

    def _sections(self) -> list[Section]:
        found = []
        for step in STEPS:
            mark, style = ("✓", "good") if self.first_beyond(step) is None else ("✗", "bad")
            found.append(Section(text=f"{mark} {self.verdict(step)}", style=style))
        found.append(
            Section(
                text="Errors against the first model in float64, as shares of the largest value of "
                "the layer. The dashed tick is what the second model is allowed: twice the error "
                "of the first in its dtype, and rounding. Layers stand in the order in which the "
                "pass computes them."
            )
        )
        for step in STEPS:
            of_step = [layer for layer in self.layers if layer.step == step]
            if not of_step:
                continue
            beyond = self.first_beyond(step)
            start = max(0, of_step.index(beyond) - SHOWN // 2) if beyond is not None else 0
            rungs = {
                layer.title: ((layer.first, layer.second), layer.allowed, _told(layer, self.names))
                for layer in of_step[start : start + SHOWN]
            }
            title = "outputs" if step == "forward" else "gradients of the outputs"
            chart = charts.ladder(title, self.names, rungs, "error / largest value")
            found.append(
                Section(
                    step,
                    figures=[chart],
                    head=["layer", *self.names, "allowed", ""],
                    rows=[
                        [
                            layer.title,
                            *(f"{x:.1e}" for x in (layer.first, layer.second, layer.allowed)),
                            "✓" if layer.fault is None else f"✗ {layer.fault}",
                        ]
                        for layer in of_step
                    ],
                )
            )
        return found


def diverge(
    model: nn.Module,
    other: nn.Module,
    inputs: Any,
    *,
    real: Tensor | None = None,
    every_layer: bool = False,
    names: tuple[str, str] = ("first", "second"),
) -> Divergence:
    """Runs both models and compares every layer that both have, forward and backward.

    Args:
        model, other: with the same names of layers: one and its swapped copy, float32 and bfloat16.
            Copies run, in evaluation mode.
        inputs: of one call: a tensor, a tuple (positional) or a dict (keyword arguments); floats
            are given to each model in its own dtype.
        real: bool (B, L), True for the tokens that count; by default the 2-D `attention_mask` of a
            dict, or the inverse of its `src_key_padding_mask`.
        every_layer: all modules, however deep; by default the members of the outermost lists of
            layers, for a swapped norm that is looked at is not fused with what precedes it.

    Gradients jump where a ReLU's input is 0: what fails is run again, up to three times, with the
    weights that both have moved by a few roundings, and the best run counts.

    Raises:
        TypeError: no modules. ValueError: they have no layer in common.
    """
    for argument, value in (("model", model), ("other", other)):
        if not isinstance(value, nn.Module):
            fail_type("diverge", argument, type(value).__name__, "a torch.nn.Module")
    args, kwargs = call_of(inputs)
    counts = real_tokens(kwargs) if real is None else real
    first, second = copy.deepcopy(model).eval(), copy.deepcopy(other).eval()
    known = dict(first.named_modules()).keys() & dict(second.named_modules()).keys()
    only = known if every_layer else {"", *(name for name in _members(first) if name in known)}

    def run(one: nn.Module, wanted: torch.dtype) -> dict[str, dict[str, Tensor]]:
        given_args, given_kwargs = map_tensors(
            (args, kwargs), lambda one: one.to(wanted) if one.is_floating_point() else one
        )
        return run_layers(one, given_args, given_kwargs, True, only=only, real=counts)

    def layers() -> list[Layer]:
        given, dtype = _dtype(first), _dtype(second)
        exact = run(copy.deepcopy(first).double(), torch.float64)
        found, of_second = run(first, given), run(second, dtype)
        naive = found if dtype == given else run(copy.deepcopy(first).to(dtype), dtype)
        return list(_layers(exact, (found, naive, of_second), counts))

    found = [layers()]
    if not found[0]:
        fail_value("diverge", "other", "a model without a layer in common", "an equal structure")
    generator = torch.Generator().manual_seed(0)
    while len(found) <= CHANCES and any(layer.fault for layer in min(found, key=_worst)):
        _move_weights(first, second, generator)
        found.append(layers())
    return Divergence(names, tuple(min(found, key=_worst)))


def _layers(
    exact: dict[str, dict[str, Tensor]],
    others: tuple[dict[str, dict[str, Tensor]], ...],
    counts: Tensor | None,
) -> Iterator[Layer]:
    for step in STEPS:
        for name, wide in exact.get(step, {}).items():
            tensors = [wide]
            tensors += [
                one[step][name]
                for one in others
                if name in one.get(step, {}) and one[step][name].shape == wide.shape
            ]
            if len(tensors) == 1 + len(others):
                yield _layer(name, step, *(_counted(tensor, counts) for tensor in tensors))


def _worst(layers: Iterable[Layer]) -> float:
    """The largest share of what is allowed; NaN is more than any."""
    shares = [layer.second / layer.allowed if layer.allowed else 0.0 for layer in layers]
    return max((share if share == share else math.inf for share in shares), default=0.0)


def _move_weights(first: nn.Module, second: nn.Module, generator: torch.Generator) -> None:
    """By a few roundings, where both have the same: see `perturbed`."""
    of_second = dict(second.named_parameters())
    with torch.no_grad():
        for name, weight in first.named_parameters():
            if not weight.is_floating_point():
                continue
            other = of_second.get(name)
            same = other is not None and torch.equal(other, weight.to(other))
            weight.copy_(perturbed(weight, generator))
            if other is not None and same:
                other.copy_(weight)


def _layer(name: str, step: str, wide: Tensor, one: Tensor, naive: Tensor, other: Tensor) -> Layer:
    judged = wide.isfinite() | ~other.isfinite()  # where float64 gives NaN, nothing can be judged
    wide, one, naive, other = (tensor[judged] for tensor in (wide, one, naive, other))
    size = float(wide.abs().nan_to_num(0.0).max()) if wide.numel() else 0.0
    sum_dtype = torch.promote_types(other.dtype, torch.float32)
    held_to = expected_of_model(wide, naive.to(other.dtype), size or None)
    found = measure(name, other, held_to, sum_dtype)
    size = size or 1.0
    error = float((one.double() - wide).abs().nan_to_num(torch.inf).max()) if wide.numel() else 0.0
    return Layer(name, step, error / size, found.largest / size, found.limit / size, found.fault)


def _told(layer: Layer, names: tuple[str, str]) -> str:
    errors = f"{names[0]} {layer.first:.1e}, {names[1]} {layer.second:.1e}"
    return f"{layer.title}: {errors}, allowed {layer.allowed:.1e}"


def _dtype(model: nn.Module) -> torch.dtype:
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _counted(tensor: Tensor, counts: Tensor | None) -> Tensor:
    """The tokens that count, of a tensor (B, L, ...)."""
    same = counts is not None and tensor.dim() > 2 and tensor.shape[:2] == counts.shape
    return tensor[counts] if same else tensor


def _members(model: nn.Module) -> list[str]:
    """The members of the outermost lists of layers; all layers where there is none."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside:
            found += [f"{name}.{index}".lstrip(".") for index in range(len(module))]
    return found or [name for name, _ in model.named_modules()]


# --- the command ----------------------------------------------------------------------------------


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--models",
        metavar="WHERE",
        required=True,
        help="a function without arguments, of a module or a file, that returns two models and "
        "their inputs; or one and its inputs, which is compared with a swapped copy of it",
    )
    command.add_argument(
        "--import", dest="imports", metavar="MODULE", action="append", default=[], help="first"
    )
    command.add_argument("--every-layer", action="store_true", help="all modules, however deep")
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument("--json", metavar="FILE", type=Path, help="write everything found")
    command.add_argument("--html", metavar="FILE", type=Path, help="write a page with charts")


def run(options: argparse.Namespace) -> int:
    set_threads(options.threads)
    check_outputs({"--json": options.json, "--html": options.html})
    for module in options.imports:
        module_of("--import", module)
    made = callable_of("--models", options.models)()
    models = list(made[:-1]) if isinstance(made, tuple) else []
    if len(models) not in (1, 2) or not all(isinstance(one, nn.Module) for one in models):
        expected = "(model, other, inputs) or (model, inputs)"
        raise UsageError(f"--models: expected {expected} of {options.models}")
    names = "original", "swapped"
    if len(models) == 2:
        names = _names(*models)
    else:
        models.append(copy.deepcopy(models[0]))
        swap(models[1])
    one, other = models
    report = diverge(one, other, made[-1], every_layer=options.every_layer, names=names)
    print(report)
    write(options.json, report.as_json)
    write(options.html, report.as_html)
    return 0 if report.passed else 1


def _names(model: nn.Module, other: nn.Module) -> tuple[str, str]:
    one, two = (str(_dtype(each)).removeprefix("torch.") for each in (model, other))
    return (one, two) if one != two else ("first", "second")
