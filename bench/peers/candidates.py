"""The candidates: rowmax.kernels, every path that torch itself offers, and packages beside it.

A peer is one function from a case's inputs to its outputs, the first of which is differentiated.
To add one, write the function, put a maker of it into `PEERS` and its name into the suites that it
is for; the maker is called once for the cases of one kind and shape, so that `torch.compile` starts
afresh for each. What a peer can't do it raises an error for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import kernels
from ...kernels import Mask
from ...kernels.backends import dispatch
from ..machine.host import free_memory
from ..measure import models
from ..measure.cases import BACKWARD, FORWARD_BACKWARD, Suite
from ..measure.inputs import EPS, SEED, AttentionInputs, NormInputs, Outputs
from .engines import onnx_runtime, open_vino
from .packages import (
    Flex,
    UnsupportedError,
    allow_repeated_backward,
    flash_attn,
    liger_norm,
    xformers_attention,
)

Function = Callable[[Any], Outputs]
Maker = Callable[[str], Function]  # from the kind of case

ROWMAX = "rowmax"


def run_pass(function: Function, inputs: Any, *, backward: bool) -> Outputs:
    """The outputs, and with `backward` the gradients of all leaves."""
    if not backward:
        with torch.no_grad():
            return function(inputs)
    outputs = function(inputs)
    return (*outputs, *torch.autograd.grad(outputs[0], inputs.leaves, inputs.d_out))


def measured_call(function: Function, inputs: Any, step: str) -> Callable[[], Outputs]:
    """The call of a pass that is timed; for the backward alone, the forward has been done."""
    if step == BACKWARD:
        outputs = function(inputs)
        gradients = partial(torch.autograd.grad, outputs[0], inputs.leaves, inputs.d_out)
        return partial(gradients, retain_graph=True)
    return partial(run_pass, function, inputs, backward=step == FORWARD_BACKWARD)


# --- attention ------------------------------------------------------------------------------------


def rowmax_attention(inputs: AttentionInputs, backend: str) -> Outputs:
    out = kernels.attention(
        *(inputs.q, inputs.k, inputs.v),
        mask=inputs.mask,
        bias=inputs.bias,
        dropout_p=inputs.dropout_p,
        seed=SEED if inputs.dropout_p > 0.0 else None,
        backend=backend,
    )
    return (out,)


def sdpa(
    inputs: AttentionInputs, function: Callable[..., Tensor] = F.scaled_dot_product_attention
) -> Outputs:
    """By the backend that torch chooses, or another function of the same signature."""
    mask, is_causal = inputs.allowed, inputs.causal
    if inputs.bias is not None:
        mask = inputs.bias if mask is None else inputs.bias.masked_fill(~mask, -torch.inf)
    elif is_causal:
        mask = None
    out = function(
        *(inputs.q, inputs.k, inputs.v),
        attn_mask=mask,
        is_causal=is_causal and mask is None,
        dropout_p=inputs.dropout_p,
        enable_gqa=inputs.group > 1,
    )
    return (out,)


def sdpa_by(backend: SDPBackend) -> Function:
    def function(inputs: AttentionInputs) -> Outputs:
        with sdpa_kernel(backend):
            return sdpa(inputs)

    return function


def unfused(function: Function) -> Function:
    """`function`, refused where its scores would not fit the memory of this machine.

    A system that runs out of memory ends the run; a GPU that does raises an error.
    """

    def guarded(inputs: AttentionInputs) -> Outputs:
        scores = inputs.q.shape[0] * inputs.q.shape[1] * inputs.q.shape[2] * inputs.k.shape[2]
        matrices = 5 if torch.is_grad_enabled() else 3  # that live at once
        needed, free = matrices * scores * inputs.q.element_size(), free_memory()
        if inputs.q.device.type == "cpu" and free is not None and needed > free:
            raise UnsupportedError(
                f"scores, weights and gradients of {needed / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB are free"
            )
        return function(inputs)

    return guarded


def naive_attention(inputs: AttentionInputs) -> Outputs:
    """softmax(q @ k^T / sqrt(D)) @ v as it is written, in the dtype of the inputs."""
    k, v = inputs.k, inputs.v
    if inputs.group > 1:
        k, v = (tensor.repeat_interleave(inputs.group, dim=1) for tensor in (k, v))
    scores = (inputs.q * inputs.q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if inputs.bias is not None:
        scores = scores + inputs.bias
    if inputs.allowed is not None:
        scores = scores.masked_fill(~inputs.allowed, -torch.inf)
    weights = _dropped(scores.softmax(-1), inputs.dropout_p)
    return (weights @ v,)


# --- norms ----------------------------------------------------------------------------------------


def rowmax_norm(kind: str, inputs: NormInputs, backend: str) -> Outputs:
    return foreign_row(partial(getattr(kernels, kind), backend=backend), kind, inputs, inputs.mask)


def torch_norm(kind: str, inputs: NormInputs) -> Outputs:
    """torch.nn.functional's own function, after what must come before it."""
    if kind == "masked_softmax":
        return naive_norm(kind, inputs)
    columns = inputs.x.shape[-1:]
    if kind == "rms_norm":
        return (F.rms_norm(inputs.x, columns, inputs.weight, EPS),)
    if inputs.residual is None:
        return (F.layer_norm(inputs.x, columns, inputs.weight, inputs.bias, EPS),)
    total = inputs.residual + _dropped(inputs.x, inputs.dropout_p)
    return F.layer_norm(total, columns, inputs.weight, inputs.bias, EPS), total


