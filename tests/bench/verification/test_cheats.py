"""Cheating candidates: `verify` and `speed` reject each, and accept honest ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from rowmax.bench import speed, verify
from rowmax.bench.verification.cheats import CHEATS

pytestmark = pytest.mark.usefixtures("known_limits")

SHAPE = (3, 4, 40, 16)


def by_verify(function: Any, **chosen: Any) -> list[str]:
    """What is a failure even where no more is promised than by torch."""
    found: dict[str, Any] = {"dtypes": ["float32"], "checks": ["invariants"], "contract": "torch"}
    return verify(function, **{**found, **chosen}).failures


def by_speed(function: Any, **chosen: Any) -> str | None:
    few: dict[str, Any] = {"kinds": ["full"], "peers": ["sdpa"], "seconds": 0.05}
    rows = speed(
        function, shapes=[SHAPE], backend="reference", **{"backward": False, **few, **chosen}
    ).rows
    return next((row.faults["yours"] for row in rows if "yours" in row.faults), None)


@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("judge", ["verify", "speed"])
def test_a_cheat_is_rejected(name: str, judge: str) -> None:
    cheat = CHEATS[name]
    if judge not in cheat.seen_by:
        assert cheat.reason
        return
    with ExitStack() as stack:
        candidate = cheat.make(stack)
        if judge == "verify":
            assert by_verify(candidate)
        else:
            assert by_speed(candidate, backward="gradients" in name) is not None


# --- honest kernels -------------------------------------------------------------------------------


def by(backend: SDPBackend) -> Callable[..., Tensor]:
    def sdpa(*arguments: Any, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*arguments, **options)

    return sdpa


def matmul(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The equation by torch.matmul, in the dtype of the inputs throughout."""
    if options.get("enable_gqa"):
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale, attn_mask = options.get("scale"), options.get("attn_mask")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if options.get("is_causal"):
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores, attn_mask = scores + attn_mask, attn_mask != -torch.inf
    if attn_mask is not None:
        none = ~attn_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~attn_mask, -torch.inf).masked_fill(none, 0.0)
        weights = scores.softmax(-1).masked_fill(none, 0.0)
    else:
        weights = scores.softmax(-1)
    return torch.matmul(F.dropout(weights, options.get("dropout_p", 0.0)), value)


def flex(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """FlexAttention with the mask as a score_mod, uncompiled: shapes differ from call to call."""
    options.pop("dropout_p")
    mask, is_causal = options.pop("attn_mask"), options.pop("is_causal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        if mask is not None:
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])

        def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if mask.dtype == torch.bool:
                return torch.where(mask[b, h, i, j], score, -torch.inf)
            return score + mask[b, h, i, j]

        if not torch.is_grad_enabled():  # it refuses what could have a gradient
            query, key, value = query.detach(), key.detach(), value.detach()
        return flex_attention(query, key, value, None if mask is None else add, **options)


HONEST: dict[str, Callable[..., Tensor]] = {
    "sdpa": F.scaled_dot_product_attention,
    "sdpa-flash": by(SDPBackend.FLASH_ATTENTION),
    "sdpa-math": by(SDPBackend.MATH),
    "matmul": matmul,
    "flex": flex,
}
# What each can't do at all is refused by an error of its own, which is no cheat.
KINDS = ["none", "causal", "dense", "bias", "scale", "poisoned-padding", "poisoned-bias"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_kernel_is_accepted(name: str, dtype: str) -> None:
    """By both; what it does not promise is reported, and no failure."""
    function = HONEST[name]
    if name != "flex":  # which has no dropout
        report = verify(
            function,
            kinds=KINDS,
            dtypes=[dtype],
            checks=["accuracy", "invariants"],
            quick=True,
            contract="torch",
        )
        refused = [text for text in report.failures if "No available kernel" in text]
        assert report.failures == (refused if name == "sdpa-flash" else [])
        assert any("NaN in padding" in text for text in report.not_promised)
        assert "n.p." in str(report)
    assert by_speed(function, dtype=getattr(torch, dtype), kinds=["full", "causal"]) is None


def test_what_is_refused_by_an_error_is_no_cheat_and_is_told() -> None:
    def picky(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[2] % 16:
            raise NotImplementedError("lengths of whole tiles only")
        return F.scaled_dot_product_attention(query, key, value, **options)

    with pytest.warns(RuntimeWarning, match="refused .* of 12 checks, .*lengths of whole tiles"):
        (row,) = speed(
            picky,
            shapes=[(3, 4, 32, 16)],
            kinds=["full"],
            peers=["sdpa"],
            seconds=0.05,
            backend="reference",
            backward=False,
        ).rows
    assert "yours" in row.timings


def test_with_rowmaxs_contract_the_same_is_a_failure() -> None:
    report = verify(
        F.scaled_dot_product_attention,
        kinds=["poisoned-padding"],
        dtypes=["float32"],
        checks=["accuracy"],
    )
    assert not report.passed
    assert report.not_promised == []
