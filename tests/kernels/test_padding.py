"""Rows that may attend nothing, and keys and queries that nobody uses, whatever these hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk

from .backends import device_of, dtype_name
from .cases import Case, Shape, lengths
from .support import AttentionCase, random_gradients, run

# a head that fills whole vectors, which a kernel may read in place, and one that does not
SHAPES = {"whole": Shape(2, 4, 2, 11, 11, 32, 16), "odd": Shape(2, 4, 2, 11, 11, 7, 9)}
SHAPE = SHAPES["whole"]  # all have the same B, heads and lengths
COLUMNS = torch.arange(11)
MASKS: dict[str, rk.Mask | Tensor] = {
    "keys": rk.KeyLengths(lengths(0, 7)),
    "keys_queries": rk.KeyLengths(lengths(11, 7)) & rk.QueryLengths(lengths(0, 6)),
    "causal_before": rk.Causal(-4),
    "causal_tensor": rk.Causal(lengths(-11, -2)) & rk.KeyLengths(lengths(11, 5)),
    "window_beyond": rk.Window(2, 0, 8),
    "prefix_window": rk.Causal("upper_left", lengths(4, 3)) & rk.Window(0, None, 1),
    "dense_columns": rk.Dense(COLUMNS < 6),
    "dense_rows": (COLUMNS < 6).view(11, 1) & (COLUMNS % 2 == 0),
    "dense_none": torch.zeros(1, dtype=torch.bool),
    "documents": rk.Documents(COLUMNS.expand(2, 11) // 3, COLUMNS.expand(2, 11) // 2 + 2),
}
POISONS = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def padded(
    mask: rk.Mask | Tensor, dtype: torch.dtype, backend: str, shape: Shape = SHAPE
) -> tuple[AttentionCase, Tensor]:
    """AttentionCase of a padded call, and which query may attend which key."""
    case = Case("padded", shape, lambda shape, generator: mask)
    arguments = case.build(dtype, device_of(backend))
    dense = mask.dense(*SHAPE.scores) if isinstance(mask, rk.Mask) else mask.expand(SHAPE.scores)
    return arguments, dense.to(arguments.q.device)


EVERY_MASK = pytest.mark.parametrize("name", MASKS)
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name
)


@EVERY_MASK
@EVERY_DTYPE
def test_a_row_that_may_attend_nothing_gives_zeros(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    arguments, allowed = padded(MASKS[name], dtype, backend)
    results = run(backend, arguments)
    empty = ~allowed.any(-1)
    unused = ~allowed.any(2).unflatten(1, (SHAPE.Hkv, -1)).any(2)
    assert empty.any() or unused.any(), "nothing is padding in this case"
    assert (results["lse"][empty] == -torch.inf).all()
    assert torch.isfinite(results["lse"][~empty]).all()
    for gradient, nobody in (("out", empty), ("d_q", empty), ("d_k", unused), ("d_v", unused)):
        assert (results[gradient][nobody] == 0).all(), gradient
        assert torch.isfinite(results[gradient]).all(), gradient


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@EVERY_MASK
@EVERY_DTYPE
def test_what_nobody_uses_may_hold_anything(
    name: str, shape: Shape, dtype: torch.dtype, poison: float, backend: str
) -> None:
    """Bitwise the same results with zeros and with NaN or infinities in the padding."""
    clean, allowed = padded(MASKS[name], dtype, backend, shape)
    unused = ~allowed.any(2).any(1)[:, None, :, None]
    empty = ~allowed.any(-1, keepdim=True)

    def with_padding(value: float) -> AttentionCase:
        assert clean.grad_out is not None
        assert clean.grad_lse is not None
        return replace(
            clean,
            q=clean.q.masked_fill(empty, value),
            k=clean.k.masked_fill(unused, value),
            v=clean.v.masked_fill(unused, value),
            grad_out=clean.grad_out.masked_fill(empty, value),
            grad_lse=clean.grad_lse.masked_fill(empty.squeeze(-1), value),
        )

    expected = run(backend, with_padding(0.0))
    for key, tensor in run(backend, with_padding(poison)).items():
        assert torch.equal(tensor, expected[key]), key


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["keys", "dense_columns", "documents"])
def test_padding_beside_a_softcap(name: str, dtype: torch.dtype, backend: str) -> None:
    """Its derivative at a key of NaN is NaN."""
    built, allowed = padded(MASKS[name], dtype, backend)
    unused = ~allowed.any(2).any(1)[:, None, :, None]
    assert unused.any()
    results = []
    for value in (0.0, torch.nan):
        case = replace(built, k=built.k.masked_fill(unused, value), options={"softcap": 3.0})
        results.append(run(backend, case))
    for key, tensor in results[1].items():
        assert torch.equal(tensor, results[0][key]), key


@EVERY_DTYPE
@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
def test_padding_masked_by_the_bias_alone(dtype: torch.dtype, poison: float, backend: str) -> None:
    """A key whose bias is -inf for every query is padding too; so are NaN biases under the mask."""
    shape = SHAPE.scores
    bias = torch.zeros(1, 1, 1, 11).masked_fill(COLUMNS >= 7, -torch.inf).to(dtype)

    def arguments(value: float, positions: Tensor | bool) -> AttentionCase:
        built = padded(rk.KeyLengths(lengths(9, 9)), dtype, backend)[0]
        hidden = (COLUMNS >= 7)[:, None].to(built.k.device)
        under_mask = bias.masked_fill((COLUMNS >= 9) & positions, value)
        return replace(
            built,
            k=built.k.masked_fill(hidden, value),
            v=built.v.masked_fill(hidden, value),
            bias=under_mask.expand(shape).to(built.k.device),
        )

    expected = run(backend, arguments(0.0, False))
    for key, tensor in run(backend, arguments(poison, True)).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
def test_masked_scores_may_hold_anything(poison: float, backend: str) -> None:
    mask = torch.rand(2, 3, 5, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0, 2] = False
    mask = mask.to(device_of(backend))
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 3, 5, 9, generator=generator).to(mask.device)
    grad = torch.randn(2, 3, 5, 9, generator=generator).to(mask.device)

    def both(fill: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = fill(scores).requires_grad_()
        weights = rk.masked_softmax(leaf, mask, backend=backend)
        return weights.detach(), torch.autograd.grad(weights, leaf, fill(grad))[0]

    clean = both(lambda tensor: tensor.masked_fill(~mask, 0.0))
    dirty = both(lambda tensor: tensor.masked_fill(~mask, poison))
    for got, expected in zip(dirty, clean, strict=True):
        assert torch.equal(got, expected)
    assert (dirty[0][~mask] == 0).all()
    assert (dirty[1][~mask] == 0).all()


@pytest.mark.parametrize("queries", [3, 40], ids=["few", "tiles"])
def test_nan_that_counts_is_seen(queries: int, backend: str) -> None:
    """A query of NaN has NaN for its out, lse and gradient; -inf would say that it had no keys."""
    generator = torch.Generator().manual_seed(0)
    device = device_of(backend)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator) for n in (queries, 50, 50))
    q[0, 1, 2, 5] = torch.nan
    arguments = AttentionCase(q.to(device), k.to(device), v.to(device))
    found = run(backend, random_gradients(arguments, generator))
    expected = torch.zeros(1, 2, queries, dtype=torch.bool)
    expected[0, 1, 2] = True
    for name in ("out", "lse", "d_q"):
        nan = found[name].isnan().cpu()
        assert torch.equal(nan if name == "lse" else nan.any(-1), expected), name
        assert torch.isfinite(found[name].cpu()[~nan]).all()


@pytest.mark.parametrize("by", ["bias", "dense"])
@pytest.mark.parametrize("queries", [3, 40], ids=["few", "tiles"])
def test_nan_reaches_only_who_attends_it(queries: int, by: str, backend: str) -> None:
    """A key of NaN that every other query may attend: out and lse of the rest don't see it."""
    generator = torch.Generator().manual_seed(0)
    device = device_of(backend)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator) for n in (queries, 50, 50))
    k[0, 1, 7] = torch.nan
    forbidden = torch.zeros(queries, 50, dtype=torch.bool)
    forbidden[1::2, 7] = True
    bias = torch.zeros(queries, 50).masked_fill(forbidden, -torch.inf).to(device)
    arguments = AttentionCase(
        *(q.to(device), k.to(device), v.to(device)),
        mask=~forbidden.to(device) if by == "dense" else None,
        bias=bias if by == "bias" else None,
    )
    found = run(backend, arguments)
    attends = torch.zeros(1, 2, queries, dtype=torch.bool)
    attends[0, 1, ::2] = True
    assert torch.equal(found["lse"].isnan().cpu(), attends)
    assert torch.equal(found["out"].isnan().any(-1).cpu(), attends)
