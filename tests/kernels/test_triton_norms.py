"""Specific to the Triton norms: blocks of long rows, chunks of rows, dropout by tiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk
from rowmax.kernels.backends import dispatch
from rowmax.kernels.backends.reference import rows_keep
from rowmax.kernels.backends.reference.philox import keep_scale, keep_threshold

from .support import row_keeps

if dispatch.unavailable("triton") is not None:
    pytest.skip(str(dispatch.unavailable("triton")), allow_module_level=True)

import triton
import triton.language as tl

from rowmax.kernels.backends.gpu_triton import rows as tiles
from rowmax.kernels.backends.gpu_triton.norm_forward import draw_factors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
NORMS: dict[str, Callable[[str, Tensor, Tensor, Tensor], list[Tensor]]] = {
    "layer_norm": lambda backend, x, w, b: [rk.layer_norm(x, w, b, backend=backend)],
    "add_layer_norm": lambda backend, x, w, b: list(
        rk.add_layer_norm(x, x.flip(0), w, b, dropout_p=0.3, seed=5, backend=backend)
    ),
    "rms_norm": lambda backend, x, w, b: [rk.rms_norm(x, w + b, backend=backend)],
}
EVERY_NORM = pytest.mark.parametrize("name", NORMS)
# float64's exponential on a GPU is good to a few ulp; half results may round to the other side
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.02}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def with_gradients(function: Callable[..., list[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """The outputs and the gradients of all inputs, with random gradients of the outputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    grads = [draw(*output.shape, dtype=output.dtype) for output in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def assert_same(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max()) if other.numel() else 1.0
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, scale))


