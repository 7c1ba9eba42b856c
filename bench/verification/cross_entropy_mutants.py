"""linear_cross_entropy broken in the ways that kernels of it break; see `mutation.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.testing.oracle import Kernel
from .implementations import Implementation

# what is wrong, by the fault's name
FAULTS = {
    "smoothing-left-out": "the targets are not smoothed",
    "smoothing-of-others": "the smoothed share is spread over the V - 1 other words",
    "ignored-counted": "the mean is over all tokens, ignored ones too",
    "ignored-learned": "ignored tokens have a gradient",
    "logits-without-maximum": "exp of the logits as they are",
    "logits-in-half": "the logits are rounded to bfloat16",
    "probabilities-in-half": "the softmax of the gradient is rounded to bfloat16",
    "last-tokens-lost": "the weight's gradient lacks the last chunk of tokens",
    "first-tokens-lost": "the weight's gradient is that of the last chunk alone",
    "target-shifted": "each token is held to the target of the next one",
    "gradient-not-averaged": "the gradients are those of the sum",
    "grad-loss-left-out": "the gradients are not multiplied by the gradient of the loss",
}
# In half precision the rounding of the logits is as large.
WIDE_ONLY = frozenset({"logits-in-half", "probabilities-in-half"})


class CrossEntropyMutant(Implementation):
    """linear_cross_entropy with one fault of FAULTS: an implementation like any other."""

    ops = ("linear_cross_entropy",)

    def __init__(self, fault: str) -> None:
        self.name = self.fault = fault

    def kernel(self, op: str) -> Kernel:
        def call(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
            return _Faulty.apply(x, weight, target, options, self.fault)

        return call


class _Faulty(torch.autograd.Function):
    """The loss and both gradients by their formulas."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, options: dict[str, Any], fault: str
    ) -> Tensor:
        stored, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
        smoothing = options.get("label_smoothing", 0.0)
        averaged = options.get("reduction", "mean") == "mean"
        if fault == "smoothing-left-out":
            smoothing = 0.0
        if fault == "target-shifted":
            target = target.roll(-1)
        used = (target != options.get("ignore_index", -100)).to(dtype)
        logits = F.linear(x, weight).to(dtype)
        if fault == "logits-in-half":
            logits = logits.to(torch.bfloat16).to(dtype)
        vocabulary = len(weight)
        spread = vocabulary - 1 if fault == "smoothing-of-others" else vocabulary
        share = smoothing / max(1, spread)
        hit = F.one_hot(target.masked_fill(used == 0, 0), vocabulary).to(dtype)
        wanted = hit * (1.0 - smoothing) + share
        if fault == "smoothing-of-others":
            wanted = wanted - hit * share
        log_p = logits.log_softmax(-1)
        if fault == "logits-without-maximum":
            log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        p = log_p.exp()
        if fault == "probabilities-in-half":
            p = p.to(torch.bfloat16).to(dtype)
        count: Any = 1
        if averaged:
            count = len(target) if fault == "ignored-counted" else used.sum()
        rows = p - wanted
        if fault != "ignored-learned":
            rows = rows * used.unsqueeze(-1)
        rows = (rows if fault == "gradient-not-averaged" else rows / count).to(stored)
        chunk = max(1, len(x) // 4)
        part = slice(None)
        if fault == "last-tokens-lost":
            part = slice(0, -chunk)
        elif fault == "first-tokens-lost":
            part = slice(-chunk, None)
        ctx.save_for_backward(rows @ weight, rows[part].t() @ x[part])
        ctx.fault = fault
        return (-(log_p * wanted).sum(-1) * used).sum() / count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        factor = 1.0 if ctx.fault == "grad-loss-left-out" else grads[0]
        d_x, d_weight = ctx.saved_tensors
        return (d_x * factor).to(d_x.dtype), (d_weight * factor).to(d_x.dtype), None, None, None
