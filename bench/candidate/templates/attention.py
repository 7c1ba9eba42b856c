"""My attention. Replace what stands in it; see docs/bring-your-kernel.md of rowmax.

    python -m rowmax.bench verify --function FILE --contract torch
    python -m rowmax.bench speed --function FILE --shape 8,8,512,64 --kind full,causal

The arguments are known by their names: leave out what your kernel can't do, and it is not asked for
(it is reported as declined). A mask is bool, True = may attend, or float and added to the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,  # (B, H, Lq, D); with --layout blhd (B, Lq, H, D)
    k: Tensor,  # (B, H, Lk, D)
    v: Tensor,  # (B, H, Lk, Dv)
    attn_mask: Tensor | None = None,  # broadcastable to (B, H, Lq, Lk)
    is_causal: bool = False,  # only where Lq == Lk
    scale: float | None = None,  # default: 1 / sqrt(D)
) -> Tensor:  # (B, H, Lq, Dv)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-1, -2)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
        # a query that may attend nothing gets zeros
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    else:
        weights = scores.softmax(-1)
    return weights @ v
