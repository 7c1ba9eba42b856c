"""My rms_norm. Replace what stands in it; see docs/bring-your-kernel.md of rowmax.

    python -m rowmax.bench verify --function FILE --contract torch
    python -m rowmax.bench speed --function FILE --shape 4096,1024

The arguments are known by their names: leave out what your kernel can't do, and it is not asked for
(it is reported as declined).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,  # (rows, columns)
    weight: Tensor | None = None,  # (columns,)
    eps: float = 1e-6,
) -> Tensor:  # as x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)
