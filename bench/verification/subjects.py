"""What can be judged: a backend of rowmax.kernels, or any callable with SDPA's signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import kernels
from ...kernels import ALiBi, Causal, Mask
from ...kernels.dispatch import PREFERENCE
from ...kernels.testing.oracle import Arguments

ATTENTION_OPS = ("attention", "attention_varlen")
ROW_OPS = ("layer_norm", "add_layer_norm", "rms_norm", "masked_softmax")
OPS = (*ATTENTION_OPS, *ROW_OPS)


class DeclinedError(Exception):
    """The subject has no way to express or compute this; its text says why."""


class Subject(Protocol):
    """Attention and row-wise functions that are to be judged; results differentiable."""

    name: str
    device: torch.device
    ops: tuple[str, ...]
    with_lse: bool  # whether `attention` returns it

    def attention(self, arguments: Arguments) -> tuple[Tensor, Tensor | None]:
        """out (B, Hq, Lq, Dv) and lse (B, Hq, Lq). Raises DeclinedError."""

    def packed(
        self, arguments: Arguments, starts_q: Tensor, starts_k: Tensor
    ) -> tuple[Tensor, Tensor]:
        """out (total, Hq, Dv) and lse (Hq, total) of q (total, Hq, D), ... Raises DeclinedError."""

    def rows(
        self, op: str, inputs: dict[str, Tensor], mask: Mask | None, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """The outputs of a row-wise function. Raises DeclinedError."""


class Backend:
    """A backend of rowmax.kernels, by its name."""

    ops: tuple[str, ...] = OPS
    with_lse = True

    def __init__(self, name: str) -> None:
        self.name = name
        on_gpu = name in PREFERENCE["cuda"] and name not in PREFERENCE["cpu"]
        self.device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")

    def attention(self, arguments: Arguments) -> tuple[Tensor, Tensor | None]:
        with _Refusals():
            return kernels.attention(
                arguments.q,
                arguments.k,
                arguments.v,
                mask=arguments.mask,
                bias=arguments.bias,
                sinks=arguments.sinks,
                return_lse=True,
                backend=self.name,
                **arguments.options,
            )

    def packed(
        self, arguments: Arguments, starts_q: Tensor, starts_k: Tensor
    ) -> tuple[Tensor, Tensor]:
        with _Refusals():
            return kernels.attention_varlen(
                arguments.q,
                arguments.k,
                arguments.v,
                starts_q,
                starts_k,
                mask=arguments.mask if isinstance(arguments.mask, Mask) else None,
                bias=arguments.bias if isinstance(arguments.bias, ALiBi) else None,
                sinks=arguments.sinks,
                return_lse=True,
                backend=self.name,
                **arguments.options,
            )

    def rows(
        self, op: str, inputs: dict[str, Tensor], mask: Mask | None, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        with _Refusals():
            if op == "masked_softmax":
                scores = inputs["scores"]
                return (kernels.masked_softmax(scores, mask, backend=self.name, **options),)
            function = getattr(kernels, op)
            outputs = function(**inputs, backend=self.name, **options)
            return outputs if isinstance(outputs, tuple) else (outputs,)


class _Refusals:
    """Turns the error by which a named backend declines a problem into DeclinedError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        text = str(error)
        if isinstance(error, RuntimeError) and "can't do this: " in text:
            reason = text.partition("can't do this: ")[2].partition("; backend=")[0]
            raise DeclinedError(reason) from error


SdpaLike = Callable[..., Tensor]


class Sdpa:
    """A callable with the signature of torch.nn.functional.scaled_dot_product_attention.

    Masks are handed over as bool tensors, True = may attend, or as `is_causal=True` where that is
    all there is; biases, ALiBi among them, as a float `attn_mask` with -inf where masked.
    """

    ops: tuple[str, ...] = ("attention",)
    with_lse = False

    def __init__(
        self, function: SdpaLike, name: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.function = function
        self.name = str(name or getattr(function, "__qualname__", type(function).__name__))
        self.device = torch.device(device)

    def attention(self, arguments: Arguments) -> tuple[Tensor, Tensor | None]:
        options = arguments.options
        if arguments.sinks is not None or options.get("softcap") is not None:
            raise DeclinedError("SDPA's signature has neither softcap nor sinks")
        if options.get("dropout_p", 0.0) > 0.0:
            raise DeclinedError("SDPA's signature has no seed: its dropout is checked apart")
        mask, is_causal = self._masks(arguments)
        chosen: dict[str, Any] = {}
        if options.get("scale") is not None:
            chosen["scale"] = options["scale"]
        if arguments.q.shape[1] != arguments.k.shape[1]:
            chosen["enable_gqa"] = True
        out = self.function(
            arguments.q,
            arguments.k,
            arguments.v,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=is_causal,
            **chosen,
        )
        return out, None

    def _masks(self, arguments: Arguments) -> tuple[Tensor | None, bool]:
        """attn_mask and is_causal."""
        q, mask, bias = arguments.q, arguments.mask, arguments.bias
        square = arguments.shape[2] == arguments.shape[3]
        if bias is None and square and isinstance(mask, Causal) and mask.align is None:
            return None, True
        allowed = mask.dense(*arguments.shape) if isinstance(mask, Mask) else mask
        if allowed is not None:
            allowed = allowed.expand(arguments.shape)
        if isinstance(bias, ALiBi):
            if q.dtype.itemsize < 4:
                raise DeclinedError("ALiBi as an attn_mask in half precision is another bias")
            bias = bias.dense(*arguments.shape).to(q.dtype)
        if bias is None:
            return allowed, False
        bias = bias.expand(arguments.shape)
        return (bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)), False

    def packed(
        self, arguments: Arguments, starts_q: Tensor, starts_k: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise DeclinedError("SDPA's signature has no packed sequences")

    def rows(
        self, op: str, inputs: dict[str, Tensor], mask: Mask | None, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        raise DeclinedError(f"SDPA's signature has no {op}")
