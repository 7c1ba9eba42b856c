"""Swapped norm modules against their own forward: torch's, and RMS norms of other libraries."""

from __future__ import annotations

import re
from collections.abc import Callable

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
    "RMSNorm over two dimensions": lambda: nn.RMSNorm((5, 24)),
    "RMSNorm over three": lambda: nn.RMSNorm((4, 5, 24), eps=1e-4),
    "RMSNorm over two, without weight": lambda: nn.RMSNorm((5, 24), elementwise_affine=False),
    "RMSNorm with eps": lambda: nn.RMSNorm(24, eps=1e-3),
    "RMSNorm without weight": lambda: nn.RMSNorm(24, elementwise_affine=False),
    "Llama": lambda: LlamaRMSNorm(24),
    "Gemma": lambda: GemmaRMSNorm(24),
}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(4, 5, 24),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_like_its_own_forward(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all layouts of the input, and by the kernels."""
    torch.manual_seed(0)
    module = nn.Sequential(MODULES[name]()).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for layout in LAYOUTS.values():
        x = layout((1e-2 * torch.randn(4, 5, 24)).to(dtype))  # so small that eps matters
        x.requires_grad_()

        def call(own: nn.Module, x: Tensor = x) -> Tensor:
            return own(x)

        expected = results(module, call)
        with swapped(module) as report, monkeypatch.context() as patch:
            assert len(report.swapped) == 1
            for kind in (nn.LayerNorm, nn.RMSNorm):
                patch.setattr(kind, "forward", refuse)
            assert_same(results(module, call), expected, roundings=8)


def refuse(*_: object) -> None:
    raise AssertionError("the original ran")


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), (x, *module.parameters()))]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_gradients_over_several_dimensions(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = norm((2, 4), dtype=torch.float64)
    for shape in ((3, 2, 4), (2, 4), (0, 2, 4), (5, 3, 2, 4)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = gradients(module, x)
        with swapped(module):
            got = gradients(module, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def resized(module: nn.Module, name: str, *shape: int) -> nn.Module:
    setattr(module, name, nn.Parameter(torch.ones(shape)))
    return module


def reshaped(module: nn.Module, *shape: int) -> nn.Module:
    module.normalized_shape = shape  # type: ignore[assignment]
    return module


MISFITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(8), (3, 7)),
    "LayerNorm without weight": (lambda: nn.LayerNorm(8, elementwise_affine=False), (3, 7)),
    "LayerNorm of two dimensions": (
        lambda: nn.LayerNorm((2, 4), elementwise_affine=False),
        (3, 4, 2),
    ),
    "one dimension for two": (lambda: nn.LayerNorm((2, 4), elementwise_affine=False), (8,)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (3, 7)),
    "RMSNorm without weight": (lambda: nn.RMSNorm(8, elementwise_affine=False), (3, 7)),
    "RMSNorm of two dimensions": (lambda: nn.RMSNorm((2, 4), elementwise_affine=False), (8, 4)),
    "another weight": (lambda: resized(nn.LayerNorm(8), "weight", 7), (3, 7)),
    "weight of as many elements": (lambda: resized(nn.LayerNorm((2, 4)), "weight", 8), (3, 2, 4)),
    "another bias": (lambda: resized(nn.LayerNorm(8), "bias", 1), (3, 8)),
    "another weight of RMSNorm": (lambda: resized(nn.RMSNorm(8), "weight", 4), (3, 8)),
    "another shape since": (lambda: reshaped(nn.LayerNorm(8), 7), (3, 8)),
    "Llama": (lambda: LlamaRMSNorm(8), (3, 7)),
    "Gemma": (lambda: GemmaRMSNorm(8), (3, 7)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_sizes_that_do_not_fit_raise_as_in_torch(name: str) -> None:
    make, shape = MISFITS[name]
    module, x = make(), torch.randn(shape)
    with pytest.raises(RuntimeError) as error:
        module(x)
    swap(module)
    with pytest.raises(RuntimeError, match=re.escape(str(error.value))):
        module(x)


def test_an_input_that_the_original_broadcasts() -> None:
    module, x = LlamaRMSNorm(8), torch.randn(3, 1)
    expected = module(x)
    swap(module)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("norm,name", [(nn.LayerNorm, "input"), (nn.RMSNorm, "x")])
def test_the_input_by_its_name(norm: type[nn.Module], name: str) -> None:
    module, x = norm(8), torch.randn(3, 8)
    expected = module(**{name: x})
    swap(module)
    torch.testing.assert_close(module(**{name: x}), expected)


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
