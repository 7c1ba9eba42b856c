"""Layer norm, RMS norm and the Transformer's add-and-norm: arguments checked, one op called."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..ops import operators
from ..ops.problem import AddLayerNormProblem, LayerNormProblem, RMSNormProblem
from ..ops.torch_internals import any_autocast_enabled
from ..ops.tracing import same_sizes
from .checks import (
    autocasts,
    fail_type,
    fail_value,
    require_device,
    require_float,
    require_like,
    require_number,
    require_probability,
    seed_tensor,
    shape_text,
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al. 2016, equation 4).

    Args:
        x: (..., N) float, any strides. weight, bias: (N,) or None.
        eps: added to the (biased) variance.

    Returns:
        (..., N) in x's dtype; statistics in float32 or wider.
    """
    found = operators.fast_path_norm(x, None, weight, bias, eps, backend, subtract_mean=True)
    if found is not None:
        return found[0]
    eps = _check_norm("layer_norm", x, eps, weight=weight, bias=bias)
    problem = LayerNormProblem(x, weight, bias, eps)
    return operators.layer_norm(problem, dispatch.check_name("layer_norm", backend))


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The Transformer's "Add & Normalize" in one pass: layer norm of residual + dropout(x).

    Args:
        x: (..., N), the sub-layer's output. residual: same shape, dtype and device; under
            torch.autocast, where a sub-layer's output may be narrower, both take the wider dtype.
        weight, bias: (N,) or None. eps: added to the variance.
        dropout_p, seed: as in `attention`; Philox of (seed, row, column).

    Returns:
        (normalised, sum), both (..., N) in x's dtype, sum = residual + dropout(x).
    """
    if type(dropout_p) is float and dropout_p == 0.0 and seed is None and residual is not None:
        found = operators.fast_path_norm(
            x, residual, weight, bias, eps, backend, subtract_mean=True
        )
        if found is not None:
            return found
    if any_autocast_enabled():
        require_float("add_layer_norm", "x", x)
        require_float("add_layer_norm", "residual", residual)
        if autocasts(x.device.type):
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    eps = _check_norm("add_layer_norm", x, eps, weight=weight, bias=bias)
    require_float("add_layer_norm", "residual", residual)
    require_like("add_layer_norm", "residual", residual, "x", x)
    if not same_sizes(residual.shape, x.shape):
        got, wanted = shape_text(residual.shape), shape_text(x.shape)
        fail_value("add_layer_norm", "residual", f"shape {got}", f"{wanted}, the shape of `x`")
    dropout_p = require_probability("add_layer_norm", "dropout_p", dropout_p)
    drawn = seed_tensor("add_layer_norm", seed, dropout_p, "x", x)
    problem = AddLayerNormProblem(x, residual, weight, bias, eps, dropout_p, drawn)
    return operators.add_layer_norm(problem, dispatch.check_name("add_layer_norm", backend))


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang & Sennrich 2019, equation 4).

    Args:
        x: (..., N) float, any strides. weight: (N,) or None. eps: added to the mean square.

    Returns:
        (..., N) in x's dtype; the mean square in float32 or wider.
    """
    found = operators.fast_path_norm(x, None, weight, None, eps, backend, subtract_mean=False)
    if found is not None:
        return found[0]
    eps = _check_norm("rms_norm", x, eps, weight=weight)
    problem = RMSNormProblem(x, weight, eps)
    return operators.rms_norm(problem, dispatch.check_name("rms_norm", backend))


def _check_norm(function: str, x: Tensor, eps: float, **parameters: Tensor | None) -> float:
    """eps as a float, all arguments checked."""
    require_float(function, "x", x)
    if x.dim() == 0:
        fail_value(function, "x", "a 0-d tensor", "shape (..., N)")
    eps = require_number(function, "eps", eps)
    if eps < 0:
        fail_value(function, "eps", eps, "a finite number >= 0")
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if isinstance(parameter, int | tuple | list):
            fix = f"leave the shape out: {function} always normalises the last dimension"
            fail_type(function, name, repr(parameter), "a torch.Tensor, or None", fix)
        require_float(function, name, parameter)
        require_device(function, name, parameter, "x", x)
        if not same_sizes(parameter.shape, x.shape[-1:]):
            got, expected = f"shape {shape_text(parameter.shape)}", f"(N,) = ({x.shape[-1]},)"
            fix = f"pass {name}.flatten()" if parameter.numel() == x.shape[-1] else ""
            fail_value(function, name, got, expected, fix)
    return eps
