"""Swapped norm modules against their own forward: torch's, and RMS norms of other libraries."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from rowmax.kernels import swap, swapped

from .support import assert_same, results


class LlamaRMSNorm(nn.Module):
    """As in Llama and T5."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        wide = hidden_states.to(torch.promote_types(dtype, torch.float32))
        mean = wide.pow(2).mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(mean + self.variance_epsilon)).to(dtype)


class GemmaRMSNorm(nn.Module):
    """1 + weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(size))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * (1.0 + self.weight)


class ClampedRMSNorm(LlamaRMSNorm):
    """eps where it is not expected: only small inputs tell the difference."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean.clamp(min=self.variance_epsilon))


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x * gate)


MODULES = {
    "LayerNorm": lambda: nn.LayerNorm(24),
    "no bias": lambda: nn.LayerNorm(24, bias=False),
    "no parameters": lambda: nn.LayerNorm(24, elementwise_affine=False),
    "two dimensions": lambda: nn.LayerNorm((5, 24)),
    "RMSNorm": lambda: nn.RMSNorm(24),
    "RMSNorm with eps": lambda: nn.RMSNorm(24, eps=1e-3),
    "RMSNorm without weight": lambda: nn.RMSNorm(24, elementwise_affine=False),
    "Llama": lambda: LlamaRMSNorm(24),
    "Gemma": lambda: GemmaRMSNorm(24),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_like_its_own_forward(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(MODULES[name]()).to(dtype)
    x = (1e-2 * torch.randn(4, 5, 24)).to(dtype).requires_grad_()  # so small that eps matters
    expected = results(module, lambda own: own(x))
    with swapped(module) as report:
        assert len(report.swapped) == 1
        assert_same(results(module, lambda own: own(x)), expected, roundings=8)


def test_the_input_has_a_gradient() -> None:
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    module = LlamaRMSNorm(24).double()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    swap(module)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("norm", [LlamaRMSNorm, nn.LayerNorm, nn.RMSNorm])
def test_mixed_dtypes_are_the_originals_business(norm: type[nn.Module]) -> None:
    module, x = norm(24), torch.randn(3, 24, dtype=torch.float64)
    try:
        expected = module(x)
    except RuntimeError as error:
        swap(module)
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            module(x)
        return
    swap(module)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("norm", [ClampedRMSNorm, GatedRMSNorm])
def test_what_only_bears_the_name_is_left(norm: type[nn.Module]) -> None:
    model = nn.Sequential(norm(24), nn.LayerNorm(24))
    report = swap(model)
    assert [site.name for site in report.left] == ["0"]
    assert type(model[0]) is norm
