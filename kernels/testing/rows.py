"""The cases of layer_norm, add_layer_norm, rms_norm and masked_softmax, from their equations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..api.masks import Causal, Dense, KeyLengths, Mask
from ..backends.reference import keep_scale, rows_keep
from .cases import Draw, NamedCase
from .oracle import (
    Kernel,
    Results,
    TestCase,
    expected_of,
    gradients_of,
    mask_on,
    on_device,
    outputs_of,
)
from .tolerance import Expected

NORMS = ("layer_norm", "add_layer_norm", "rms_norm")
EPS = 1e-5
# options -> what the kind is called; weights and biases where the names are given
NORM_KINDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "none": ((), {}),
    "weight": (("weight", "bias"), {}),
    "large-eps": (("weight", "bias"), {"eps": 0.5}),
    "dropout": (("weight", "bias"), {"dropout_p": 0.3, "seed": 11}),
}
QUICK_ROW_SHAPES = ((7, 5), (33, 515), (300, 64))
ROW_SHAPES = (*QUICK_ROW_SHAPES, (1, 1), (3, 4096), (2049, 40), (0, 8))
SOFTMAX_KINDS = ("none", "causal", "key-lengths", "dense", "scale")
QUICK_SOFTMAX_SHAPES = ((2, 3, 19, 19), (1, 2, 40, 515))
SOFTMAX_SHAPES = (*QUICK_SOFTMAX_SHAPES, (4, 1, 3, 1), (1, 1, 300, 300), (2, 2, 5, 0))


@dataclass(frozen=True)
class RowCase:
    """One call of a row-wise function with the gradients that its outputs receive.

    `op` is "layer_norm", "add_layer_norm", "rms_norm" or "masked_softmax". inputs: x and residual
    (..., columns), weight and bias (columns,); or scores, of at most four dimensions. grads: of
    each output, like it; without them, the forward pass alone is compared. options: eps, dropout_p
    and seed, or scale.

    `kernel(x, weight=..., bias=..., eps=...)`, `kernel(x, residual, ...)` or `kernel(scores,
    mask=..., scale=...)` gets those that are given, and returns the output; of add_layer_norm, the
    output and the sum.
    """

    op: str
    inputs: dict[str, Tensor]
    grads: tuple[Tensor, ...]
    mask: Mask | Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return self.inputs["scores" if self.op == "masked_softmax" else "x"]

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @cached_property
    def expected(self) -> dict[str, Expected]:
        exact, naive = self._equation(torch.float64), self._equation(self.sum_dtype)
        stored = {
            name: tensor.to(self.inputs.get(name.removeprefix("d_"), self.x).dtype)
            for name, tensor in naive.items()
        }
        return expected_of(exact, stored, self._magnitudes(exact), max(self.x.shape, default=1))

    def run(self, kernel: Kernel, device: torch.device | str | None = None) -> Results:
        device = torch.device(device or self.x.device)
        leaves = {
            name: tensor.detach().to(device).requires_grad_()
            for name, tensor in self.inputs.items()
        }
        positional = [leaves[name] for name in ("scores", "x", "residual") if name in leaves]
        keywords: dict[str, Any] = {
            name: leaves[name] for name in ("weight", "bias") if name in leaves
        }
        if self.mask is not None:
            keywords["mask"] = mask_on(device, self.mask)
        outputs = outputs_of(kernel(*positional, **keywords, **self.options))
        return on_device(self._results(leaves, outputs), self.x.device)

    def forward_only(self) -> RowCase:
        return replace(self, grads=())

    def _equation(self, dtype: torch.dtype) -> Results:
        """The equation by torch's own operations and autograd, computed in `dtype`."""
        leaves = {
            name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.inputs.items()
        }
        outputs: tuple[Tensor, ...]
        if self.op == "masked_softmax":
            outputs = (softmax_equation(leaves["scores"], self.allowed, self._scale),)
        else:
            # the naive path keeps the sum that it normalises in the input's dtype
            stored = self.x.dtype if dtype != torch.float64 else dtype
            outputs = norm_equation(self.op, leaves, self.keep, stored, **self._eps)
        return self._results(leaves, outputs)

    def _results(self, leaves: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> Results:
        most = 2 if self.op == "add_layer_norm" else 1
        if len(outputs) > most:
            raise TypeError(f"a kernel of {self.op}: expected tensors: {most}, got {len(outputs)}")
        results = dict(zip(("out", "sum"), outputs, strict=False))
        return gradients_of(results, self.grads, leaves)

    @cached_property
    def allowed(self) -> Tensor | None:
        """bool, True = may attend, of the scores' shape."""
        if self.mask is None:
            return None
        size = self.x.shape
        # what the mask takes for batch and heads: (L,) -> (1, 1, 1, L), (B, Lq, Lk) -> (B, 1, ...)
        batch, heads, rows, columns = (
            (size[0], 1, *size[1:]) if len(size) == 3 else (1,) * (4 - len(size)) + tuple(size)
        )
        mask = self.mask
        dense = mask.dense(batch, heads, rows, columns) if isinstance(mask, Mask) else mask
        return dense.to(self.x.device).expand(batch, heads, rows, columns).reshape(size)

    @cached_property
    def keep(self) -> Tensor | None:
        """bool, True = kept, of x's shape; None without dropout."""
        dropout_p = self.options.get("dropout_p", 0.0)
        if dropout_p == 0.0:
            return None
        columns = self.x.shape[-1]
        rows = self.x.numel() // columns if columns else 0
        seed = torch.tensor(self.options["seed"], device=self.x.device)
        return rows_keep(seed, dropout_p, rows, columns).view(self.x.shape)

    @property
    def _scale(self) -> float:
        return float(self.options.get("scale", 1.0))

    @property
    def _eps(self) -> dict[str, float]:
        default = 1e-6 if self.op == "rms_norm" else EPS
        eps = float(self.options.get("eps", default))
        return {"eps": eps, "dropout_p": self.options.get("dropout_p", 0.0)}

    def _magnitudes(self, exact: Results) -> Results:
        """Sums of the terms' magnitudes: an output rounds as its terms did before they cancelled.

        x_hat's error is eps times |x| * rstd, and a gradient's eps times the sum of its terms.
        """
        if self.op == "masked_softmax":
            return self._softmax_magnitudes(exact)
        wide = {name: tensor.detach().double() for name, tensor in self.inputs.items()}
        total = exact.get("sum", wide["x"])
        deviation = total if self.op == "rms_norm" else total - total.mean(-1, keepdim=True)
        rstd = (deviation.square().mean(-1, keepdim=True) + self._eps["eps"]).rsqrt()
        kept = keep_scale(self._eps["dropout_p"])
        terms = wide["x"].abs() * kept + wide["residual"].abs() if "sum" in exact else total.abs()
        size = terms * rstd
        weight = wide["weight"].abs() if "weight" in wide else torch.ones_like(total)
        found = {"out": size * weight, "sum": terms}
        if "bias" in wide:
            found["out"] = found["out"] + wide["bias"].abs()
        if not self.grads:
            return found
        d_y = self.grads[0].double().abs()
        d_hat = d_y * weight
        row = rstd * (
            d_hat + d_hat.mean(-1, keepdim=True) + size * (d_hat * size).mean(-1, keepdim=True)
        )
        if len(self.grads) > 1:
            row = row + self.grads[1].double().abs()
        rows = tuple(range(total.dim() - 1))
        found |= {"d_x": row * kept, "d_residual": row}
        return found | {"d_weight": (d_y * size).sum(rows), "d_bias": d_y.sum(rows)}

    def _softmax_magnitudes(self, exact: Results) -> Results:
        scores = self.x.detach().double().abs() * abs(self._scale)
        weights = exact["out"]
        seen = torch.where(weights > 0, scores, 0.0)
        most = seen.amax(-1, keepdim=True) if scores.shape[-1] else seen.sum(-1, keepdim=True)
        size = weights * (1 + most)
        if not self.grads:
            return {"out": size}
        d_w = self.grads[0].double().abs()
        return {
            "out": size,
            "d_scores": abs(self._scale) * size * (d_w + (size * d_w).sum(-1, keepdim=True)),
        }


def norm_equation(
    op: str,
    inputs: dict[str, Tensor],
    keep: Tensor | None,
    stored: torch.dtype,
    *,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, ...]:
    """The norm as its paper says it, in the dtype of the inputs."""
    x = inputs["x"]
    if keep is not None:
        x = x * keep * keep_scale(dropout_p)
    outputs: tuple[Tensor, ...] = ()
    if op == "add_layer_norm":
        x = (inputs["residual"] + x).to(stored).to(x.dtype)
        outputs = (x,)
    if op != "rms_norm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if "weight" in inputs:
        y = y * inputs["weight"]
    if "bias" in inputs:
        y = y + inputs["bias"]
    return (y, *outputs)


def softmax_equation(scores: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Zeros in a row that allows nothing."""
    scaled = scores * scale
    if allowed is None:
        return scaled.softmax(-1)
    none = ~allowed.any(-1, keepdim=True)
    weights = scaled.masked_fill(~allowed, -torch.inf).masked_fill(none, 0.0).softmax(-1)
    return weights.masked_fill(none, 0.0)


def row_cases(
    ops: tuple[str, ...], dtype: torch.dtype, kinds: tuple[str, ...], *, quick: bool
) -> Iterator[NamedCase]:
    for op in ops:
        if op in NORMS:
            shapes = QUICK_ROW_SHAPES if quick else ROW_SHAPES
            for name in NORM_KINDS:
                if name in kinds and (name != "dropout" or op == "add_layer_norm"):
                    for shape in shapes:
                        yield NamedCase(
                            op, name, shape, dtype, partial(_norm, op, name, shape, dtype)
                        )
        elif op == "masked_softmax":
            for name in SOFTMAX_KINDS:
                for scores in QUICK_SOFTMAX_SHAPES if quick else SOFTMAX_SHAPES:
                    if name in kinds and (name != "causal" or scores[2] == scores[3]):
                        make = partial(_softmax, name, scores, dtype)
                        yield NamedCase(op, name, scores, dtype, make)


def norm_case(
    op: str, x: Tensor, draw: Draw, parameters: tuple[str, ...], options: dict[str, Any]
) -> RowCase:
    """A norm of `x` (..., columns), with random parameters and gradients."""
    inputs = {"x": x}
    if op == "add_layer_norm":
        inputs["residual"] = draw.normal(*x.shape)
    for name in parameters:
        if name == "weight" or op != "rms_norm":
            inputs[name] = draw.normal(x.shape[-1])
    outputs = 2 if op == "add_layer_norm" else 1
    grads = tuple(draw.normal(*x.shape) for _ in range(outputs))
    return RowCase(op, inputs, grads, options=options)


def _norm(op: str, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> TestCase:
    parameters, options = NORM_KINDS[kind]
    draw = Draw(sum(shape), dtype)
    return norm_case(op, draw.normal(*shape), draw, parameters, options)


def _softmax(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> TestCase:
    draw = Draw(sum(shape), dtype)
    mask: Mask | None = None
    if kind == "causal":
        mask = Causal()
    elif kind == "key-lengths":
        mask = KeyLengths(draw.lengths(shape[3], shape[0]))
    elif kind == "dense":
        mask = Dense(draw.coins(0.5, *shape))
    options = {"scale": -0.7} if kind == "scale" else {}
    scores, grad = draw.normal(*shape), draw.normal(*shape)
    return RowCase("masked_softmax", {"scores": scores}, (grad,), mask, options)
