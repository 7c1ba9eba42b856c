"""Functions of every op whose derivatives are tested, and what the tests of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk

from ..tensors import rand
from .backends import BACKENDS, device_of, is_interpreted

Function = Callable[..., Any]
Made = tuple[Function, tuple[Tensor, ...]]


def heads(heads: int = 2, key_heads: int = 1, keys: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q = rand(2, heads, 3, 2, seed=1)
    return q, rand(2, key_heads, keys, 2, seed=2), rand(2, key_heads, keys, 3, seed=3)


# name -> (q, k, v and further tensors with a derivative), and how they become arguments
ATTENTION: dict[str, tuple[tuple[Tensor, ...], Callable[..., dict[str, Any]]]] = {
    "plain": (heads(), dict),
    "masked_softcap": (
        heads(),
        lambda: {
            "mask": rk.Causal("lower_right") & rk.KeyLengths(torch.tensor([0, 3])),
            "softcap": 0.8,
        },
    ),
    "bias_sinks": (
        (*heads(), rand(2, 1, 4), rand(2)),
        lambda bias, sinks: {"bias": bias, "sinks": sinks},
    ),
    "all": (
        (*heads(), rand(1, 3, 4), rand(2)),
        lambda bias, sinks: {
            "bias": bias.masked_fill(torch.eye(3, 4).bool(), -torch.inf),
            "sinks": sinks,
            "mask": rk.Window(2, 1, "lower_right") & rk.QueryLengths(torch.tensor([3, 2])),
            "softcap": 1.5,
            "dropout_p": 0.3,
            "seed": 4,
            "scale": 0.6,
        },
    ),
    "alibi_dropout": (
        heads(2, 2),
        lambda: {"bias": rk.ALiBi(torch.tensor([0.5, 0.2]), 1), "dropout_p": 0.5, "seed": 1},
    ),
    "no_keys": (heads(keys=0), dict),
}


def attention_case(name: str, backend: str) -> Made:
    tensors, options = ATTENTION[name]

    def call(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = rk.attention(q, k, v, return_lse=True, backend=backend, **options(*others))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return call, tensors


def norm_case(name: str, backend: str) -> Made:
    x, other, weight, bias = rand(2, 3, 5), rand(2, 3, 5, seed=7), rand(5), rand(5, seed=1)
    mask = rk.Causal(1) & rk.KeyLengths(torch.tensor([4]))
    calls: dict[str, Made] = {
        "layer_norm": (lambda *t: rk.layer_norm(*t, backend=backend), (x, weight, bias)),
        "layer_norm_plain": (lambda x: rk.layer_norm(x, backend=backend), (x,)),
        "rms_norm": (lambda *t: rk.rms_norm(*t, backend=backend), (x, weight)),
        "rms_norm_plain": (lambda x: rk.rms_norm(x, backend=backend), (x,)),
        "add_layer_norm": (
            lambda *t: rk.add_layer_norm(*t, backend=backend),
            (x, other, weight, bias),
        ),
        "add_layer_norm_dropout": (
            lambda x, residual, weight, bias: rk.add_layer_norm(
                x, residual, weight, bias, dropout_p=0.4, seed=3, backend=backend
            ),
            (x, other, weight, bias),
        ),
        "masked_softmax": (lambda x: rk.masked_softmax(x, mask, 0.7, backend=backend), (x[:1],)),
    }
    return calls[name]


NORMS = (
    "layer_norm",
    "layer_norm_plain",
    "rms_norm",
    "rms_norm_plain",
    "add_layer_norm",
    "add_layer_norm_dropout",
    "masked_softmax",
)


def op_of(name: str) -> str:
    return name.removesuffix("_plain").removesuffix("_dropout") if name in NORMS else "attention"


# What is tested is the same on every backend; an interpreted one is too slow for all of it.
EVERY = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name in (*ATTENTION, *NORMS)
    for backend in BACKENDS
    if not is_interpreted(backend)
]
COMPILED = pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if not is_interpreted(backend)]
)


def made(name: str, backend: str) -> Made:
    make = norm_case if name in NORMS else attention_case
    function, tensors = make(name, backend)
    return function, tuple(tensor.to(device_of(backend)) for tensor in tensors)


def jvp(
    function: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Any, Any]:
    """The value and the tangent."""
    both: Any = torch.func.jvp(function, tensors, tangents)
    return both


def tuple_of(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def loss_of(function: Function) -> Function:
    return lambda *tensors: sum(output.sin().sum() for output in tuple_of(function(*tensors)))
