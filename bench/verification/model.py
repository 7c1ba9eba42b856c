"""`verify --model`: whether a whole model gives the same bits again, on other numbers of threads,
and for a batch element alone; and the first layer that does not.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.api.checks import fail_type, fail_value
from ...kernels.integrations.differences import call_of
from ..machine.host import describe
from ..options import told
from ..render.json_text import json_text
from .bits import on_threads, same

SCHEMA = "rowmax-verify-model-1"
THREADS = (1, 2, 3)
WIDTH = 100
AGAIN = "the same call again"
ON_THREADS = f"{', '.join(map(str, THREADS[:-1]))} and {THREADS[-1]} threads"
ALONE = "alone as in a batch"
NOT_PROMISED = {"rowmax": (), "torch": (AGAIN, ON_THREADS, ALONE)}

Tensors = dict[str, Tensor]  # by the layer's name, in the order in which they were computed


@dataclass(frozen=True)
class LayerCheck:
    """One check of one pass: of `compared` layers, those whose bits differ, the first one first."""

    check: str
    step: str  # "forward" or "backward"
    compared: int
    differing: tuple[str, ...] = ()
    share: float = 0.0  # of the first one's elements that differ
    apart: float = 0.0  # by how much at most
    relative: float = 0.0  # of the largest value
    error: str | None = None  # the call raised it

    @property
    def passed(self) -> bool:
        return not self.differing and self.error is None

    @property
    def text(self) -> str:
        if self.error is not None:
            return self.error
        if self.passed:
            return f"same bits in {self.compared} layers"
        return (
            f"{len(self.differing)} of {self.compared} layers differ, the first "
            f"{self.differing[0] or '(the model)'}: {100 * self.share:.2g}% of the elements, by up "
            f"to {self.apart:.1e}, {self.relative:.1e} of the largest value"
        )


@dataclass(frozen=True)
class ModelReport:
    """What `verify_model` found; `print` shows it."""

    name: str
    batch: int | None
    contract: str
    checks: tuple[LayerCheck, ...]
    machine: dict[str, Any]

    @property
    def passed(self) -> bool:
        allowed = NOT_PROMISED[self.contract]
        return all(one.passed or one.check in allowed for one in self.checks)

    def as_json(self) -> str:
        document = {"schema": SCHEMA, **asdict(self), "passed": self.passed}
        return json_text(document)

    def __str__(self) -> str:
        machine = self.machine
        batch = "no batch" if self.batch is None else f"a batch of {self.batch}"
        found = [f"{self.name}, {batch}; {machine['cpu']}, torch {machine['packages']['torch']}"]
        for one in self.checks:
            unkept = not one.passed and one.check in NOT_PROMISED[self.contract]
            mark = "ok" if one.passed else "n.p." if unkept else "FAIL"
            found += textwrap.wrap(
                f"{mark:<5}{one.check}, {one.step}: {one.text}",
                WIDTH,
                initial_indent=" ",
                subsequent_indent=" " * 6,
            )
        return "\n".join([*found, "passed" if self.passed else "FAILED"])


def verify_model(
    model: nn.Module, inputs: Any, *, backward: bool = True, contract: str = "rowmax"
) -> ModelReport:
    """Runs `model` on `inputs` again, on other numbers of threads, and each of the first and last
    batch element alone, and compares the bits of every layer's output and of its gradient.

    Args:
        model: it runs in evaluation mode, and is as before at the end.
        inputs: of one call: a tensor, a tuple (positional) or a dict (keyword arguments); the first
            dimension of the first tensor is the batch.
        backward: gradients too, of the sum of the output times random weights.
        contract: "rowmax" promises all of it, "torch" none: what differs is told, and no failure.

    Raises:
        TypeError: `model` is no module. ValueError: an unknown contract.
    """
    if not isinstance(model, nn.Module):
        fail_type("verify_model", "model", type(model).__name__, "a torch.nn.Module")
    if contract not in NOT_PROMISED:
        fail_value("verify_model", "contract", repr(contract), f"one of {', '.join(NOT_PROMISED)}")
    args, kwargs = call_of(inputs)
    batch = next((t.shape[0] for t in tensors_of((args, kwargs)) if t.dim() > 0), None)
    training = model.training
    model.eval()
    try:
        together = run_layers(model, args, kwargs, backward)
        checks = [*_compare(AGAIN, lambda: run_layers(model, args, kwargs, backward), together)]
        with on_threads(THREADS[0]):
            single = run_layers(model, args, kwargs, backward)
        found: list[LayerCheck] = []
        for threads in THREADS[1:]:
            with on_threads(threads):
                found += _compare(
                    ON_THREADS, lambda: run_layers(model, args, kwargs, backward), single
                )
        checks += _worst(found)
        if batch is not None and batch > 1:
            found = []
            for element in (0, batch - 1):

                def alone(element: int = element) -> dict[str, Tensors]:
                    cut = partial(_of_element, element=element, batch=batch)
                    one = map_tensors((args, kwargs), cut)
                    return run_layers(model, one[0], one[1], backward, element, batch)

                parts: dict[str, Tensors] = {}
                for step, of in together.items():
                    cut = {name: _slice(tensor, element, batch) for name, tensor in of.items()}
                    parts[step] = {name: part for name, part in cut.items() if part is not None}
                found += _compare(ALONE, alone, parts)
            checks += _worst(found)
    finally:
        model.train(training)
    return ModelReport(type(model).__name__, batch, contract, tuple(checks), describe())


def _compare(
    check: str, run: Callable[[], dict[str, Tensors]], expected: dict[str, Tensors]
) -> Iterator[LayerCheck]:
    try:
        got = run()
    except Exception as error:
        yield LayerCheck(check, "forward", 0, error=told(error))
        return
    for step, tensors in expected.items():
        common = [
            (name, got[step][name], tensor)
            for name, tensor in tensors.items()
            if name in got[step] and got[step][name].shape == tensor.shape
        ]
        differing = [one for one in common if not bool(same(one[1], one[2]).all())]
        if not differing:
            yield LayerCheck(check, step, len(common))
            continue
        _, one, other = differing[0]
        apart = float((one.double() - other.double()).abs().nan_to_num(torch.inf).max())
        largest = float(other.double().abs().nan_to_num(0.0).max()) or 1.0
        share = float((one != other).double().mean())
        names = tuple(name for name, _, _ in differing)
        yield LayerCheck(check, step, len(common), names, share, apart, apart / largest)


def _worst(found: list[LayerCheck]) -> list[LayerCheck]:
    """Of several runs of a check, for each pass the one in which most layers differ."""
    steps = dict.fromkeys(one.step for one in found)
    found = sorted(found, key=lambda one: (one.error is None, -len(one.differing)))
    return [next(one for one in found if one.step == step) for step in steps]


def run_layers(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    backward: bool,
    element: int = 0,
    batch: int = 1,
    only: Collection[str] | None = None,
    real: Tensor | None = None,
) -> dict[str, Tensors]:
    """Each layer's output, and with `backward` its gradient, the last layer's first.

    The output's weights in the sum that is derived are those of `element` in a batch of `batch`,
    the same numbers in every dtype. only: the names of the layers, all when None. real: bool
    (B, L), the tokens that count in the sum.
    """
    outputs: Tensors = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            floats = (t for t in tensors_of(output) if t.is_floating_point() and t.dim() > 0)
            tensor = next(floats, None)
            if tensor is None:
                return
            label, number = name, 1
            while label in outputs:  # a module that is called more than once
                number += 1
                label = f"{name} ({number})"
            if tensor.requires_grad:
                tensor.retain_grad()
            outputs[label] = tensor

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if only is None or name in only
    ]
    try:
        with torch.set_grad_enabled(backward):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensors] = {"forward": {n: t.detach().clone() for n, t in outputs.items()}}
    final = outputs.get("")
    if backward and final is not None and final.requires_grad:
        size = (final.shape[0] * batch, *final.shape[1:])
        generator = torch.Generator().manual_seed(0)
        weights = torch.randint(-8, 9, size, generator=generator) / 4
        rows = final.shape[0]
        part = weights[element * rows : (element + 1) * rows].to(final)
        if real is not None and real.shape == final.shape[:2]:
            part = part * real.view(*real.shape, *(1,) * (final.dim() - 2)).to(part)
        (final * part).sum().backward()
        found["backward"] = {
            name: tensor.grad.clone()
            for name, tensor in reversed(outputs.items())
            if tensor.grad is not None
        }
        model.zero_grad(set_to_none=True)
    return found


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def _of_element(tensor: Tensor, element: int, batch: int) -> Tensor:
    whole = tensor.dim() > 0 and tensor.shape[0] == batch
    return tensor[element : element + 1] if whole else tensor


def _slice(tensor: Tensor, element: int, batch: int) -> Tensor | None:
    """What is one batch element's of a layer's output: (B, ...), (L, B, ...) or (B * L, ...)."""
    if tensor.shape[0] == batch:
        return tensor[element : element + 1]
    if tensor.dim() > 1 and tensor.shape[1] == batch:
        return tensor[:, element : element + 1]
    if tensor.shape[0] % batch == 0:
        rows = tensor.shape[0] // batch
        return tensor[element * rows : (element + 1) * rows]
    return None
