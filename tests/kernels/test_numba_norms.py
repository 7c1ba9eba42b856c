"""What is special to the Numba norms and softmax: lanes, chunks, counters and strides.

Their numbers against float64 are tested with those of all backends.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rowmax.kernels import Causal, Documents, add_layer_norm, layer_norm, masked_softmax, rms_norm
from rowmax.kernels.backends import dispatch
from rowmax.kernels.backends.reference import rows_keep
from rowmax.kernels.backends.reference.philox import keep_scale, keep_threshold
from rowmax.kernels.ops.layout import rows_of, statistics_dtype

from ..processes import printed
from ..tensors import rand
from .support import row_keeps

if dispatch.unavailable("numba") is not None:
    pytest.skip(str(dispatch.unavailable("numba")), allow_module_level=True)

from rowmax.kernels.backends.cpu_common.call_records import INTEGER, REAL, fields
from rowmax.kernels.backends.cpu_common.constants import GROUPED_COLUMNS
from rowmax.kernels.backends.cpu_numba.call import Kernel, read
from rowmax.kernels.backends.cpu_numba.memory import pointer
from rowmax.kernels.backends.cpu_numba.norm_forward import draw_factors
from rowmax.kernels.backends.cpu_numba.rows import chunk_rows
from rowmax.kernels.backends.cpu_numba.vector import cast

from .backends import dtype_name

WIDE = (torch.float32, torch.float64)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)
NORMS = {
    "layer_norm": lambda x, w, b: layer_norm(x, w, b, backend="numba"),
    "add_layer_norm": lambda x, w, b: add_layer_norm(
        x, x.flip(0), w, b, dropout_p=0.3, seed=5, backend="numba"
    )[0],
    "rms_norm": lambda x, w, b: rms_norm(x, w, backend="numba"),
}
EVERY_NORM = pytest.mark.parametrize("name", NORMS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs, with a random gradient of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    found = torch.autograd.grad(
        output, leaves, rand(*output.shape, dtype=output.dtype), allow_unused=True
    )
    return [output.detach(), *(gradient for gradient in found if gradient is not None)]


# --- the order of sums ----------------------------------------------------------------------------


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.usefixtures("restored_threads")
def test_norms_give_the_same_bits_on_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = rand(3001, 41), rand(41), rand(41)
    assert chunk_rows(3001, 41) < 3001 / 4
    runs = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        runs.append(gradients(NORMS[name], x.to(dtype), weight.to(dtype), bias.to(dtype)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.usefixtures("restored_threads")
def test_softmax_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    mask = Causal() & Documents(torch.arange(400).expand(2, 400) // 150)
    scores = rand(2, 8, 400, 400, dtype=dtype)
    runs = []
    for threads in (1, 2, 2, 2, 3, 8):
        torch.set_num_threads(threads)
        runs.append(gradients(lambda s: masked_softmax(s, mask, 0.3, backend="numba"), scores))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@EVERY_NORM
@pytest.mark.parametrize("columns", [24, 700, 2055])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("excess", [-2, -1, 0, 1, 3])
def test_rows_around_the_edges_of_chunks(name: str, columns: int, chunks: int, excess: int) -> None:
    chunk = chunk_rows(0, columns)
    rows = chunks * chunk + excess
    assert chunk_rows(rows, columns) == chunk
    x, weight, bias = rand(rows, columns), rand(columns), rand(columns)

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if name == "rms_norm":
            return rms_norm(x, weight, backend="reference")
        if name == "layer_norm":
            return layer_norm(x, weight, bias, backend="reference")
        keep = rows_keep(torch.tensor(5), 0.3, rows, columns).to(x.dtype)
        total = x.flip(0) + x * keep * keep_scale(0.3)
        return layer_norm(total, weight, bias, backend="reference")

    for found, expected in zip(
        gradients(NORMS[name], x, weight, bias), gradients(reference, x, weight, bias), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@EVERY_NORM
@EVERY_DTYPE
@pytest.mark.parametrize("columns", [512, GROUPED_COLUMNS + 7])
def test_a_row_has_the_same_bits_wherever_it_stands(
    name: str, dtype: torch.dtype, columns: int
) -> None:
    """Alone, first, between others, last, in a group or left over: there is one way to sum it."""
    norm = NORMS[name]
    if name == "add_layer_norm":  # dropout is for the row of that number
        norm = lambda x, w, b: add_layer_norm(x, x, w, b, backend="numba")[0]  # noqa: E731
    x, weight, bias = (rand(*size, dtype=dtype) for size in ((11, columns), (columns,), (columns,)))
    together = norm(x, weight, bias)
    for row in range(11):
        assert torch.equal(norm(x[row : row + 1], weight, bias)[0], together[row])


@pytest.mark.parametrize("residual", [False, True])
def test_a_row_that_begins_far_from_its_mean(residual: bool) -> None:
    """The variance is not taken about the first elements when those say little about the row."""
    x = rand(3, 2**14)
    x[:, :64] += 100.0
    x = x.float()
    if residual:
        y, _ = add_layer_norm(x / 2, x / 2, backend="numba")
    else:
        y = layer_norm(x, backend="numba")
    exact = layer_norm(x.double(), backend="reference")
    assert (y.double() / exact - 1)[:, :64].abs().max() < 4 * torch.finfo(torch.float32).eps


def test_the_partial_sums_keep_what_float32_can() -> None:
    """65536 rows of 1 + small values: one running sum would lose the small ones."""
    rows, columns = 65536, 8
    x, grad = rand(rows, columns, dtype=torch.float32), torch.ones(rows, columns)
    grad += 1e-3 * rand(rows, columns, dtype=torch.float32)
    bias = torch.zeros(columns, requires_grad=True)
    layer_norm(x, None, bias, backend="numba").backward(grad)
    assert bias.grad is not None
    exact = grad.double().sum(0)
    assert (bias.grad.double() - exact).abs().max() / exact.abs().max() < 2.0**-22


# --- strides --------------------------------------------------------------------------------------


def test_rows_with_a_common_stride_are_not_copied() -> None:
    wide = rand(4, 5, 60)
    for view, stride in (
        (wide[..., :20], 60),
        (wide[..., 20:41], 60),
        (wide[:, 1:2], 300),
        (wide[1:3], 60),
        (wide[0, 0], 60),
        (wide[:1, :1], 60),
        (wide[0, 0].expand(7, 60), 0),
        (wide[::2, 0], 600),
    ):
        rows, found = rows_of(view)
        assert rows.data_ptr() == view.data_ptr()
        assert view.shape[:-1].numel() == 1 or found == stride


def test_rows_without_a_common_stride_are_copied() -> None:
    wide = rand(4, 5, 60)
    for view in (wide[:, ::2], wide.transpose(0, 1), wide[..., ::2], wide.transpose(1, 2)):
        rows, stride = rows_of(view)
        assert torch.equal(rows, view)
        assert rows.is_contiguous()
        assert stride == view.shape[-1]


@EVERY_NORM
@EVERY_DTYPE
def test_strided_rows_give_the_bits_of_contiguous_ones(name: str, dtype: torch.dtype) -> None:
    wide = rand(6, 4, 90, dtype=dtype)
    weight, bias = rand(33, dtype=dtype), rand(33, dtype=dtype)
    for view in (wide[..., 7:40], wide.transpose(0, 1)[..., :33], wide[:, :1, 50:83]):
        plain = gradients(NORMS[name], view.contiguous(), weight, bias)
        strided = gradients(NORMS[name], view, weight, bias)
        assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_nothing_beyond_a_row_is_read_or_written(dtype: torch.dtype) -> None:
    """Rows inside a wider tensor whose other columns are NaN, at every number of tail lanes."""
    for columns in range(1, 70):
        wide = torch.full((3, columns + 40), float("nan"), dtype=dtype)
        wide[:, 20 : 20 + columns] = rand(3, columns, dtype=dtype)
        inner = wide[:, 20 : 20 + columns]
        for y in (
            *add_layer_norm(inner, inner, dropout_p=0.5, seed=1, backend="numba"),
            rms_norm(inner, backend="numba"),
            masked_softmax(inner, backend="numba"),
        ):
            assert y.isfinite().all()


# --- half types -----------------------------------------------------------------------------------


@EVERY_NORM
@pytest.mark.parametrize("columns", [40, GROUPED_COLUMNS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_half_gradients_are_rounded_once(name: str, columns: int, dtype: torch.dtype) -> None:
    """The half kernels' results are the float32 kernels', of the same values, rounded."""
    x, weight, bias = (rand(*size, dtype=dtype) for size in ((6, columns), (columns,), (columns,)))
    d_total = rand(6, columns + 1, dtype=dtype)[:, 1:]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        if name == "add_layer_norm":  # no rounded sum between: the residual holds all of it
            zeros = torch.zeros_like(x, requires_grad=True)
            row, w, b = leaves
            leaves = [row, zeros, w, b]
            y, total = add_layer_norm(zeros, row, w, b, dropout_p=0.3, seed=5, backend="numba")
            outputs, grads = [y, total], [d_total.flip(0).to(y.dtype), d_total.to(y.dtype)]
        else:
            outputs, grads = [NORMS[name](*leaves)], [d_total.flip(0).to(x.dtype)]
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        return [outputs[0].detach(), *(gradient for gradient in found if gradient is not None)]

    half = run(x, weight, bias)
    wide = run(x.float(), weight.float(), bias.float())
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(half, wide, strict=True))


@EVERY_NORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_no_tensor_is_copied_to_float32(name: str, dtype: torch.dtype) -> None:
    """Of x's size are the results alone: a float32 copy would be worth two of them."""
    x, weight, bias = (rand(*size, dtype=dtype) for size in ((2048, 512), (512,), (512,)))
    flipped, grad = x.flip(0), rand(2048, 512, dtype=dtype)

    def run() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        if name == "add_layer_norm":
            rows, w, b = leaves
            y, _ = add_layer_norm(rows, flipped, w, b, backend="numba")
        else:
            y = NORMS[name](*leaves)
        torch.autograd.grad(y, leaves, grad, allow_unused=True)

    results = 3 if name == "add_layer_norm" else 2
    assert results <= allocated(run) / x.nbytes < results + 0.5


