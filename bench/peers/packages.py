"""Peers that want more than one call: FlexAttention, and packages that may not be installed.

Written to their documented interfaces. Each raises UnsupportedError for what it is not made for,
and is imported only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)

from ..measure.cases import WINDOW, parts_of
from ..measure.inputs import EPS, AttentionInputs, NormInputs, Outputs


class UnsupportedError(Exception):
    """The peer has no way to compute this case."""


def allow_repeated_backward() -> None:
    """Lets the backward of what torch.compile makes run twice over one graph.

    It would use the saved tensors' memory for its results otherwise, and refuse.
    """
    from torch._functorch import config

    config.donated_buffer = False  # type: ignore[attr-defined, unused-ignore]


class Flex:
    """FlexAttention, compiled. The block mask is made once, as a model would for all its layers."""

    def __init__(self, kind: str) -> None:
        allow_repeated_backward()
        self._kind = kind
        self._attention: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
        self._options: dict[str, Any] | None = None

    def __call__(self, inputs: AttentionInputs) -> Outputs:
        if inputs.dropout_p > 0.0:
            raise UnsupportedError("FlexAttention has no dropout")
        if torch.is_grad_enabled() and inputs.q.device.type == "cpu":
            raise UnsupportedError("FlexAttention has no backward on the CPU")
        if self._options is None:
            self._options = {
                "score_mod": _score_mod(inputs),
                "block_mask": _block_mask(parts_of(self._kind), inputs),
                "enable_gqa": inputs.group > 1,
            }
        q, k, v = inputs.q, inputs.k, inputs.v
        if not torch.is_grad_enabled():
            # on the CPU it refuses what could have a gradient, asked for or not
            q, k, v = q.detach(), k.detach(), v.detach()
        return (self._attention(q, k, v, **self._options),)


def _score_mod(inputs: AttentionInputs) -> Callable[..., Tensor] | None:
    if inputs.bias is None:
        return None
    on_cpu = inputs.q.device.type == "cpu"  # where there is no backward
    bias = inputs.bias.detach() if on_cpu else inputs.bias

    def add(score: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    return add


def _block_mask(parts: frozenset[str], inputs: AttentionInputs) -> BlockMask | None:
    lengths: Any = inputs.lengths  # where the kind reads them, they are there
    allowed: Any = inputs.allowed

    def causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def window(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j <= WINDOW)

    def padded(b: Tensor, _h: Tensor, _i: Tensor, j: Tensor) -> Any:
        return j < lengths[b]

    def dense(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Any:
        return allowed[0, 0, i, j]

    allows = {"causal": causal, "gqa": causal, "window": window, "padded": padded, "dense": dense}
    wanted = [allows[part] for part in allows if part in parts]
    if not wanted:
        return None
    batch = inputs.q.shape[0] if "padded" in parts else None
    queries, keys, device = inputs.q.shape[2], inputs.k.shape[2], inputs.q.device
    return create_block_mask(and_masks(*wanted), batch, None, queries, keys, device=device)


def flash_attn(kind: str, inputs: AttentionInputs) -> Outputs:
    """The flash-attn package; (B, L, H, D)."""
    if kind not in ("full", "causal", "dropout", "window", "gqa"):
        raise UnsupportedError(f"flash_attn_func does not take what {kind} needs")
    from flash_attn import flash_attn_func

    out = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v)),
        dropout_p=inputs.dropout_p,
        causal=inputs.causal,
        window_size=(WINDOW, 0) if kind == "window" else (-1, -1),
    )
    return (out.transpose(1, 2),)


def xformers_attention(kind: str, inputs: AttentionInputs) -> Outputs:
    """xFormers' memory-efficient attention; (B, L, H, D)."""
    if kind not in ("full", "causal", "dropout", "bias"):
        raise UnsupportedError(f"memory_efficient_attention is not set up for {kind} here")
    from xformers import ops

    bias: Any = None
    if inputs.causal:
        bias = ops.LowerTriangularMask()
    elif inputs.bias is not None:
        bias = inputs.bias.expand(inputs.q.shape[0], -1, -1, -1)
    out = ops.memory_efficient_attention(
        *(tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v)),
        attn_bias=bias,
        p=inputs.dropout_p,
    )
    return (out.transpose(1, 2),)


def liger_norm(kind: str, inputs: NormInputs) -> Outputs:
    """Liger Kernel's norms, their results never written over their inputs."""
    if kind == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Rms

        offset, casting_mode, in_place = 0.0, "llama", False
        return (Rms.apply(inputs.x, inputs.weight, EPS, offset, casting_mode, in_place),)
    if kind != "layer_norm":
        raise UnsupportedError(f"Liger Kernel has no {kind} of this form")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return (LigerLayerNormFunction.apply(inputs.x, inputs.weight, inputs.bias, EPS),)