def foreign_row(
    function: Callable[..., Any], kind: str, inputs: NormInputs, mask: Mask | None = None
) -> Outputs:
    """A function, a stranger's too, called as that of rowmax.kernels that `kind` names."""
    if kind == "masked_softmax":
        found = function(inputs.x, mask=inputs.allowed if mask is None else mask)
    else:
        given = {"weight": inputs.weight, "bias": inputs.bias}
        tensors = (inputs.x,) if inputs.residual is None else (inputs.x, inputs.residual)
        found = function(
            *tensors,
            eps=EPS,
            **{name: tensor for name, tensor in given.items() if tensor is not None},
            **({"dropout_p": inputs.dropout_p, "seed": SEED} if inputs.dropout_p > 0.0 else {}),
        )
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def naive_norm(kind: str, inputs: NormInputs) -> Outputs:
    """The equations as they are written, in the dtype of the inputs."""
    if kind == "masked_softmax":
        assert inputs.allowed is not None  # every masked softmax here is padded
        return (inputs.x.masked_fill(~inputs.allowed, -torch.inf).softmax(-1),)
    if kind == "rms_norm":
        mean_square = (inputs.x * inputs.x).mean(-1, keepdim=True)
        return (_affine(inputs.x * torch.rsqrt(mean_square + EPS), inputs),)
    total = inputs.x
    if inputs.residual is not None:
        total = inputs.residual + _dropped(inputs.x, inputs.dropout_p)
    deviation = total - total.mean(-1, keepdim=True)
    variance = (deviation * deviation).mean(-1, keepdim=True)
    y = _affine(deviation * torch.rsqrt(variance + EPS), inputs)
    return (y,) if inputs.residual is None else (y, total)


def _affine(tensor: Tensor, inputs: NormInputs) -> Tensor:
    if inputs.weight is not None:
        tensor = tensor * inputs.weight
    return tensor if inputs.bias is None else tensor + inputs.bias


def _dropped(tensor: Tensor, dropout_p: float) -> Tensor:
    return F.dropout(tensor, dropout_p) if dropout_p > 0.0 else tensor


# --- the table ------------------------------------------------------------------------------------


def _compiled(function: Function) -> Function:
    """`torch.compile`, blind to what earlier cases compiled: it would give up after eight."""
    torch.compiler.reset()
    allow_repeated_backward()
    return torch.compile(function, dynamic=False)


def _flex(kind: str) -> Function:
    torch.compiler.reset()
    return Flex(kind)


