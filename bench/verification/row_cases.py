"""The cases of layer_norm, add_layer_norm, rms_norm and masked_softmax, from their equations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import Causal, Dense, KeyLengths, Mask
from ...kernels.reference import rows_keep
from ...kernels.testing.oracle import Results, mask_on
from .attention_cases import Draw
from .questions import Answer, Case, Question, answers_of
from .subjects import Subject

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
class RowQuestion:
    """One call of a row-wise function with the gradients that its outputs receive."""

    op: str
    inputs: dict[str, Tensor]  # x (rows, columns), residual, weight and bias (columns,); or scores
    grads: tuple[Tensor, ...]  # of each output
    mask: Mask | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return self.inputs["scores" if self.op == "masked_softmax" else "x"]

    @property
    def computed(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @cached_property
    def answers(self) -> dict[str, Answer]:
        exact, plain = self._equation(torch.float64), self._equation(self.computed)
        found, x = self._magnitudes(exact), self.x
        sizes = {name: found[name].expand(tensor.shape) for name, tensor in exact.items()}
        stored = {name: tensor.to(x.dtype) for name, tensor in plain.items()}
        return answers_of(exact, stored, sizes, x.dtype, max(x.shape))

    def ask(self, subject: Subject) -> Results:
        device = subject.device
        leaves = {
            name: tensor.detach().to(device).requires_grad_()
            for name, tensor in self.inputs.items()
        }
        mask = mask_on(device, self.mask)
        assert mask is None or isinstance(mask, Mask)  # as it was
        outputs = subject.rows(self.op, leaves, mask, self.options)
        return self._with_gradients(leaves, outputs)

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
        return self._with_gradients(leaves, outputs)

    def _with_gradients(self, leaves: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> Results:
        results = {name: y.detach().cpu() for name, y in zip(("out", "sum"), outputs, strict=False)}
        grads = [g.to(y.device, y.dtype) for g, y in zip(self.grads, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
        return results | {
            f"d_{name}": gradient.cpu() for name, gradient in zip(leaves, gradients, strict=True)
        }

    @cached_property
    def allowed(self) -> Tensor | None:
        """bool, True = may attend, of the scores' shape."""
        shape = self.x.shape
        return None if self.mask is None else self.mask.dense(*shape)

    @cached_property
    def keep(self) -> Tensor | None:
        """bool, True = kept, of x's shape; None without dropout."""
        dropout_p = self.options.get("dropout_p", 0.0)
        if dropout_p == 0.0:
            return None
        rows, columns = self.x.shape
        return rows_keep(torch.tensor(self.options["seed"]), dropout_p, rows, columns)

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
        wide = {name: tensor.double() for name, tensor in self.inputs.items()}
        total = exact.get("sum", wide["x"])
        centred = total if self.op == "rms_norm" else total - total.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + self._eps["eps"]).rsqrt()
        kept = 1 / (1 - self._eps["dropout_p"])
        has_sum = "sum" in exact
        terms = wide["x"].abs() * kept + wide["residual"].abs() if has_sum else total.abs()
        size = terms * rstd
        weight = wide.get("weight", torch.ones(total.shape[-1], dtype=torch.float64)).abs()
        d_y = self.grads[0].double().abs()
        d_hat = d_y * weight
        row = rstd * (
            d_hat + d_hat.mean(-1, keepdim=True) + size * (d_hat * size).mean(-1, keepdim=True)
        )
        if has_sum:
            row = row + self.grads[1].double().abs()
        return {
            "out": size * weight + wide.get("bias", torch.zeros(1)).abs(),
            "sum": terms,
            "d_x": row * kept,
            "d_residual": row,
            "d_weight": (d_y * size).sum(0),
            "d_bias": d_y.sum(0),
        }

    def _softmax_magnitudes(self, exact: Results) -> Results:
        scores, weights = self.x.double().abs() * abs(self._scale), exact["out"]
        seen = torch.where(weights > 0, scores, 0.0)
        most = seen.amax(-1, keepdim=True) if scores.shape[-1] else seen.sum(-1, keepdim=True)
        size = weights * (1 + most)
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
        x = x * keep / (1 - dropout_p)
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
) -> Iterator[Case]:
    for op in ops:
        if op in NORMS:
            shapes = QUICK_ROW_SHAPES if quick else ROW_SHAPES
            for name in NORM_KINDS:
                if name in kinds and (name != "dropout" or op == "add_layer_norm"):
                    for shape in shapes:
                        yield Case(op, name, shape, dtype, partial(_norm, op, name, shape, dtype))
        elif op == "masked_softmax":
            for name in SOFTMAX_KINDS:
                for scores in QUICK_SOFTMAX_SHAPES if quick else SOFTMAX_SHAPES:
                    if name in kinds and (name != "causal" or scores[2] == scores[3]):
                        make = partial(_softmax, name, scores, dtype)
                        yield Case(op, name, scores, dtype, make)


def norm_question(
    op: str, x: Tensor, draw: Draw, parameters: tuple[str, ...], options: dict[str, Any]
) -> RowQuestion:
    """A norm of `x` (rows, columns), with random parameters and gradients."""
    rows, columns = x.shape
    inputs = {"x": x}
    if op == "add_layer_norm":
        inputs["residual"] = draw.normal(rows, columns)
    for name in parameters:
        if name == "weight" or op != "rms_norm":
            inputs[name] = draw.normal(columns)
    outputs = 2 if op == "add_layer_norm" else 1
    grads = tuple(draw.normal(rows, columns) for _ in range(outputs))
    return RowQuestion(op, inputs, grads, options=options)


def _norm(
    op: str, kind: str, shape: tuple[int, int], dtype: torch.dtype, _with_lse: bool
) -> Question:
    parameters, options = NORM_KINDS[kind]
    draw = Draw(sum(shape), dtype)
    return norm_question(op, draw.normal(*shape), draw, parameters, options)


def _softmax(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, _with_lse: bool
) -> Question:
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
    return RowQuestion("masked_softmax", {"scores": scores}, (grad,), mask, options)
