"""layer_norm, add_layer_norm and rms_norm against float64, forward and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax import kernels
from rowmax.kernels import add_layer_norm, layer_norm, rms_norm
from rowmax.kernels.testing.rows import RowCase, norm_equation

from .backends import BACKENDS, device_of, dtype_name
from .support import DTYPES, assert_parity

NAMES = ("layer_norm", "add_layer_norm", "rms_norm")
PAIRS = [(name, backend) for name in NAMES for backend in BACKENDS]
EVERY_NORM = pytest.mark.parametrize("name,backend", PAIRS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def called(
    name: str,
    backend: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    **options: Any,
) -> list[Tensor]:
    if name == "layer_norm":
        return [layer_norm(x, weight, bias, backend=backend, **options)]
    if name == "rms_norm":
        return [rms_norm(x, weight, backend=backend, **options)]
    return list(add_layer_norm(x, residual, weight, bias, backend=backend, **options))


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    parameters: str = "both",
    mean: float = 0.5,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(device_of(backend))

    inputs = {"x": (draw(*shape) + mean).to(dtype), "residual": draw(*shape).to(dtype)}
    if parameters in ("both", "weight"):
        inputs["weight"] = draw(shape[-1]).to(dtype)
    if parameters in ("both", "bias"):
        inputs["bias"] = draw(shape[-1]).to(dtype)
    return inputs


def positional(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    return tuple(inputs.get(key) for key in ("x", "residual", "weight", "bias"))


def for_norm(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Only the inputs that this norm takes."""
    dropped = {"layer_norm": {"residual"}, "rms_norm": {"residual", "bias"}}.get(name, set())
    return {key: value for key, value in inputs.items() if key not in dropped}


def check(name: str, backend: str, inputs: dict[str, Tensor], **options: Any) -> None:
    inputs = for_norm(name, inputs)
    x = inputs["x"]
    generator = torch.Generator().manual_seed(1)
    outputs = 2 if name == "add_layer_norm" else 1
    grads = tuple(
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for _ in range(outputs)
    )
    case = RowCase(name, inputs, grads, options=options)
    assert_parity(case.run(partial(getattr(kernels, name), backend=backend)), case)


@EVERY_NORM
@EVERY_DTYPE
@pytest.mark.parametrize("columns", [1, 2, 7, 16, 33, 512, 1000, 4096])
def test_sizes(columns: int, dtype: torch.dtype, name: str, backend: str) -> None:
    check(name, backend, make((2, 3, columns), dtype, backend))


@EVERY_NORM
@EVERY_DTYPE
@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
def test_parameters(parameters: str, dtype: torch.dtype, name: str, backend: str) -> None:
    check(name, backend, make((5, 24), dtype, backend, parameters))


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
def test_wider_parameters(dtype: torch.dtype, name: str, backend: str) -> None:
    """Half activations with float32 weights, as mixed precision has it; float32 with float64."""
    inputs = make((6, 40), dtype, backend)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    check(name, backend, inputs | {key: inputs[key].to(wider) for key in ("weight", "bias")})


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 1, 4, 7), (2000, 7)], ids=str)
def test_ranks_and_many_rows(
    shape: tuple[int, ...], dtype: torch.dtype, name: str, backend: str
) -> None:
    check(name, backend, make(shape, dtype, backend))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns_first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "strided": lambda x: x.repeat_interleave(3, dim=-1)[..., ::3],
    "sliced": lambda x: torch.cat((x, x), -1)[..., x.shape[-1] :],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@EVERY_NORM
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, name: str, backend: str) -> None:
    inputs = make((4, 5, 12), torch.float32, backend)
    moved = {key: LAYOUTS[layout](inputs[key]) for key in ("x", "residual")}
    parameters = {key: inputs[key].repeat_interleave(2)[::2] for key in ("weight", "bias")}
    check(name, backend, inputs | moved | parameters)


@EVERY_NORM
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0), (0,)], ids=str)
def test_empty(shape: tuple[int, ...], name: str, backend: str) -> None:
    inputs = make(shape, torch.float32, backend)
    check(name, backend, inputs)
    leaves = {key: value.requires_grad_() for key, value in for_norm(name, inputs).items()}
    outputs = called(name, backend, *positional(leaves))
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_a_mean_far_above_the_deviation(dtype: torch.dtype, name: str, backend: str) -> None:
    """Mean 1e4, deviation 1: E[x^2] - E[x]^2 would have no correct digit left in float32."""
    inputs = make((6, 1000), dtype, backend, mean=1e4)
    check(name, backend, inputs)
    if name == "layer_norm":
        y = layer_norm(inputs["x"], backend=backend)
        torch.testing.assert_close(
            y.var(-1, correction=0), torch.ones_like(y[:, 0]), rtol=1e-3, atol=0
        )


@EVERY_NORM
def test_constant_rows_and_eps(name: str, backend: str) -> None:
    inputs = make((3, 16), torch.float64, backend)
    inputs["x"] = torch.full_like(inputs["x"], 3.0)
    inputs["residual"] = torch.zeros_like(inputs["residual"])
    for eps in (1e-12, 0.1, 2.0):
        check(name, backend, inputs, eps=eps)


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_half_inputs_beyond_half_squares(dtype: torch.dtype, name: str, backend: str) -> None:
    """Squares that overflow float16, sums that stall in bfloat16: the statistics must be wider."""
    inputs = make((4, 2048), dtype, backend, "none", mean=300.0)
    check(name, backend, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("p", [0.1, 0.8])
def test_dropout(p: float, dtype: torch.dtype, backend: str) -> None:
    check("add_layer_norm", backend, make((3, 5, 30), dtype, backend), dropout_p=p, seed=-4)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_one_output_without_the_other(p: float, backend: str) -> None:
    """A gradient through y alone or through the sum alone; and none shared between two leaves."""
    inputs = make((4, 9), torch.float64, backend)
    keep = RowCase("add_layer_norm", inputs, (), options={"dropout_p": p, "seed": 3}).keep
    for chosen in (0, 1):
        leaves = [value.detach().requires_grad_() for value in inputs.values()]
        outputs = called("add_layer_norm", backend, *leaves, dropout_p=p, seed=3)
        outputs[chosen].square().sum().backward()
        again = [value.detach().requires_grad_() for value in inputs.values()]
        named = dict(zip(inputs, again, strict=True))
        equation = norm_equation(
            "add_layer_norm", named, keep, torch.float64, eps=1e-5, dropout_p=p
        )
        equation[chosen].square().sum().backward()
        for leaf, other in zip(leaves, again, strict=True):
            got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            wanted = torch.zeros_like(leaf) if other.grad is None else other.grad
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
        x, residual = leaves[:2]
        assert x.grad is not None
        assert residual.grad is not None
        assert x.grad.data_ptr() != residual.grad.data_ptr()
