"""masked_softmax against float64, forward and gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rowmax.kernels import Causal, Dense, Documents, KeyLengths, Mask, Window, masked_softmax
from rowmax.kernels.testing.rows import RowCase

from .backends import device_of, dtype_name
from .cases import lengths
from .support import DTYPES, assert_parity

MASKS: dict[str, Mask | Tensor | None] = {
    "none": None,
    "causal": Causal("lower_right"),
    "window_keys": Window(3, 1, "upper_left") & KeyLengths(lengths(9, 2)),
    "empty_rows": KeyLengths(lengths(0, 5)),
    "dense": torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.5,
    "dense_row": Dense(torch.arange(9) % 3 > 0),
    "documents": Documents(torch.arange(7).expand(2, 7) // 3, torch.arange(9).expand(2, 9) // 3),
}


def check(backend: str, scores: Tensor, mask: Mask | Tensor | None, scale: float) -> None:
    scores = scores.to(device_of(backend))
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(scores.shape, generator=generator, dtype=torch.float64).to(scores)
    case = RowCase("masked_softmax", {"scores": scores}, (grad,), mask, {"scale": scale})
    assert_parity(case.run(partial(masked_softmax, backend=backend)), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dtype: torch.dtype, backend: str) -> None:
    scores = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    check(backend, scores, MASKS[name], 0.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(
    "shape",
    [(1,), (9,), (5, 9), (3, 5, 9), (2, 2, 1, 1), (1, 2, 3, 1000), (2, 1, 70, 129)],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    check(backend, scores, None, -1.3)
    check(backend, scores * 100, torch.arange(shape[-1]) % 4 != 1, 1.0)


@pytest.mark.parametrize(
    "shape", [(0,), (0, 3), (3, 0), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str
)
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    scores = torch.ones(shape, device=device_of(backend), requires_grad=True)
    weights = masked_softmax(scores, backend=backend)
    assert weights.shape == shape
    weights.sum().backward()
    assert scores.grad is not None
    assert scores.grad.shape == shape


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts(layout: str, backend: str) -> None:
    scores = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(4))
    moved = {
        "transposed": scores.transpose(1, 3).contiguous().transpose(1, 3),
        "strided": scores.repeat_interleave(2, -1)[..., ::2],
        "expanded": scores[:, :1].expand(2, 3, 7, 9),
    }[layout]
    check(backend, moved, Causal("upper_left"), 1.0)


def documents(name: str, batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """(B, Lq) and (B, Lk) of the same few ids."""
    generator = torch.Generator().manual_seed(5)
    named = torch.tensor([-3, 0, 2**40, 2**40 + 2**32, -(2**63)])
    drawn = (torch.randint(5, (batch, length), generator=generator) for length in (queries, keys))
    chosen = [named[numbers] for numbers in drawn]
    if name == "packed":
        chosen = [ids.sort(dim=1).values for ids in chosen]
    if name == "one":
        chosen = [torch.zeros_like(ids) for ids in chosen]
    if name == "some_without_keys":
        chosen[1] = torch.where(chosen[1] == 0, -3, chosen[1])
    return chosen[0], chosen[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("queries,keys", [(70, 129), (33, 16), (5, 300), (4, 1)])
@pytest.mark.parametrize("name", ["packed", "mixed", "one", "some_without_keys"])
def test_documents(name: str, queries: int, keys: int, dtype: torch.dtype, backend: str) -> None:
    """Ranges of keys that begin and end at any lane, ids of 64 bits, documents without a key."""
    scores = torch.randn(2, 3, queries, keys, generator=torch.Generator().manual_seed(6)).to(dtype)
    ids = Documents(*documents(name, 2, queries, keys))
    check(backend, scores, ids, 1.3)
    dense = Dense(torch.rand(3, 1, keys, generator=torch.Generator().manual_seed(7)) < 0.6)
    lengths = KeyLengths(torch.tensor([keys // 2, keys]))
    check(backend, scores, ids & Causal("lower_right") & dense & lengths, -0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("name", ["packed", "mixed"])
def test_nothing_of_other_documents_is_felt(name: str, dtype: torch.dtype, backend: str) -> None:
    queries, keys = 37, 150
    mask = Documents(*documents(name, 2, queries, keys))
    scores = torch.randn(2, 1, queries, keys, generator=torch.Generator().manual_seed(8)).to(dtype)
    foreign = torch.where(mask.dense(2, 1, queries, keys), scores, torch.nan)
    plain, strange = (
        masked_softmax(tensor.to(device_of(backend)), mask, 0.9, backend=backend)
        for tensor in (scores, foreign)
    )
    assert torch.equal(plain, strange)
