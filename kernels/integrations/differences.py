"""How far the runs of a swapped model and of its original are from each other and from float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARAMETER = "gradient of the parameter"

# Outputs and gradients by the layer's name, and what they are.
Run = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class LayerDifference:
    """One layer's output and its gradient, as shares of the largest value that float64 gives.

    difference: swapped against original; error_original, error_swapped: each against float64.
    unjudged: the share of the values of which float64 gives NaN or infinity, but the swapped model
    none; they count in no other number. agrees: whether the swapped model is as close to float64 as
    the tolerance of rowmax.kernels.testing asks, its naive path being the original; allowed is that
    of the largest error.
    """

    name: str
    what: str
    difference: float
    error_original: float
    error_swapped: float
    allowed: float
    agrees: bool
    unjudged: float = 0.0

    @property
    def shown(self) -> str:
        note = f", but for {self.unjudged:.0%}: float64 gives NaN" if self.unjudged else ""
        return f"{self.what}{note}"


def differences_of(original: Run, swapped: Run, truth: Run) -> list[LayerDifference]:
    """By layer; of the parameters' gradients those that are wrong, or else the worst.

    A gradient that is zero but for rounding, as that of a key's bias, has no size of its own to
    measure errors by: the largest value among the parameters of its module is taken.
    """
    layers: list[LayerDifference] = []
    parameters: list[LayerDifference] = []
    sizes: dict[tuple[str, str], float] = {}
    for (name, what), tensor in truth.items():
        place = _place(name, what)
        finite = tensor[tensor.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        sizes[place] = max(sizes.get(place, 0.0), largest)
    for name, what in (key for key in original if key in swapped and key in truth):
        row = _difference(
            *(name, what, original[name, what], swapped[name, what], truth[name, what]),
            size=sizes[_place(name, what)] or 1.0,
        )
        (parameters if what == PARAMETER else layers).append(row)
    wrong = [row for row in parameters if not row.agrees]
    judged = [row for row in parameters if row.unjudged == 0.0]
    worst = sorted(judged, key=lambda row: row.error_swapped / row.allowed)[-1:]
    return layers + (wrong or worst) + [row for row in parameters if row.agrees and row.unjudged]


def _difference(
    name: str, what: str, one: Tensor, other: Tensor, exact: Tensor, *, size: float
) -> LayerDifference:
    """One comparison, of errors as shares of `size`."""
    # loaded here: no model that is only swapped needs it
    from ..testing.tolerance import expected_of_model, measure

    rounding = torch.finfo(one.dtype).eps
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        forms = (f"{tuple(each.shape)} {each.dtype}" for each in (other, one))
        what = f"{what}, {' in place of '.join(forms)}"
        return LayerDifference(name, what, math.inf, 0.0, math.inf, rounding, agrees=False)
    unknown = ~exact.isfinite() & other.isfinite()
    original, swapped, truth = (tensor[~unknown] for tensor in (one, other, exact.double()))
    sum_dtype = torch.promote_types(one.dtype, torch.float32)
    found = measure(what, swapped, expected_of_model(truth, original, size), sum_dtype)

    def largest_difference(left: Tensor, right: Tensor) -> float:
        # of equal infinities, which have no difference, none
        errors = (left.double() - right.double()).abs().masked_fill(left == right, 0.0)
        return float(errors.max()) / size if errors.numel() else 0.0

    return LayerDifference(
        name,
        what,
        difference=largest_difference(original, swapped),
        error_original=largest_difference(original, truth),
        error_swapped=largest_difference(swapped, truth),
        allowed=found.limit / size or rounding,
        agrees=found.fault is None,
        unjudged=float(unknown.double().mean()) if unknown.numel() else 0.0,
    )


def _place(name: str, what: str) -> tuple[str, str]:
    return (name.rpartition(".")[0] if what == PARAMETER else name), what


def call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by position and by name, of what a user gives for them."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def real_tokens(kwargs: Mapping[str, Any]) -> Tensor | None:
    """bool (B, L), the tokens that count, where the arguments tell."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    mask = kwargs.get("src_key_padding_mask")
    return ~mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
