"""Tests of the Triton kernels that need a GPU: CUDA graphs, compiled code, sizes that fill it.

`compute-sanitizer` runs over the tests called `sanitized` too (bench/on_gpu.sh).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk
from rowmax.kernels.backends import dispatch

from .backends import dtype_name

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if dispatch.unavailable("triton") is not None:
    pytest.skip(str(dispatch.unavailable("triton")), allow_module_level=True)

DEVICE = torch.device("cuda")
HALF = torch.bfloat16


def draw(*size: int, dtype: torch.dtype = HALF, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(size) + seed)
    return torch.randn(size, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)


def heads(batch: int, length: int, dim: int = 64, **options: Any) -> list[Tensor]:
    """q of 8 heads, k and v of 2."""
    sizes = ((8, length), (2, length), (2, length))
    return [
        draw(batch, count, n, dim, seed=index, **options) for index, (count, n) in enumerate(sizes)
    ]


def padded_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, _, length, _ = q.shape
    lengths = torch.arange(1, batch + 1, device=DEVICE) * length // batch
    options: dict[str, Any] = {"dropout_p": 0.2, "seed": 5, "backend": "triton"}
    return rk.attention(q, k, v, rk.Causal() & rk.KeyLengths(lengths), **options)


def decoding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rk.attention(q[:, :, :2], k, v, rk.Causal("lower_right"), backend="triton")


def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return rk.attention(q, k, v, rk.Window(300, 300), bias=bias, backend="triton")


def normed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, total = rk.add_layer_norm(x, residual, weight, bias, dropout_p=0.3, seed=3, backend="triton")
    y = rk.layer_norm(y + total, weight, bias, backend="triton")
    y = rk.rms_norm(y, weight, backend="triton")
    return rk.masked_softmax(y.view(1, 1, *y.shape), rk.Causal(9), 0.5, backend="triton")


Make = Callable[[], list[Tensor]]
CALLS: dict[str, tuple[Callable[..., Tensor], Make]] = {
    "padded_causal": (padded_causal, lambda: heads(3, 700)),
    "decoding": (decoding, lambda: heads(2, 3000, 128)),
    "with_bias": (with_bias, lambda: [*heads(2, 500), draw(1, 8, 500, 500)]),
    "normed": (normed, lambda: [draw(600, 1000), draw(600, 1000), draw(1000), draw(1000)]),
}
EVERY_CALL = pytest.mark.parametrize("name", CALLS)


def both_passes(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@EVERY_CALL
def test_every_run_gives_the_same_bits(name: str) -> None:
    function, make = CALLS[name]
    tensors = make()
    expected = both_passes(function, tensors)
    assert all(tensor.isfinite().all() for tensor in expected)
    for _ in range(10):
        assert_equal(both_passes(function, tensors), expected)


@EVERY_CALL
def test_cuda_graphs(name: str) -> None:
    """A captured call, replayed on other values, does what the call itself does."""
    function, make = CALLS[name]
    held = make()
    leaves = [tensor.requires_grad_() for tensor in held]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile here, not while the graph is recorded
        both_passes(function, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = both_passes(function, leaves)
    for factor in (1.0, -0.5):
        others = [tensor.detach() * factor for tensor in make()]
        with torch.no_grad():
            for leaf, other in zip(leaves, others, strict=True):
                leaf.copy_(other)
        graph.replay()
        assert_equal(recorded, both_passes(function, others))


def recorded(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`function` in a graph, and what it returned there, after a call on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


def test_a_graph_draws_a_seed_at_each_replay() -> None:
    """Both passes of one replay drop the same weights, those of the next replay others."""
    q, k, v = heads(2, 300)
    v = torch.ones_like(v).requires_grad_()

    def call() -> list[Tensor]:
        out = rk.attention(q, k, v, dropout_p=0.5, backend="triton")
        return [out.detach(), torch.autograd.grad(out.sum(), v)[0]]

    graph, held = recorded(call)
    results = []
    for _ in range(2):
        graph.replay()
        results.append([tensor.clone() for tensor in held])
    for one, other in zip(*results, strict=True):
        assert not torch.equal(one, other)
    for out, gradient in results:
        # v is all ones: the sum of out is that of the weights kept, and so is that of its gradient
        kept, again = out.double().sum() / out.shape[3], gradient.double().sum() / out.shape[3]
        torch.testing.assert_close(kept, again, rtol=1e-2, atol=0)


def test_a_seed_is_reproduced_by_torchs_own() -> None:
    q, k, v = heads(2, 300)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(rk.attention(q, k, v, dropout_p=0.5, backend="triton"))
    assert torch.equal(results[0], results[1])


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """An error for whatever waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bounds_of_packed_lengths() -> None:
    """With them a call neither waits nor breaks a recording, and other lengths may be replayed."""
    q, k, v = (
        draw(700, count, 64, seed=index).requires_grad_() for index, count in enumerate((8, 2, 2))
    )
    starts = torch.tensor([0, 5, 300, 300, 700], device=DEVICE)

    def call(**bounds: Any) -> list[Tensor]:
        out = rk.attention_varlen(
            q, k, v, starts, starts, rk.Causal("lower_right"), backend="triton", **bounds
        )
        return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    bounds = {"max_seqlen_q": 512, "max_seqlen_k": 512}
    expected = call()
    with nothing_waits():
        got = call(**bounds)
    assert_equal(got, expected)
    graph, held = recorded(lambda: call(**bounds))
    for lengths in ([0, 5, 300, 300, 700], [0, 100, 200, 699, 700]):
        starts.copy_(torch.tensor(lengths))
        graph.replay()
        assert_equal(held, call())


