"""The float64 oracle held to mpmath: arrays of 50 digits, gradients by differences.

Small cases only, for each gradient takes two evaluations of everything; what is checked is every
formula of the oracle, so that a wrong one can't call right kernels wrong, or wrong ones right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import torch
from mpmath import mpf
from torch import Tensor

from ...kernels import Causal, KeyLengths
from ...kernels.backends.reference import attention_keep
from ...kernels.testing.cases import Draw, Kind, Shape, attention_case
from ...kernels.testing.oracle import AttentionCase, Results
from ...kernels.testing.rows import RowCase, norm_case

Numbers = dict[str, Any]  # arrays of mpmath's numbers, which NumPy takes for objects
_EXP, _LOG, _SQRT, _TANH = (
    np.frompyfunc(function, 1, 1) for function in (mpmath.exp, mpmath.log, mpmath.sqrt, mpmath.tanh)
)
DIGITS = 50
STEP = mpf(10) ** -15  # of the differences, whose own error is about its square
# Errors of the oracle that pass, relative to the largest element: float64 has eps 2.2e-16.
TOLERANCE = 1e-13

SIZES = Shape(2, 4, 2, 3, 4, 2, 3)
ATTENTION = {
    "none": Kind(),
    "causal, scale": Kind(lambda s, d: Causal("lower_right"), options={"scale": -0.7}),
    "lengths, sinks": Kind(lambda s, d: KeyLengths(torch.tensor([0, 3])), sinks=True),
    "bias, softcap": Kind(
        bias=lambda s, d: d.normal(1, s.Hq, s.Lq, s.Lk), options={"softcap": 1.2}
    ),
    "dropout": Kind(options={"dropout_p": 0.4, "seed": 2**40 + 7}),
}
NORMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "layer_norm": (("weight", "bias"), {}),
    "rms_norm": (("weight",), {}),
    "add_layer_norm": (("weight", "bias"), {"dropout_p": 0.3, "seed": 5}),
}


@dataclass(frozen=True)
class OracleCheck:
    """The error of the oracle against 50 digits on one small case."""

    name: str
    error: float  # the largest of all its tensors, relative to the tensor's largest element
    worst: str  # the tensor
    tensors: int

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "error": self.error, "worst": self.worst}


def count(ops: tuple[str, ...]) -> int:
    """The number of checks that `check` makes."""
    return (len(ATTENTION) if "attention" in ops else 0) + sum(op in ops for op in NORMS)


def check(ops: tuple[str, ...]) -> Iterator[OracleCheck]:
    with mpmath.workdps(DIGITS):
        if "attention" in ops:
            for name, kind in ATTENTION.items():
                case = attention_case(kind, SIZES, Draw(29, torch.float64))
                yield _attention(f"attention, {name}", case)
        for op, (parameters, options) in NORMS.items():
            if op in ops:
                draw = Draw(31, torch.float64)
                yield _rows(op, norm_case(op, draw.normal(2, 5), draw, parameters, options))


def _attention(name: str, case: AttentionCase) -> OracleCheck:
    leaves = {key: _numbers(tensor) for key, tensor in case.differentiable().items()}
    assert case.grad_out is not None  # attention_case draws both
    assert case.grad_lse is not None
    grad_out, grad_lse = _numbers(case.grad_out), _numbers(case.grad_lse)
    problem = case.naive_problem()
    allowed = problem.mask.allowed(case.shape[2], case.shape[3], case.q.device)
    may = np.ones(case.shape, bool) if allowed is None else allowed.expand(case.shape).numpy()
    nothing = np.zeros(case.shape[:3], bool) if "sinks" in leaves else ~may.any(-1)
    keep, groups = _keep(case), case.q.shape[1] // case.k.shape[1]
    scale, softcap = mpf(problem.scale), problem.softcap

    def forward(inputs: Numbers) -> tuple[Any, Any]:
        """out, and the sum of each row's terms; 1 in a row that may attend nothing."""
        k, v = (inputs[side].repeat(groups, axis=1) for side in ("k", "v"))
        scores = (inputs["q"] @ k.swapaxes(2, 3)) * scale  # the array first: mpf would print it
        if softcap is not None:
            scores = softcap * _TANH(scores / softcap)
        terms = np.where(may, _EXP(scores + inputs.get("bias", 0)), mpf(0))
        total = terms.sum(-1) + nothing
        if "sinks" in inputs:
            total = total + _EXP(inputs["sinks"])[:, None]
        return (terms * keep) @ v / total[..., None], total

    def loss(inputs: Numbers) -> Any:
        out, total = forward(inputs)
        return (grad_out * out).sum() + (grad_lse * _LOG(total)).sum()

    out, total = forward(leaves)
    exact = {"out": out, "lse": np.where(nothing, mpf("-inf"), _LOG(total))}
    return _compared(name, case.oracle(), exact | _differences(leaves, loss))


