"""The float64 oracle held to mpmath: plain loops with 50 digits, gradients by differences.

Small cases only, for each gradient takes two evaluations of everything; what is checked is every
formula of the oracle, so that a wrong one can't call right kernels wrong, or wrong ones right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

from ...kernels import Causal, KeyLengths
from ...kernels.backends.reference import attention_keep
from ...kernels.testing.cases import Draw, Kind, Shape, attention_case
from ...kernels.testing.oracle import AttentionCase, Results
from ...kernels.testing.rows import RowCase, norm_case

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
    batch, heads, rows, keys = case.shape
    allowed = problem.mask.allowed(rows, keys, case.q.device)
    may = [True] * (batch * heads * rows * keys)
    if allowed is not None:
        may = allowed.expand(case.shape).flatten().tolist()
    keep = _keep(case)
    dim, value_dim, key_heads = case.q.shape[3], case.v.shape[3], case.k.shape[1]
    scale, softcap = mpf(problem.scale), problem.softcap

    def forward(inputs: dict[str, list[Any]]) -> tuple[list[Any], list[Any]]:
        out, lse = [], []
        for b, h, i in product(range(batch), range(heads), range(rows)):
            shared = b * key_heads + h // (heads // key_heads)
            at = (b * heads + h) * rows + i
            terms, total = [], mpf(0)
            if "sinks" in inputs:
                total += mpmath.exp(inputs["sinks"][h])
            for j in range(keys):
                if not may[at * keys + j]:
                    terms.append(mpf(0))
                    continue
                score = scale * sum(
                    inputs["q"][at * dim + d] * inputs["k"][(shared * keys + j) * dim + d]
                    for d in range(dim)
                )
                if softcap is not None:
                    score = softcap * mpmath.tanh(score / softcap)
                if "bias" in inputs:
                    score += inputs["bias"][(h * rows + i) * keys + j]
                terms.append(mpmath.exp(score))
                total += terms[-1]
            lse.append(mpmath.log(total) if total else None)
            for d in range(value_dim):
                summed = sum(
                    terms[j]
                    * keep[at * keys + j]
                    * inputs["v"][(shared * keys + j) * value_dim + d]
                    for j in range(keys)
                )
                out.append(summed / total if total else mpf(0))
        return out, lse

    def loss(inputs: dict[str, list[Any]]) -> Any:
        out, lse = forward(inputs)
        from_lse = sum(g * x for g, x in zip(grad_lse, lse, strict=True) if x is not None)
        return sum(g * x for g, x in zip(grad_out, out, strict=True)) + from_lse

    out, lse = forward(leaves)
    exact = {"out": out, "lse": [mpf("-inf") if x is None else x for x in lse]}
    return _compared(name, case.oracle(), exact | _differences(leaves, loss))


def _keep(case: AttentionCase) -> list[Any]:
    """The factor of each weight under dropout, from Philox's words."""
    count = torch.Size(case.shape).numel()
    dropout_p = case.options.get("dropout_p", 0.0)
    if dropout_p == 0.0:
        return [mpf(1)] * count
    keep_mask = attention_keep(torch.tensor(case.options["seed"]), dropout_p, case.shape)
    factor = 1 / (1 - mpf(dropout_p))
    return [factor if one else mpf(0) for one in keep_mask.flatten().tolist()]


def _rows(op: str, case: RowCase) -> OracleCheck:
    leaves = {key: _numbers(tensor) for key, tensor in case.inputs.items()}
    grads = [_numbers(grad) for grad in case.grads]
    rows, columns = case.x.shape
    dropout_p = mpf(case.options.get("dropout_p", 0.0))
    eps = mpf(1e-6 if op == "rms_norm" else 1e-5)
    keep_mask = [True] * (rows * columns) if case.keep is None else case.keep.flatten().tolist()

    def forward(inputs: dict[str, list[Any]]) -> list[list[Any]]:
        y, total = [], []
        for row in range(rows):
            part = slice(row * columns, (row + 1) * columns)
            x = inputs["x"][part]
            if op == "add_layer_norm":
                x = [
                    r + (v / (1 - dropout_p) if keeps else 0)
                    for r, v, keeps in zip(
                        inputs["residual"][part], x, keep_mask[part], strict=True
                    )
                ]
                total += x
            if op != "rms_norm":
                mean = sum(x) / columns
                x = [v - mean for v in x]
            root = mpmath.sqrt(sum(v * v for v in x) / columns + eps)
            for column, v in enumerate(x):
                value = v / root * inputs["weight"][column]
                y.append(value + (inputs["bias"][column] if "bias" in inputs else 0))
        return [y, total] if op == "add_layer_norm" else [y]

    def loss(inputs: dict[str, list[Any]]) -> Any:
        return sum(
            g * x
            for grad, output in zip(grads, forward(inputs), strict=True)
            for g, x in zip(grad, output, strict=True)
        )

    exact = dict(zip(("out", "sum"), forward(leaves), strict=False))
    found = {name: expected.exact for name, expected in case.expected.items()}
    return _compared(op, found, exact | _differences(leaves, loss))


def _differences(
    leaves: dict[str, list[Any]], function: Callable[[dict[str, list[Any]]], Any]
) -> dict[str, list[Any]]:
    """d function / d each element of each leaf, by central differences."""
    found: dict[str, list[Any]] = {}
    for name, values in leaves.items():
        gradient = []
        for at, value in enumerate(values):
            ends = []
            for step in (STEP, -STEP):
                moved = list(values)
                moved[at] = value + step
                ends.append(function({**leaves, name: moved}))
            gradient.append((ends[0] - ends[1]) / (2 * STEP))
        found[f"d_{name}"] = gradient
    return found


def _compared(name: str, found: Results, exact: dict[str, list[Any]]) -> OracleCheck:
    worst, error = "", 0.0
    for key, numbers in exact.items():
        got = _numbers(found[key])
        largest = max((abs(x) for x in numbers if mpmath.isfinite(x)), default=mpf(1)) or mpf(1)
        for left, right in zip(got, numbers, strict=True):
            apart = 0.0 if left == right else float(abs(left - right) / largest)
            # written so that a NaN is kept
            if not apart <= error:
                worst, error = key, apart
    return OracleCheck(name, error, worst, len(exact))


def _numbers(tensor: Tensor) -> list[Any]:
    return [mpf(x) for x in tensor.detach().flatten().tolist()]