@EVERY_CALL
def test_nothing_waits(name: str) -> None:
    function, make = CALLS[name]
    tensors = make()
    both_passes(function, tensors)
    with nothing_waits():
        both_passes(function, tensors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@EVERY_CALL
def test_another_device_than_the_current_one(name: str) -> None:
    function, make = CALLS[name]
    tensors = make()
    expected = both_passes(function, tensors)
    other = [tensor.to("cuda:1") for tensor in tensors]
    if name == "padded_causal":  # its lengths lie on the first device
        other, function = (
            other,
            lambda q, k, v: rk.attention(q, k, v, rk.Causal(), backend="triton"),
        )
        expected = both_passes(function, tensors)
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_() for tensor in other]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        got = [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]
        assert all(tensor.device == other[0].device for tensor in got)
        assert_equal([tensor.to(DEVICE) for tensor in got], expected)


@EVERY_CALL
def test_reduced_overhead(name: str) -> None:
    """torch.compile's own CUDA graphs."""
    function, make = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for factor in (1.0, -0.5, 2.0):  # warms up, records, replays
        tensors = [tensor * factor for tensor in make()]
        got = [tensor.clone() for tensor in both_passes(compiled, tensors)]
        for one, other in zip(got, both_passes(function, tensors), strict=True):
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.01 * scale)


@EVERY_CALL
def test_torch_compile(name: str) -> None:
    function, make = CALLS[name]
    tensors = make()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    got, expected = both_passes(compiled, tensors), both_passes(function, tensors)
    for one, other in zip(got, expected, strict=True):
        scale = float(other.abs().max())  # torch's own code around the kernels may round otherwise
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01 * scale)


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("dim", [64, 128])
def test_decoding_does_not_depend_on_the_batch(dim: int, dtype: torch.dtype) -> None:
    """Bitwise the same for every size of batch, and in a cache longer than what it holds."""
    q, k, v = heads(7, 4100, dim, dtype=dtype)
    q = q[:, :, :1]
    held = torch.tensor([4100, 1500, 1024, 2047, 4096, 3000, 2], device=DEVICE)
    together = rk.attention(q, k, v, rk.KeyLengths(held), backend="triton")
    for b, length in enumerate(held.tolist()):
        one = slice(b, b + 1)
        alone = rk.attention(q[one], k[one], v[one], rk.KeyLengths(held[one]), backend="triton")
        assert torch.equal(alone, together[one])
        if length >= 1024:  # what is split for itself as well
            cut = rk.attention(q[one], k[one, :, :length], v[one, :, :length], backend="triton")
            assert torch.equal(cut, together[one])


def test_streams() -> None:
    """A kernel runs on the stream that is current."""
    tensors = heads(2, 700)
    expected = both_passes(padded_causal, tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = both_passes(padded_causal, tensors)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(got, expected)


def test_offsets_beyond_32_bits() -> None:
    """A bias of more than 2^31 elements; its last head is that of a call with this head alone."""
    length, count = 9216, 26
    free, _ = torch.cuda.mem_get_info()
    wanted = 2 * count * length * length
    if free < wanted + 2**30:
        pytest.skip(f"needs {wanted / 2**30:.1f} GiB")
    assert count * length * length > 2**31
    q, k, v = (draw(1, count, length, 16, seed=index) for index in range(3))
    bias = torch.zeros(1, count, length, length, device=DEVICE, dtype=HALF)
    bias[:, -1] = draw(length, length)
    out = rk.attention(q, k, v, bias=bias, backend="triton")
    last = rk.attention(q[:, -1:], k[:, -1:], v[:, -1:], bias=bias[:, -1:], backend="triton")
    assert torch.equal(out[:, -1:], last)


@pytest.mark.parametrize("dtype", [HALF, torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("name", ["ordinary", "decoding", "packed", "norms"])
def test_sanitized(name: str, dtype: torch.dtype) -> None:
    """Small odd shapes, each kernel once: for compute-sanitizer, beside the values."""
    calls: dict[str, tuple[Callable[[str], Callable[..., Tensor]], list[Tensor]]] = {
        "ordinary": (
            lambda backend: (
                lambda q, k, v, bias: rk.attention(
                    *(q, k, v, rk.Causal() & rk.KeyLengths(torch.tensor([77, 30], device=DEVICE))),
                    bias=bias,
                    dropout_p=0.1,
                    seed=1,
                    backend=backend,
                )
            ),
            [*heads(2, 77, 40, dtype=dtype), draw(1, 8, 1, 77, dtype=dtype)],
        ),
        "decoding": (
            lambda backend: lambda q, k, v: rk.attention(q[:, :, :3], k, v, backend=backend),
            heads(2, 1111, 40, dtype=dtype),
        ),
        "packed": (
            lambda backend: (
                lambda q, k, v: rk.attention_varlen(
                    *(q, k, v, *2 * (torch.tensor([0, 5, 5, 77], device=DEVICE),)),
                    rk.Causal(),
                    backend=backend,
                )
            ),
            [draw(77, count, 40, dtype=dtype) for count in (8, 2, 2)],
        ),
        "norms": (
            lambda backend: lambda x, w, b: rk.layer_norm(x, w, b, backend=backend),
            [draw(33, 77, dtype=dtype), draw(77, dtype=dtype), draw(77, dtype=dtype)],
        ),
    }
    make, tensors = calls[name]
    got, expected = both_passes(make("triton"), tensors), both_passes(make("reference"), tensors)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, HALF: 0.03}[dtype]
    for one, other in zip(got, expected, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)
