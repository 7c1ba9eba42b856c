"""What `try_wheel.py` runs in a fresh environment: only what the wheel itself requires is there.

Every function of the backend "native", forward and backward, beside the reference in float64, with
vectors of each width that the processor has; and the report of `python -m rowmax.kernels`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rowmax import kernels
from rowmax.kernels import Causal, KeyLengths, Window

TOLERANCE = {  # relative to the largest element; a few roundings of the type
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 3e-3,
}


def draw(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]]:
    """Name -> function, differentiable inputs, and options."""
    torch.manual_seed(0)
    heads = draw(2, 4, 70, 40), draw(2, 2, 133, 40), draw(2, 2, 133, 24)
    rows, parameters = draw(9, 75), (draw(75), draw(75))
    padding = {"mask": KeyLengths(torch.tensor([5, 90]))}
    mask = Causal("lower_right") & Window(90, None, "lower_right")
    dropout = {"dropout_p": 0.2, "seed": 3}
    starts = torch.tensor([0, 20, 20, 50]), torch.tensor([0, 31, 35, 80])
    packed = draw(50, 4, 16), draw(80, 2, 16), draw(80, 2, 16)
    return {
        "attention": (kernels.attention, heads, {}),
        "attention, masked": (kernels.attention, heads, {"mask": mask, **dropout}),
        "attention, padded": (kernels.attention, heads, padding),
        "attention_varlen": (
            lambda q, k, v, **options: kernels.attention_varlen(q, k, v, *starts, **options),
            packed,
            {},
        ),
        "layer_norm": (kernels.layer_norm, (rows, *parameters), {}),
        "rms_norm": (kernels.rms_norm, (rows, parameters[0]), {}),
        "add_layer_norm": (kernels.add_layer_norm, (rows, draw(9, 75), *parameters), dropout),
        "masked_softmax": (kernels.masked_softmax, (draw(2, 2, 30, 30),), {"mask": Causal()}),
    }


def results(
    function: Callable[..., Any], inputs: list[Tensor], options: dict[str, Any], backend: str
) -> list[Tensor]:
    """Outputs and gradients; of the reference in float64, from the same inputs."""
    wide = torch.float64 if backend == "reference" else inputs[0].dtype
    leaves = [tensor.detach().to(wide).requires_grad_() for tensor in inputs]
    outputs = function(*leaves, backend=backend, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    received = [
        torch.arange(y.numel()).view(y.shape).double().cos().to(inputs[0].dtype).to(wide)
        for y in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, leaves, received)]


def compare() -> None:
    for name, (function, inputs, options) in calls().items():
        for dtype, tolerance in TOLERANCE.items():
            given = [tensor.to(dtype) for tensor in inputs]
            exact = results(function, given, options, "reference")
            found = results(function, given, options, "native")
            for got, expected in zip(found, exact, strict=True):
                error = (got.double() - expected).abs().max() / expected.abs().max()
                assert error <= tolerance, f"{name}, {dtype}: {error:.1e}"


def main() -> None:
    assert "site-packages" in str(kernels.__file__) or "PYTHONPATH" in os.environ, kernels.__file__
    report = subprocess.run(
        [sys.executable, "-m", "rowmax.kernels"], check=True, capture_output=True, text=True
    ).stdout
    assert "native     works" in report, report
    assert "numba      works" in report, report
    compare()
    if "ROWMAX_VECTOR_BITS" not in os.environ:
        own = torch.ops.rowmax_native.vector_bits()
        for bits in (bits for bits in (256, 128) if bits < own):
            environment = {**os.environ, "ROWMAX_VECTOR_BITS": str(bits)}
            subprocess.run([sys.executable, __file__], check=True, env=environment)


if __name__ == "__main__":
    main()
