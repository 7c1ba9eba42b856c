"""LayerNorm and RMSNorm modules on the fused kernels: torch's, and Hugging Face's RMS norms."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...api.checks import FLOAT_DTYPES
from ...api.norms import layer_norm, rms_norm
from ...ops.layout import statistics_dtype
from ...ops.tracing import untraced
from .instances import Form, Swapped, as_torch_does, has_own

# What other libraries' classes of this norm are called, and their attribute for eps.
_RMS_NAMES = ("RMSNorm", "RmsNorm", "T5LayerNorm")
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


class SwappedLayerNorm(Swapped):
    """nn.LayerNorm over one or several last dimensions.

    Under autocast, where the input's dtype is not the weight's, and where sizes don't fit, the
    original runs: torch's rules of types decide there, and its errors are the ones to see.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    normalized_shape: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is torch's)
        if not isinstance(self, Form):
            return nn.LayerNorm.forward(self, input)
        weight, bias, shape = self.weight, self.bias, self.normalized_shape
        if as_torch_does(input) or not fits(input, shape, weight, bias):
            result: Tensor = super().forward(input)
            return result
        backend, dims = self.rowmax_options.backend, len(shape)
        if dims == 1:
            return layer_norm(input, weight, bias, self.eps, backend=backend)
        rows, weight, bias = _flat(dims, input, weight, bias)
        return layer_norm(rows, weight, bias, self.eps, backend=backend).view(input.shape)


class SwappedRMSNorm(Swapped):
    """x / sqrt(mean(x^2) + eps) * weight over one or several last dimensions, as torch has it."""

    weight: Tensor | None
    eps: float | None
    normalized_shape: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, Form):
            return nn.RMSNorm.forward(self, x)
        weight, shape = self.weight, self.normalized_shape
        if as_torch_does(x) or not fits(x, shape, weight):
            result: Tensor = super().forward(x)
            return result
        eps, backend, dims = self.eps, self.rowmax_options.backend, len(shape)
        if eps is None:
            eps = _default_eps(x.dtype)
        if dims == 1:
            return rms_norm(x, weight, eps, backend=backend)
        rows, weight, _ = _flat(dims, x, weight)
        return rms_norm(rows, weight, eps, backend=backend).view(x.shape)


class SwappedNamedRMSNorm(Swapped):
    """The same of another library, over the last dimension."""

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self, Form):
            return type(self).forward(self, hidden_states)
        weight = self._factor()
        if as_torch_does(hidden_states) or not fits(hidden_states, weight.shape, weight):
            result: Tensor = super().forward(hidden_states)
            return result
        eps = _eps_of(self, hidden_states.dtype)
        return rms_norm(hidden_states, weight, eps, backend=self.rowmax_options.backend)

    def _factor(self) -> Tensor:
        return self.weight


class SwappedOffsetRMSNorm(SwappedNamedRMSNorm):
    """The same with 1 + weight, as Gemma has it."""

    def _factor(self) -> Tensor:
        return 1.0 + self.weight


NORMS = (SwappedLayerNorm, SwappedRMSNorm, SwappedNamedRMSNorm)


def fits(x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether `x` ends in `shape`, and the parameters have it as theirs, all of one dtype."""
    return untraced(_fits, x, shape, *parameters)


def _fits(x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> bool:
    own = x.shape[-len(shape) :]
    if not shape or own != tuple(shape):
        return False
    for parameter in parameters:
        if parameter is not None and (parameter.dtype != x.dtype or parameter.shape != own):
            return False
    return True


def _flat(
    dims: int, x: Tensor, weight: Tensor | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The last `dims` dimensions as one."""
    weight, bias = (None if each is None else each.flatten() for each in (weight, bias))
    return x.flatten(-dims), weight, bias


def recognise(module: nn.Module) -> tuple[type[Swapped] | None, str] | None:
    """The form for a norm and what it will do, or None and why not; None for other modules."""
    if isinstance(module, nn.LayerNorm):
        own = has_own(module, nn.LayerNorm, "forward")
        return (None, own) if own else _check(module, SwappedLayerNorm, "layer_norm")
    if isinstance(module, nn.RMSNorm):
        own = has_own(module, nn.RMSNorm, "forward")
        return (None, own) if own else _check(module, SwappedRMSNorm, "rms_norm")
    if type(module).__name__.endswith(_RMS_NAMES):
        form, why = _try_out(module)
        return (None, why) if form is None else _check(module, form, why)
    return None


def _check(module: nn.Module, form: type[Swapped], does: str) -> tuple[type[Swapped] | None, str]:
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in FLOAT_DTYPES:
            return None, f"its {parameter.dtype} weight has no kernel"
    return form, does


def _eps_of(module: nn.Module, dtype: torch.dtype) -> float:
    for name in _EPS_NAMES:
        eps = getattr(module, name, None)
        if eps is not None:
            return float(eps)
    return _default_eps(dtype)


def _default_eps(dtype: torch.dtype) -> float:
    """What nn.RMSNorm takes for eps=None."""
    return torch.finfo(statistics_dtype(dtype)).eps


def _try_out(module: nn.Module) -> tuple[type[Swapped] | None, str]:
    """The form that gives what `module` gives on a few rows of all magnitudes.

    Classes of this name differ (weight or 1 + weight, gates, other places for eps), so what they
    compute is compared, not what they are called.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype not in FLOAT_DTYPES:
        return None, "it has no float weight of one dimension"
    if "forward" in module.__dict__:
        return None, "its forward was replaced on the instance"
    if len(inspect.signature(module.forward).parameters) != 1:
        return None, "its forward takes more than one argument"
    if weight.is_meta:
        return None, "it is on the meta device"
    if not any(hasattr(module, name) for name in _EPS_NAMES):
        return None, f"its eps is not found ({', '.join(_EPS_NAMES)})"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, weight.shape[0], generator=generator)
    rows = (rows * torch.tensor([[30.0], [1.0], [1e-2], [1e-3]])).to(weight.device, weight.dtype)
    with torch.no_grad():
        got = module.forward(rows)
        exact, wide = rows.double(), weight.double()
        mean_square = exact.square().mean(-1, keepdim=True)
        normed = exact * torch.rsqrt(mean_square + _eps_of(module, weight.dtype))
        tolerance = 8 * torch.finfo(weight.dtype).eps
        for form, factor, does in (
            (SwappedNamedRMSNorm, wide, "rms_norm"),
            (SwappedOffsetRMSNorm, 1.0 + wide, "rms_norm with 1 + weight"),
        ):
            expected = normed * factor
            if got.shape == expected.shape and torch.allclose(
                got.double(), expected, rtol=tolerance, atol=tolerance * float(factor.abs().max())
            ):
                return form, does
    return None, "it computes something else than x / sqrt(mean(x^2) + eps) * weight"
