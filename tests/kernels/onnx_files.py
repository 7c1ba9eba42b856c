"""A module as an ONNX file, by each of torch's exporters, and what ONNX Runtime makes of it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

# how it is exported, and to which opset
EXPORTS = {"traced": (False, 17), "exported": (True, 18), "opset_23": (True, 23)}

Sizes = dict[int, str]


def export(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    dynamic: tuple[Sizes | None, ...],
    how: str,
    folder: Path,
) -> Path:
    """The file; `dynamic` names the sizes of each argument that may differ."""
    dynamo, opset = EXPORTS[how]
    path = folder / f"{how}.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it will drop and change
        if dynamo:
            dims = {name: torch.export.Dim(name, min=2, max=64) for name in _names(dynamic)}
            shapes = tuple(
                None if sizes is None else {at: dims[name] for at, name in sizes.items()}
                for sizes in dynamic
            )
            torch.onnx.export(
                *(module, arguments, path),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(shapes,),
                verbose=False,
            )
        else:
            inputs = [f"input_{number}" for number in range(len(arguments))]
            axes = {name: sizes for name, sizes in zip(inputs, dynamic, strict=True) if sizes}
            torch.onnx.export(
                *(module, arguments, str(path)),
                dynamo=False,
                opset_version=opset,
                input_names=inputs,
                dynamic_axes=axes,
            )
    return path


def operators(path: Path) -> list[str]:
    """The types of its nodes, all of them ONNX's own."""
    nodes = onnx.load(str(path)).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    return [node.op_type for node in nodes]


def run(path: Path, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = {
        # the exporter that traces drops what nobody uses; its names have the number at the end
        given.name: arguments[int(given.name.split("_")[-1]) if "input_" in given.name else at]
        for at, given in enumerate(session.get_inputs())
    }
    outputs = session.run(None, {name: value.detach().numpy() for name, value in values.items()})
    return [torch.from_numpy(output) for output in outputs]


class Call(nn.Module):
    """A function as a module; in evaluation, as what it calls is."""

    def __init__(self, function, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.modules_called = nn.ModuleList(modules)
        self.eval()

    def forward(self, *arguments: Tensor):
        return self.function(*self.modules_called, *arguments)


def _names(dynamic: tuple[Sizes | None, ...]) -> set[str]:
    return {name for sizes in dynamic if sizes is not None for name in sizes.values()}