def test_no_scores_are_copied_to_float32() -> None:
    scores, grad = rand(1, 2, 512, 512).bfloat16(), rand(1, 2, 512, 512).bfloat16()

    def run() -> None:
        leaf = scores.detach().requires_grad_()
        torch.autograd.grad(masked_softmax(leaf, Causal(), backend="numba"), leaf, grad)

    assert 2 <= allocated(run) / scores.nbytes < 2.5


def allocated(function: Callable[[], None]) -> int:
    """The bytes of all tensors that a call makes, one after another."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    sizes = (event.self_cpu_memory_usage for event in profile.events() or ())
    return sum(size for size in sizes if size > 0)


# --- dropout --------------------------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_lanes_drop_what_the_definition_drops(p: float, dtype: torch.dtype) -> None:
    """x = 1 and residual = 0: the sum is dropout's factor itself."""
    for columns in (*range(1, 40), 63, 64, 65, 128, 200, 255, 256, 257, 600):
        for seed in (0, 7, -3, 2**62 + 11):
            ones = torch.ones(3, columns, dtype=dtype)
            _, total = add_layer_norm(ones, ones * 0, dropout_p=p, seed=seed, backend="numba")
            keep = rows_keep(torch.tensor(seed), p, 3, columns)
            factor = torch.tensor(keep_scale(p), dtype=statistics_dtype(dtype))
            assert torch.equal(total, (keep * factor).to(dtype))