ATTENTION_PEERS: dict[str, Maker] = {
    "sdpa": lambda _: sdpa,
    "sdpa-flash": lambda _: sdpa_by(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": lambda _: sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": lambda _: sdpa_by(SDPBackend.CUDNN_ATTENTION),
    "sdpa-math": lambda _: unfused(sdpa_by(SDPBackend.MATH)),
    "naive": lambda _: unfused(naive_attention),
    "flex": _flex,
    "compile": lambda _: unfused(_compiled(naive_attention)),
    "onnxruntime": lambda _: onnx_runtime(),
    "openvino": lambda _: open_vino(),
    "numba": lambda _: partial(rowmax_attention, backend="numba"),
    "native": lambda _: partial(rowmax_attention, backend="native"),
    "flash-attn": lambda kind: partial(flash_attn, kind),
    "xformers": lambda kind: partial(xformers_attention, kind),
}
NORM_PEERS: dict[str, Maker] = {
    "torch": lambda kind: partial(torch_norm, kind),
    "naive": lambda kind: partial(naive_norm, kind),
    "compile": lambda kind: _compiled(lambda inputs: naive_norm(kind, inputs)),
    "numba": lambda kind: partial(rowmax_norm, kind, backend="numba"),
    "native": lambda kind: partial(rowmax_norm, kind, backend="native"),
    "liger": lambda kind: partial(liger_norm, kind),
}
MODEL_PEERS: dict[str, Maker] = {
    "torch": lambda _: partial(models.run, models.torch_path()),
    "naive": lambda _: partial(models.run, models.naive_path()),
}
SLOW_TO_START = ("flex", "compile")  # left out by --quick
# rowmax's own backends, beside the one that --backend means: for who writes or prefers one.
ONLY_BY_NAME = ("numba", "native")
# The modules of peers that are not torch's own.
PACKAGES = {
    "flash-attn": ("flash_attn",),
    "xformers": ("xformers",),
    "liger": ("liger_kernel",),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
}
HOW_TO_GET_PEERS = (
    'pip install "rowmax[peers]" brings onnxruntime and openvino, the others have packages of '
    "their own"
)


def absent(name: str) -> bool:
    """Whether a package that the peer wants is not installed here."""
    return any(find_spec(package) is None for package in PACKAGES.get(name, ()))


def peers_of(suite: Suite) -> dict[str, Maker]:
    """The suite's peers that are here, in the order of the table."""
    makers = ATTENTION_PEERS if suite.attention else MODEL_PEERS if suite.model else NORM_PEERS
    return {name: makers[name] for name in suite.peers if not absent(name)}


def rowmax_function(suite: Suite, kind: str, backend: str) -> Function:
    """rowmax.kernels itself. With "auto", a fused backend or none: the unfused path that `auto`
    falls back to is a peer by another name.
    """
    if suite.model:
        return partial(models.run, models.rowmax_path(backend))
    run: Callable[[Any, str], Outputs]
    run = rowmax_attention if suite.attention else partial(rowmax_norm, kind)
    if backend != "auto":
        return lambda inputs: run(inputs, backend)
    taken: list[str] = []

    def fused(inputs: Any) -> Outputs:
        if not taken:
            taken.append(_fused_backend(run, inputs, suite.device))
        return run(inputs, "auto")

    return fused


def _fused_backend(run: Callable[[Any, str], Outputs], inputs: Any, device: str) -> str:
    """The backend that "auto" takes, unless that is the reference; every refusal is told."""
    refusals = []
    for name in dispatch.PREFERENCE[device]:
        if name == "reference":
            break
        try:
            run(inputs, name)
            return name
        except RuntimeError as error:
            refused = str(error).partition(f"backend {name!r} can't do this: ")[2]
            if not refused:
                raise  # it is no refusal
            refusals.append(f"{name}: {refused.partition('; backend=')[0]}")
    raise UnsupportedError("; ".join(refusals))


def naive(suite: Suite, kind: str) -> Function:
    """The path that writes every score down, in the dtype of the inputs."""
    if suite.model:
        return partial(models.run, models.naive_path())
    return naive_attention if suite.attention else partial(naive_norm, kind)