@pytest.fixture
def _short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 32 (float64: 16) columns are taken in blocks of that many."""
    for name in ("_TILE_BYTES", "_BLOCK_BYTES", "_WARP_BYTES"):
        monkeypatch.setattr(tiles, name, 128)
    monkeypatch.setattr(tiles, "_FORWARD_ROW_BYTES", 128)
    monkeypatch.setattr(tiles, "_BACKWARD_ROW_BYTES", dict.fromkeys(DTYPES[:2], 128))


# --- long rows ------------------------------------------------------------------------------------


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [33, 96])
@pytest.mark.usefixtures("_short_tiles")
def test_norms_of_rows_in_blocks(columns: int, name: str, dtype: torch.dtype) -> None:
    inputs = draw(3, columns, dtype=dtype), draw(columns, dtype=dtype), draw(columns, dtype=dtype)
    found = with_gradients(lambda *t: NORMS[name]("triton", *t), *inputs)
    expected = with_gradients(lambda *t: NORMS[name]("reference", *t), *inputs)
    assert_same(found, expected, dtype)


@EVERY_NORM
@pytest.mark.parametrize("columns", [16384, 20001])
def test_norms_of_long_rows(columns: int, name: str) -> None:
    inputs = [draw(*shape, dtype=torch.float32) for shape in ((2, columns), (columns,), (columns,))]
    inputs[0] += 1e3
    found = with_gradients(lambda *t: NORMS[name]("triton", *t), *inputs)
    wide = [tensor.double() for tensor in inputs]
    expected = with_gradients(lambda *t: NORMS[name]("reference", *t), *wide)
    for one, other in zip(found, expected, strict=True):
        # an input's own rounding, and beside it the gradients' sums
        scale = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.usefixtures("_short_tiles")
def test_a_first_block_far_from_the_rest() -> None:
    """The variance is counted from the first block's mean: the worst that this one can be."""
    x = draw(4, 1000, dtype=torch.float32)
    x[0, :32] += 1e4
    x[1, 32:] += 1e4
    x[2, 500:] -= 1e4
    x[3] += 1e4
    found, exact = (
        rk.layer_norm(x, backend="triton"),
        rk.layer_norm(x.double(), backend="reference"),
    )
    torch.testing.assert_close(found[:3].double(), exact[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[3].double(), exact[3], rtol=1e-5, atol=1e-3)


@EVERY_NORM
@pytest.mark.parametrize("columns", [20, 70])
@pytest.mark.usefixtures("_short_tiles")
def test_a_value_that_is_not_finite_reaches_its_row_alone(columns: int, name: str) -> None:
    """As in the equation: a NaN makes its whole row NaN, and no other."""
    x, ones = draw(4, columns, dtype=torch.float32), torch.ones(columns, device=DEVICE)
    x[1, 7], x[2, columns - 1] = torch.nan, torch.inf
    for found, expected in zip(
        NORMS[name]("triton", x, ones, ones), NORMS[name]("reference", x, ones, ones), strict=True
    ):
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


LENGTHS = torch.tensor([70, 0, 33])
MASKS: dict[str, rk.Mask | None] = {
    "none": None,
    "causal": rk.Causal("lower_right"),
    "window": rk.Window(40, 3, torch.tensor([5, 70, -20])),
    "lengths": rk.KeyLengths(LENGTHS) & rk.QueryLengths(LENGTHS // 15),
    "dense": rk.Dense(torch.rand(3, 1, 5, 70, generator=torch.Generator().manual_seed(0)) < 0.3),
    "dense_keys": rk.Dense(torch.arange(70) % 40 > 35) & rk.Causal("lower_right"),
    "documents": rk.Documents(
        torch.arange(5).expand(3, 5) // 2, torch.arange(70).expand(3, 70) // 30
    ),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "dtype,scale", [(torch.float64, 0.7), (torch.float32, -1.5), (torch.bfloat16, 0.0)], ids=str
)
@pytest.mark.usefixtures("_short_tiles")
def test_softmax_of_rows_in_blocks(mask: str, dtype: torch.dtype, scale: float) -> None:
    scores = draw(3, 1, 5, 70, dtype=dtype) * 3

    def weights(backend: str) -> list[Tensor]:
        return with_gradients(
            lambda s: [rk.masked_softmax(s, MASKS[mask], scale, backend=backend)], scores
        )

    assert_same(weights("triton"), weights("reference"), dtype)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mask", [name for name, mask in MASKS.items() if mask is not None])
@pytest.mark.usefixtures("_short_tiles")
def test_masked_scores_in_blocks_may_hold_anything(mask: str, poison: float) -> None:
    chosen = MASKS[mask]
    assert chosen is not None
    hidden = ~chosen.dense(3, 1, 5, 70).to(DEVICE)
    scores = draw(3, 1, 5, 70, dtype=torch.float32)
    clean = rk.masked_softmax(scores, chosen, backend="triton")
    dirty = rk.masked_softmax(scores.masked_fill(hidden, poison), chosen, backend="triton")
    assert torch.equal(clean, dirty)
    assert (dirty[hidden] == 0).all()


@pytest.mark.usefixtures("_short_tiles")
@pytest.mark.parametrize("columns", [20, 70])
def test_a_score_that_is_not_finite_reaches_its_row_alone(columns: int) -> None:
    scores = draw(1, 1, 4, columns, dtype=torch.float32)
    scores[0, 0, 1, 7], scores[0, 0, 2, 3] = torch.nan, torch.inf
    scores[0, 0, 3, :] = -torch.inf
    weights = rk.masked_softmax(scores, rk.Causal(columns), backend="triton")[0, 0]
    assert torch.isfinite(weights[0]).all()
    assert weights[1:3].isnan().all()
    assert (weights[3] == 0).all()


# --- chunks of rows -------------------------------------------------------------------------------


@EVERY_NORM
@pytest.mark.parametrize("columns", [24, 700])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_rows_around_the_edges_of_chunks(name: str, columns: int, chunks: int, excess: int) -> None:
    tile = tiles.backward_tile(columns, torch.float64)
    chunk = tiles.chunk_rows(0, tile)
    rows = chunks * chunk + excess
    assert tiles.chunk_rows(rows, tile) == chunk
    inputs = draw(rows, columns), draw(columns), draw(columns)
    found = with_gradients(lambda *t: NORMS[name]("triton", *t), *inputs)
    expected = with_gradients(lambda *t: NORMS[name]("reference", *t), *inputs)
    assert_same(found, expected, torch.float64)


def test_chunks_are_whole_tiles_and_enough() -> None:
    for columns in (1, 16, 100, 1024, 5000, 8192, 100_000):
        for dtype in DTYPES:
            tile = tiles.backward_tile(columns, dtype)
            for rows in (1, 100, 4096, 16384, 65536, 2**20, 2**24):
                chunk = tiles.chunk_rows(rows, tile)
                assert chunk % tile.rows == 0
                if rows >= 264 * 64 and tile.rows <= 16:
                    assert 240 <= -(-rows // chunk) <= 4 * 264


def test_nothing_beyond_a_row_is_read_or_written() -> None:
    """Rows inside a wider tensor whose other columns are NaN."""
    for columns in (1, 2, 7, 8, 15, 16, 17, 33):
        wide = torch.full((3, columns + 40), torch.nan, device=DEVICE)
        wide[:, 20 : 20 + columns] = draw(3, columns, dtype=torch.float32)
        inner = wide[:, 20 : 20 + columns]
        for y in (
            *rk.add_layer_norm(inner, inner, dropout_p=0.5, seed=1, backend="triton"),
            rk.rms_norm(inner, backend="triton"),
            rk.masked_softmax(inner, backend="triton"),
        ):
            assert y.isfinite().all()


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_tiles_drop_what_the_definition_drops(
    in_blocks: bool, p: float, request: pytest.FixtureRequest
) -> None:
    """x = 1 and residual = 0: the sum is dropout's factor itself."""
    if in_blocks:
        request.getfixturevalue("_short_tiles")
    for columns, seed in ((1, 0), (15, -3), (16, 1), (17, 5), (64, 2**62 + 11), (65, 7)):
        ones = torch.ones(3, columns, device=DEVICE)
        _, total = rk.add_layer_norm(ones, ones * 0, dropout_p=p, seed=seed, backend="triton")
        keep = rows_keep(torch.tensor(seed, device=DEVICE), p, 3, columns)
        assert torch.equal(total, keep.float() * keep_scale(p))


@triton.jit
def store_factors(target, row, threshold, keep_scale: tl.float64, seed, COLUMNS: tl.constexpr):
    rows = row + tl.zeros((1, 1), tl.int64)
    factors = draw_factors((threshold, keep_scale, seed), rows, 0, COLUMNS, tl.float32)
    tl.store(target + tl.arange(0, COLUMNS)[None, :], factors)


@pytest.mark.parametrize("row", [5, 2**31 + 1, 2**32 + 5, 2**40 - 1])
def test_rows_beyond_32_bits_have_words_of_their_own(row: int) -> None:
    columns, p, seed = 128, 0.4, 123456789123
    target = torch.empty(columns, device=DEVICE)
    store_factors[(1,)](target, row, keep_threshold(p), 1.0, seed, columns)
    by_pointer, on_device = torch.empty_like(target), torch.tensor(seed, device=DEVICE)
    store_factors[(1,)](by_pointer, row, keep_threshold(p), 1.0, on_device, columns)
    assert torch.equal(by_pointer, target)
    assert torch.equal(target.cpu(), row_keeps(row, columns, p, seed).float())
