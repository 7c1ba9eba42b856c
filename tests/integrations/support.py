"""What the tests of the swap share: calls with gradients, and how far results may differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def results(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The output of `call`, and the gradients of all parameters for a random gradient of it."""
    model.zero_grad(set_to_none=True)
    out = call(model)
    generator = torch.Generator().manual_seed(11)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return {"the output": out.detach()} | found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], roundings: float = 64) -> None:
    """Equal but for `roundings` of the dtype, in units of the largest value of its kind.

    A gradient that is zero but for rounding, as a key's bias has, is measured by the others.
    """
    assert got.keys() == expected.keys()
    gradients = [tensor.abs().max() for name, tensor in expected.items() if name != "the output"]
    largest = torch.stack(gradients).max() if gradients else torch.tensor(0.0)
    for name, tensor in expected.items():
        size = tensor.abs().max() if name == "the output" else largest
        error = (got[name] - tensor).abs().max()
        limit = roundings * torch.finfo(tensor.dtype).eps * size
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"
