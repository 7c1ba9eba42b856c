"""The implementations to verify: a backend of rowmax.kernels, or a stranger's function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import kernels
from ...kernels import ALiBi, Causal, Mask
from ...kernels.backends.dispatch import PREFERENCE
from ...kernels.testing.oracle import AttentionCase, Kernel
from ...kernels.testing.suite import ATTENTION_OPS, OPS
from ..candidate import Candidate, DeclinedError
from ..conduct.guard import Guard
from .contracts import ROWMAX, Contract

__all__ = ["Backend", "DeclinedError", "Foreign", "Implementation", "contract_of"]


class Implementation(Protocol):
    """Functions of rowmax.kernels as somebody implements them; results differentiable."""

    name: str
    ops: tuple[str, ...]
    device: torch.device = torch.device("cpu")
    with_lse: bool = True  # whether `attention` returns it
    backward: bool = True  # whether its gradients are looked at

    def kernel(self, op: str) -> Kernel:
        """The function, called as `assert_as_accurate_as_naive` says. It raises DeclinedError."""


class Backend(Implementation):
    """A backend of rowmax.kernels, by its name."""

    ops = OPS

    def __init__(self, name: str) -> None:
        self.name = name
        on_gpu = name in PREFERENCE["cuda"] and name not in PREFERENCE["cpu"]
        self.device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")

    def kernel(self, op: str) -> Kernel:
        more = {"return_lse": True} if op in ATTENTION_OPS else {}

        def call(*tensors: Tensor, **options: Any) -> Any:
            try:
                return getattr(kernels, op)(*tensors, **options, **more, backend=self.name)
            except RuntimeError as error:
                reason = str(error).partition("can't do this: ")[2]
                if not reason:
                    raise  # it is no refusal
                raise DeclinedError(reason.partition("; backend=")[0]) from error

        return call


class Foreign(Implementation):
    """A stranger's function, by the interface that its `Candidate` gives it.

    Masks are handed over as bool tensors, True = may attend, or as `is_causal=True` where that is
    all there is; biases, ALiBi among them, as a float `attn_mask` with -inf where masked.
    """

    with_lse = False

    def __init__(
        self,
        candidate: Candidate | Callable[..., Any],
        name: str | None = None,
        device: torch.device | str = "cpu",
        guard: Guard | None = None,
        contract: Contract = ROWMAX,
    ) -> None:
        if not isinstance(candidate, Candidate):
            candidate = Candidate(candidate, name)
        self.candidate = candidate
        self.contract = contract
        self.guard = guard or Guard()  # from before the function was imported, where it is given
        self.name = name or candidate.name
        self.device = torch.device(device)
        self.backward = candidate.backward
        self.ops = candidate.ops

    def kernel(self, op: str) -> Kernel:
        if op == "attention":
            return self._attention
        return self.candidate.varlen if op == "attention_varlen" else self.candidate.row

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not {"sinks", "softcap"}.isdisjoint(options):
            raise DeclinedError("SDPA's signature has neither softcap nor sinks")
        if options.get("dropout_p", 0.0) > 0.0:
            raise DeclinedError("SDPA's signature has no seed: its dropout is checked apart")
        call = AttentionCase(q, k, v, options.get("mask"), options.get("bias"))
        mask, is_causal = self._masks(call)
        chosen: dict[str, Any] = {}
        if options.get("scale") is not None:
            chosen["scale"] = options["scale"]
        if q.shape[1] != k.shape[1]:
            chosen["enable_gqa"] = True
        return self.candidate.attention(
            *(q, k, v), attn_mask=mask, dropout_p=0.0, is_causal=is_causal, **chosen
        )

    def _masks(self, call: AttentionCase) -> tuple[Tensor | None, bool]:
        """attn_mask and is_causal."""
        q, mask, bias = call.q, call.mask, call.bias
        square = call.shape[2] == call.shape[3]
        if bias is None and square and isinstance(mask, Causal) and mask.align is mask.prefix:
            return None, True
        allowed = mask.dense(*call.shape) if isinstance(mask, Mask) else mask
        if allowed is not None:
            allowed = allowed.expand(call.shape)
        if isinstance(bias, ALiBi):
            if q.dtype.itemsize < 4:
                raise DeclinedError("ALiBi as an attn_mask in half precision is another bias")
            bias = bias.dense(*call.shape).to(q.dtype)
        if bias is None:
            return allowed, False
        bias = bias.expand(call.shape)
        return (bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)), False


def contract_of(implementation: Implementation) -> Contract:
    """A stranger's may be torch's; everything else promises what rowmax does."""
    return implementation.contract if isinstance(implementation, Foreign) else ROWMAX
