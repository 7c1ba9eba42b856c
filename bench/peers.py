"""The candidates: rowmax.kernels and every path that torch itself offers.

A peer is one function from a case's inputs to its outputs, the first of which is differentiated.
To add one, write the function and put a maker of it into `PEERS`; the maker is called once a case,
so that `torch.compile` starts afresh for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import kernels
from .inputs import EPS, SEED, AttentionInputs, NormInputs, Outputs

Function = Callable[[Any], Outputs]
Maker = Callable[[str], Function]  # from the kind of case

SUBJECT = "rowmax"


def run_pass(function: Function, inputs: Any, *, backward: bool) -> Outputs:
    """One measured call: the outputs, and with `backward` the gradients of all leaves."""
    if not backward:
        with torch.no_grad():
            return function(inputs)
    outputs = function(inputs)
    return (*outputs, *torch.autograd.grad(outputs[0], inputs.leaves, inputs.d_out))


# --- attention ------------------------------------------------------------------------------------


def rowmax_attention(inputs: AttentionInputs, backend: str) -> Outputs:
    out = kernels.attention(
        inputs.q,
        inputs.k,
        inputs.v,
        mask=inputs.mask,
        dropout_p=inputs.dropout_p,
        seed=SEED if inputs.dropout_p > 0.0 else None,
        backend=backend,
    )
    return (out,)


def sdpa(inputs: AttentionInputs) -> Outputs:
    out = F.scaled_dot_product_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        attn_mask=None if inputs.causal else inputs.allowed,
        is_causal=inputs.causal,
        dropout_p=inputs.dropout_p,
    )
    return (out,)


def sdpa_math(inputs: AttentionInputs) -> Outputs:
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(inputs)


def naive_attention(inputs: AttentionInputs) -> Outputs:
    """softmax(q @ k^T / sqrt(D)) @ v as it is written; in float64 the gate's oracle."""
    scores = (inputs.q * inputs.q.shape[-1] ** -0.5) @ inputs.k.transpose(-1, -2)
    if inputs.allowed is not None:
        scores = scores.masked_fill(~inputs.allowed, -torch.inf)
    weights = _dropped(scores.softmax(-1), inputs.dropout_p, inputs.keep)
    return (weights @ inputs.v,)


# --- norms ----------------------------------------------------------------------------------------


def rowmax_norm(kind: str, inputs: NormInputs, backend: str) -> Outputs:
    if kind == "masked_softmax":
        return (kernels.masked_softmax(inputs.x, mask=inputs.mask, backend=backend),)
    if kind == "rms_norm":
        return (kernels.rms_norm(inputs.x, inputs.weight, EPS, backend=backend),)
    if kind == "layer_norm":
        return (kernels.layer_norm(inputs.x, inputs.weight, inputs.bias, EPS, backend=backend),)
    assert inputs.residual is not None  # what makes it an add_layer_norm
    return kernels.add_layer_norm(
        inputs.x,
        inputs.residual,
        inputs.weight,
        inputs.bias,
        EPS,
        dropout_p=inputs.dropout_p,
        seed=SEED,
        backend=backend,
    )


def torch_norm(kind: str, inputs: NormInputs) -> Outputs:
    """torch.nn.functional's own function, after what must come before it."""
    if kind == "masked_softmax":
        return naive_norm(kind, inputs)
    columns = inputs.x.shape[-1:]
    if kind == "rms_norm":
        return (F.rms_norm(inputs.x, columns, inputs.weight, EPS),)
    if inputs.residual is None:
        return (F.layer_norm(inputs.x, columns, inputs.weight, inputs.bias, EPS),)
    total = inputs.residual + _dropped(inputs.x, inputs.dropout_p, inputs.keep)
    return F.layer_norm(total, columns, inputs.weight, inputs.bias, EPS), total


def naive_norm(kind: str, inputs: NormInputs) -> Outputs:
    """The equations as they are written; in float64 the gate's oracle."""
    if kind == "masked_softmax":
        assert inputs.allowed is not None  # every masked softmax here is padded
        return (inputs.x.masked_fill(~inputs.allowed, -torch.inf).softmax(-1),)
    if kind == "rms_norm":
        mean_square = (inputs.x * inputs.x).mean(-1, keepdim=True)
        return (_affine(inputs.x * torch.rsqrt(mean_square + EPS), inputs),)
    total = inputs.x
    if inputs.residual is not None:
        total = inputs.residual + _dropped(inputs.x, inputs.dropout_p, inputs.keep)
    centred = total - total.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    y = _affine(centred * torch.rsqrt(variance + EPS), inputs)
    return (y,) if inputs.residual is None else (y, total)


def _affine(tensor: Tensor, inputs: NormInputs) -> Tensor:
    if inputs.weight is not None:
        tensor = tensor * inputs.weight
    return tensor if inputs.bias is None else tensor + inputs.bias


def _dropped(tensor: Tensor, dropout_p: float, keep: Tensor | None) -> Tensor:
    if keep is not None:
        return tensor * keep
    return F.dropout(tensor, dropout_p) if dropout_p > 0.0 else tensor


# --- the table ------------------------------------------------------------------------------------


def _compiled(function: Function) -> Function:
    """`torch.compile`, blind to what earlier cases compiled: it would give up after eight."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


PEERS: dict[str, dict[str, Maker]] = {
    "cpu-attention": {
        "sdpa": lambda _: sdpa,
        "sdpa-math": lambda _: sdpa_math,
        "naive": lambda _: naive_attention,
        "compile": lambda _: _compiled(naive_attention),
    },
    "cpu-norms": {
        "torch": lambda kind: lambda inputs: torch_norm(kind, inputs),
        "naive": lambda kind: lambda inputs: naive_norm(kind, inputs),
        "compile": lambda kind: _compiled(lambda inputs: naive_norm(kind, inputs)),
    },
}
SLOW_TO_START = ("compile",)  # left out by --quick


def subject(suite: str, kind: str, backend: str) -> Function:
    """rowmax.kernels itself."""
    if suite == "cpu-attention":
        return lambda inputs: rowmax_attention(inputs, backend)
    return lambda inputs: rowmax_norm(kind, inputs, backend)


def oracle(suite: str, kind: str) -> Function:
    """The naive path, which is the oracle when its inputs are float64."""
    if suite == "cpu-attention":
        return naive_attention
    return lambda inputs: naive_norm(kind, inputs)
