"""LayerNorm and RMSNorm modules on the fused kernels: torch's, and Hugging Face's RMS norms."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..checks import FLOAT_DTYPES
from ..functional import layer_norm, rms_norm
from ..layout import statistics_dtype
from .instances import Swapped, as_torch_does, has_own

# What other libraries' classes of this norm are called, and their attribute for eps.
_RMS_NAMES = ("RMSNorm", "RmsNorm", "T5LayerNorm")
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


class SwappedLayerNorm(Swapped):
    """nn.LayerNorm over one or several last dimensions.

    Under autocast, and where the input's dtype is not the weight's, the original runs: torch's
    rules of types decide there.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    normalized_shape: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is torch's)
        if as_torch_does(input) or not _same_dtype(input, self.weight, self.bias):
            result: Tensor = super().forward(input)
            return result
        backend, dims = self.rowmax_options.backend, len(self.normalized_shape)
        if dims == 1:
            return layer_norm(input, self.weight, self.bias, self.eps, backend=backend)
        rows = input.flatten(-dims)
        weight, bias = (
            None if tensor is None else tensor.flatten() for tensor in (self.weight, self.bias)
        )
        return layer_norm(rows, weight, bias, self.eps, backend=backend).view(input.shape)


class SwappedRMSNorm(Swapped):
    """x / sqrt(mean(x^2) + eps) * weight, of torch or of another library."""

    weight: Tensor | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self._factor()
        if as_torch_does(hidden_states) or not _same_dtype(hidden_states, weight):
            result: Tensor = super().forward(hidden_states)
            return result
        return rms_norm(
            hidden_states,
            weight,
            _eps_of(self, hidden_states.dtype),
            backend=self.rowmax_options.backend,
        )

    def _factor(self) -> Tensor | None:
        return getattr(self, "weight", None)


class SwappedOffsetRMSNorm(SwappedRMSNorm):
    """The same with 1 + weight, as Gemma has it."""

    def _factor(self) -> Tensor | None:
        assert self.weight is not None
        return 1.0 + self.weight


def recognise(module: nn.Module) -> tuple[type[Swapped] | None, str] | None:
    """The form for a norm and what it will do, or None and why not; None for other modules."""
    if isinstance(module, nn.LayerNorm):
        own = has_own(module, nn.LayerNorm, "forward")
        return (None, own) if own else _check(module, SwappedLayerNorm, "layer_norm")
    if isinstance(module, nn.RMSNorm):
        own = has_own(module, nn.RMSNorm, "forward")
        if own is None and len(module.normalized_shape) > 1:
            own = "it normalises over several dimensions"
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


def _same_dtype(x: Tensor, *parameters: Tensor | None) -> bool:
    return all(parameter is None or parameter.dtype == x.dtype for parameter in parameters)


def _eps_of(module: nn.Module, dtype: torch.dtype) -> float:
    for name in _EPS_NAMES:
        eps = getattr(module, name, None)
        if eps is not None:
            return float(eps)
    return torch.finfo(statistics_dtype(dtype)).eps  # what nn.RMSNorm takes for eps=None


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
            (SwappedRMSNorm, wide, "rms_norm"),
            (SwappedOffsetRMSNorm, 1.0 + wide, "rms_norm with 1 + weight"),
        ):
            expected = normed * factor
            if got.shape == expected.shape and torch.allclose(
                got.double(), expected, rtol=tolerance, atol=tolerance * float(factor.abs().max())
            ):
                return form, does
    return None, "it computes something else than x / sqrt(mean(x^2) + eps) * weight"