def factors_of_row(argument):
    """`target` (columns, rounded up to four vectors): the factors of one row."""
    call = read(argument)
    keep = cast(call.keep_scale, call.zero)
    target = pointer(call.target, call.zero)
    draw_factors(target, call.row, 0, call.columns, call.threshold, keep, call.seed, call.zero)


FACTORS = Kernel(
    factors_of_row,
    (*fields(INTEGER, "target row columns threshold seed"), *fields(REAL, "keep_scale")),
)


@pytest.mark.parametrize("dtype", WIDE, ids=dtype_name)
@pytest.mark.parametrize("row", [5, 2**31 + 1, 2**32 + 5, 2**40 - 1])
def test_rows_beyond_32_bits_have_words_of_their_own(row: int, dtype: torch.dtype) -> None:
    columns, p, seed = 128, 0.4, 123456789123
    target = torch.empty(columns, dtype=dtype)
    record = {"target": target.data_ptr(), "row": row, "columns": columns, "seed": seed}
    drawn = {**record, "threshold": keep_threshold(p), "keep_scale": 1.0}
    FACTORS.plan(dtype, 1, 0, drawn).run()
    assert torch.equal(target, row_keeps(row, columns, p, seed).to(dtype))


# --- other vector widths --------------------------------------------------------------------------

_AT_ANOTHER_WIDTH = """
import torch
from rowmax.kernels import Dense, add_layer_norm, masked_softmax
torch.manual_seed(0)
for columns in (3, 50):
    runs = []
    for backend, dtype in (("reference", torch.float64), ("numba", torch.float32)):
        torch.manual_seed(0)
        x, r, w = (torch.randn(s, columns).to(dtype).requires_grad_() for s in (5, 5, 1))
        mask = Dense(torch.rand(5, columns) < 0.5)
        y, total = add_layer_norm(x, r, w[0], dropout_p=0.4, seed=9, backend=backend)
        p = masked_softmax(total, mask, 0.7, backend=backend)
        (y * p + total.sin()).sum().backward()
        runs.append([t.double() for t in (y, total, p, x.grad, r.grad, w.grad)])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_the_narrowest_vectors() -> None:
    """(`make test-narrow` runs all of these tests at 256 bits.)"""
    from rowmax.kernels.backends.cpu_numba.host import native_vector_bits

    if native_vector_bits() == 128:
        pytest.skip("the tests above ran at 128 bits")
    printed("-c", _AT_ANOTHER_WIDTH, ROWMAX_VECTOR_BITS="128")


@pytest.mark.parametrize("columns", [37, 512, GROUPED_COLUMNS])
def test_gradients_do_not_suffer_from_a_rounded_mean(columns: int) -> None:
    """At mean 1e4, deviation 1, a float32 mean is off by up to 5e-4 deviations."""
    generator = torch.Generator().manual_seed(columns)
    x, grad_y = (torch.randn(64, columns, generator=generator) for _ in range(2))
    leaves = [x + 1e4, *(torch.randn(columns, generator=generator) for _ in range(2))]

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        y = layer_norm(inputs[0], inputs[1], inputs[2], backend=backend)
        return torch.autograd.grad(y, inputs, grad_y.to(dtype))

    exact = gradients(torch.float64, "reference")
    for got, wanted in zip(gradients(torch.float32, "numba"), exact, strict=True):
        assert (got - wanted).norm() <= 8 * torch.finfo(torch.float32).eps * wanted.norm()