def _keep(case: AttentionCase) -> Any:
    """The factor of each weight under dropout, from Philox's words."""
    dropout_p = case.options.get("dropout_p", 0.0)
    if dropout_p == 0.0:
        return mpf(1)
    keep_mask = attention_keep(torch.tensor(case.options["seed"]), dropout_p, case.shape)
    return np.where(keep_mask.numpy(), 1 / (1 - mpf(dropout_p)), mpf(0))


def _rows(op: str, case: RowCase) -> OracleCheck:
    leaves = {key: _numbers(tensor) for key, tensor in case.inputs.items()}
    grads = [_numbers(grad) for grad in case.grads]
    columns, eps = case.x.shape[1], mpf(1e-6 if op == "rms_norm" else 1e-5)
    factor = 1 / (1 - mpf(case.options.get("dropout_p", 0.0)))
    keep = factor if case.keep is None else np.where(case.keep.numpy(), factor, mpf(0))

    def forward(inputs: Numbers) -> list[Any]:
        x = inputs["x"]
        if op == "add_layer_norm":
            x = inputs["residual"] + x * keep
        deviation = x if op == "rms_norm" else x - x.sum(-1, keepdims=True) / columns
        root = _SQRT((deviation * deviation).sum(-1, keepdims=True) / columns + eps)
        y = deviation / root * inputs["weight"] + inputs.get("bias", 0)
        return [y, x] if op == "add_layer_norm" else [y]

    def loss(inputs: Numbers) -> Any:
        return sum((g * out).sum() for g, out in zip(grads, forward(inputs), strict=True))

    exact = dict(zip(("out", "sum"), forward(leaves), strict=False))
    found = {name: expected.exact for name, expected in case.expected.items()}
    return _compared(op, found, exact | _differences(leaves, loss))


def _differences(leaves: Numbers, function: Callable[[Numbers], Any]) -> Numbers:
    """d function / d each element of each leaf, by central differences."""
    found: Numbers = {}
    for name, values in leaves.items():
        gradient = found[f"d_{name}"] = np.empty_like(values)
        for at in np.ndindex(values.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = values.copy()
                moved[at] += step
                ends.append(function({**leaves, name: moved}))
            gradient[at] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def _compared(name: str, found: Results, exact: Numbers) -> OracleCheck:
    worst, error = "", 0.0
    for key, numbers in exact.items():
        known = (abs(x) for x in numbers.flat if mpmath.isfinite(x))
        largest = max(known, default=mpf(1)) or mpf(1)
        for left, right in zip(_numbers(found[key]).flat, numbers.flat, strict=True):
            apart = 0.0 if left == right else float(abs(left - right) / largest)
            # written so that a NaN is kept
            if not apart <= error:
                worst, error = key, apart
    return OracleCheck(name, error, worst, len(exact))


def _numbers(tensor: Tensor) -> Any:
    flat = np.array([mpf(x) for x in tensor.detach().flatten().tolist()], dtype=object)
    return flat.reshape(tensor.shape)
