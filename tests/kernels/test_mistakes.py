"""The likeliest mistakes: each error names the argument, what came, what was expected and the fix.

What the sentence proposes is tried as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import rowmax.kernels as rk

Q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
BY_LENGTH, LONGER = Q.transpose(1, 2), torch.zeros(2, 9, 4, 8)  # (B, L, H, D)
TOKENS = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
LENGTHS, PAIRS = TOKENS.sum(-1), torch.ones(2, 6, 6).bool()
PACKED, STARTS = torch.zeros(12, 4, 8), torch.tensor([0, 4, 12])
X, W = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8)
IDS = torch.tensor([0, 0, 0, 1, 1, 1])


def attend(**changes: Any) -> Any:
    return rk.attention(**({"q": Q, "k": Q, "v": Q} | changes))


def packed(*more: Any, **changes: Any) -> Any:
    starts = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS} | changes
    return rk.attention_varlen(PACKED, PACKED, PACKED, *starts.values(), *more)


# what is wrong -> the call, the sentence in its parts, and the call as the sentence would have it
MISTAKES: dict[str, tuple[Callable[[], Any], tuple[str, ...], Callable[[], Any]]] = {
    "heads behind the length": (
        lambda: attend(q=BY_LENGTH, k=LONGER, v=LONGER),
        (
            "attention: `k`",
            "divides the 6",
            "got 9 heads",
            "(B, L, H, D), pass each one's .transpose(1, 2)",
        ),
        lambda: attend(k=LONGER.transpose(1, 2), v=LONGER.transpose(1, 2)),
    ),
    "three dimensions": (
        lambda: attend(q=Q[0]),
        ("attention: `q`", "(B, Hq, Lq, D)", "got shape (4, 6, 8)", "q[None] where the batch is"),
        lambda: attend(q=Q[0][None], k=Q[:1], v=Q[:1]),
    ),
    "keys for one batch element": (
        lambda: attend(k=Q[:1], v=Q[:1]),
        ("attention: `k`", "B = 2", "got shape (1, 4, 6, 8)", "pass k.expand(2, -1, -1, -1)"),
        lambda: attend(k=Q[:1].expand(2, -1, -1, -1), v=Q[:1].expand(2, -1, -1, -1)),
    ),
    "an array": (
        lambda: attend(q=Q.numpy()),
        ("attention: `q`", "torch.Tensor", "got ndarray", "pass torch.from_numpy(q)"),
        lambda: attend(q=torch.from_numpy(Q.numpy())),
    ),
    "integers": (
        lambda: attend(q=Q.long()),
        ("attention: `q`", "float64, float32", "got torch.int64", "pass q.float()"),
        lambda: attend(q=Q.long().float()),
    ),
    "two dtypes": (
        lambda: attend(k=Q.half()),
        ("attention: `k`", "torch.float32, that of `q`", "float16", "pass k.to(torch.float32)"),
        lambda: attend(k=Q.half().to(torch.float32)),
    ),
    "a float mask": (
        lambda: attend(mask=torch.zeros(6, 6)),
        ("Dense: `tensor`", "bool, True = may attend", "masks as `bias`", "got torch.float32"),
        lambda: attend(bias=torch.zeros(6, 6)),
    ),
    "a mask of integers": (
        lambda: attend(mask=torch.ones(6, 6).int()),
        ("Dense: `tensor`", "bool, True = may attend", "got torch.int32", "tensor == 1"),
        lambda: attend(mask=torch.ones(6, 6).int() == 1),
    ),
    "a bool bias": (
        lambda: attend(bias=PAIRS[0]),
        ("attention: `bias`", "a float tensor (pass bool ones as `mask`)", "got dtype bool"),
        lambda: attend(mask=PAIRS[0]),
    ),
    "a padding mask as it is": (
        lambda: attend(mask=TOKENS),
        ("Dense: `tensor`", "(2, 4, 6, 6)", "got shape (2, 6)", "pass tensor[:, None, None, :]"),
        lambda: attend(mask=TOKENS[:, None, None, :]),
    ),
    "a mask without heads": (
        lambda: attend(mask=PAIRS),
        ("Dense: `tensor`", "(2, 4, 6, 6)", "got shape (2, 6, 6)", "pass tensor[:, None]"),
        lambda: attend(mask=PAIRS[:, None]),
    ),
    "a padding mask as lengths": (
        lambda: attend(mask=rk.KeyLengths(TOKENS)),
        (
            "KeyLengths: `lengths`",
            "integer",
            "got torch.bool",
            "True = a token, pass lengths.sum(-1)",
        ),
        lambda: attend(mask=rk.KeyLengths(TOKENS.sum(-1))),
    ),
    "float lengths": (
        lambda: attend(mask=rk.KeyLengths(LENGTHS.float())),
        ("KeyLengths: `lengths`", "an integer dtype", "got torch.float32", "pass lengths.long()"),
        lambda: attend(mask=rk.KeyLengths(LENGTHS.float().long())),
    ),
    "a list of lengths": (
        lambda: attend(mask=rk.KeyLengths([4, 6])),  # type: ignore[arg-type]
        ("KeyLengths: `lengths`", "torch.Tensor", "got list", "pass torch.tensor(lengths)"),
        lambda: attend(mask=rk.KeyLengths(torch.tensor([4, 6]))),
    ),
    "lengths elsewhere": (
        lambda: attend(mask=rk.KeyLengths(LENGTHS.to("meta"))),
        ("KeyLengths: `lengths`", "cpu", "got device meta", 'pass lengths.to("cpu")'),
        lambda: attend(mask=rk.KeyLengths(LENGTHS.to("cpu"))),
    ),
    "documents of one sequence": (
        lambda: attend(mask=rk.Documents(IDS)),
        ("Documents: `ids`", "(B, L)", "got shape (6,)", "pass ids[None]"),
        lambda: attend(q=Q[:1], k=Q[:1], v=Q[:1], mask=rk.Documents(IDS[None])),
    ),
    "masks joined by a word": (
        lambda: attend(mask=rk.Causal() and rk.KeyLengths(LENGTHS)),
        ("a mask is neither true nor false", "join masks by `&`"),
        lambda: attend(mask=rk.Causal() & rk.KeyLengths(LENGTHS)),
    ),
    "a class as a mask": (
        lambda: attend(mask=rk.Causal),
        ("attention: `mask`", "a mask object", "got type", "pass an instance, Causal(...)"),
        lambda: attend(mask=rk.Causal()),
    ),
    "a flag as a mask": (
        lambda: attend(mask=True),
        ("attention: `mask`", "a mask object", "got bool", "pass Causal()"),
        lambda: attend(mask=rk.Causal()),
    ),
    "torch's keyword": (
        lambda: attend(is_causal=True),
        ("attention() got an unexpected keyword argument 'is_causal'", "pass mask=Causal()"),
        lambda: attend(mask=rk.Causal()),
    ),
    "torch's keyword, explained": (
        lambda: rk.explain(Q, Q, Q, attn_mask=PAIRS[0]),
        ("explain() got an unexpected keyword argument 'attn_mask'", "pass a bool tensor"),
        lambda: rk.explain(Q, Q, Q, mask=PAIRS[0]),
    ),
    "causal where lengths differ": (
        lambda: attend(q=Q[:, :, :2], mask=rk.Causal()),
        ("`align` is needed", "Lq = 2", "Lk = 6", '"lower_right" (the last query'),
        lambda: attend(q=Q[:, :, :2], mask=rk.Causal("lower_right")),
    ),
    "a tensor as scale": (
        lambda: attend(scale=torch.tensor(0.5)),
        ("attention: `scale`", "a number", "got Tensor", "pass scale.item()"),
        lambda: attend(scale=torch.tensor(0.5).item()),
    ),
    "dropout in percent": (
        lambda: attend(dropout_p=10),
        ("attention: `dropout_p`", "a probability in [0, 1]", "got 10.0", "pass 0.1 for 10 %"),
        lambda: attend(dropout_p=0.1),
    ),
    "a mask of integers for torch's function": (
        lambda: rk.scaled_dot_product_attention(Q, Q, Q, PAIRS[0].int()),
        (
            "attention: `attn_mask`",
            "bool, True = may attend",
            "got torch.int32",
            "pass attn_mask.bool()",
        ),
        lambda: rk.scaled_dot_product_attention(Q, Q, Q, PAIRS[0].int().bool()),
    ),
    "lengths for offsets": (
        lambda: packed(cu_seqlens_q=torch.tensor([4, 8])),
        ("`cu_seqlens_q`", "begin with 0", "got [4, 8]", "pass F.pad(lengths.cumsum(0), (1, 0))"),
        lambda: packed(cu_seqlens_q=F.pad(torch.tensor([4, 8]).cumsum(0), (1, 0))),
    ),
    "float offsets": (
        lambda: packed(cu_seqlens_k=STARTS.float()),
        ("`cu_seqlens_k`", "(n + 1,) ints", "got torch.float32", "pass cu_seqlens_k.int()"),
        lambda: packed(cu_seqlens_k=STARTS.float().int()),
    ),
    "bounds by position": (
        lambda: packed(8, 8),
        (
            "attention_varlen: `mask`",
            "None or Causal",
            "got int",
            "pass bounds by keyword",
        ),
        lambda: rk.attention_varlen(
            *(PACKED, PACKED, PACKED, STARTS, STARTS), max_seqlen_q=8, max_seqlen_k=8
        ),
    ),
    "a shape, as for torch's layer norm": (
        lambda: rk.layer_norm(X, (8,)),  # type: ignore[arg-type]
        ("layer_norm: `weight`", "torch.Tensor, or None", "got (8,)", "leave the shape out"),
        lambda: rk.layer_norm(X),
    ),
    "a weight of two dimensions": (
        lambda: rk.rms_norm(X, W[None]),
        ("rms_norm: `weight`", "(N,) = (8,)", "got shape (1, 8)", "pass weight.flatten()"),
        lambda: rk.rms_norm(X, W[None].flatten()),
    ),
    "a half residual": (
        lambda: rk.add_layer_norm(X, X.half()),
        ("`residual`", "torch.float32, that of `x`", "float16", "pass residual.to(torch.float32)"),
        lambda: rk.add_layer_norm(X, X.half().to(torch.float32)),
    ),
    "a float mask for softmax": (
        lambda: rk.masked_softmax(X, np.ones(8)),  # type: ignore[arg-type]
        ("masked_softmax: `mask`", "a bool tensor or a mask object", "pass torch.from_numpy(mask)"),
        lambda: rk.masked_softmax(X, torch.from_numpy(np.ones(8)) == 1),
    ),
}


@pytest.mark.parametrize("wrong, parts, right", MISTAKES.values(), ids=MISTAKES)
def test_the_error_says_what_to_do(
    wrong: Callable[[], Any], parts: tuple[str, ...], right: Callable[[], Any]
) -> None:
    with pytest.raises((TypeError, ValueError), match=".*".join(map(re.escape, parts))):
        wrong()
    right()


def test_half_parameters_beside_float32_are_no_mistake() -> None:
    for norm in (rk.layer_norm(X, W.half(), W.half()), rk.rms_norm(X, W.bfloat16())):
        assert norm.dtype == torch.float32
