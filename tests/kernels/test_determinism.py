"""The same bits: on poisoned memory, run after run, on any threads, in other processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rowmax.kernels import Causal, KeyLengths, add_layer_norm, attention, layer_norm, rms_norm

from .backends import device_of, dtype_name, is_interpreted
from .cases import BY_NAME, Case, Shape, always, lengths, random_bias
from .support import AttentionCase, Results, assert_parity, run

POISONED = [
    "shape_odd",
    "shape_gqa",
    "shape_d1",
    "shape_one_query",
    "shape_no_keys",
    "edge_33",
    "layout_strided",
    "layout_expanded",
    "causal_wide_-3",
    "joined_everything",
    "joined_causal_both_lengths",
    "window_0_0",
    "keys_zero_and_beyond",
    "dense_sparse",
    "dense_none",
    "bias_1H1K",
    "bias_minus_inf_rows",
    "sinks_masked_rows",
    "dropout_wide_long",
    "alibi_per_batch_causal",
]


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory of torch and NumPy holds NaN, or the largest integer."""

    def filled(make: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            array = make(*args, **kwargs)
            if array.dtype.kind == "f":
                array.fill(np.nan)
            elif array.dtype.kind in "iu":
                array.fill(np.iinfo(array.dtype).max)
            return array

        return call

    monkeypatch.setattr(np, "empty", filled(np.empty))
    monkeypatch.setattr(np, "empty_like", filled(np.empty_like))
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", POISONED)
def test_fresh_memory_is_never_read(name: str, dtype: torch.dtype, backend: str) -> None:
    arguments = BY_NAME[name].build(dtype, device_of(backend))
    assert_parity(run(backend, arguments), arguments)


def thread_counts(backend: str) -> tuple[int, ...]:
    """What runs are repeated on; Triton's interpreter has one thread, to which all are the same."""
    return (2,) if is_interpreted(backend) else (1, 2, 3, 2)


def norms(backend: str) -> Results:
    """Every norm that the backend does, with gradients, on enough rows for several threads."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, 3000, 40, generator=generator).to(device_of(backend))
    results: Results = {}
    for name in ("layer_norm", "add_layer_norm", "rms_norm"):
        x, residual = (tensor.clone().requires_grad_() for tensor in made)
        weight, bias = (tensor[0].clone().requires_grad_() for tensor in made)
        leaves = (x, residual, weight, bias)
        outputs: tuple[Tensor, ...]
        if name == "layer_norm":
            outputs = (layer_norm(x, weight, bias, backend=backend),)
        elif name == "rms_norm":
            outputs = (rms_norm(x, weight, backend=backend),)
        else:
            outputs = add_layer_norm(*leaves, dropout_p=0.1, seed=1, backend=backend)
        torch.stack([output.sin().sum() for output in outputs]).sum().backward()
        for n, tensor in enumerate((*outputs, *(leaf.grad for leaf in leaves))):
            if tensor is not None:
                results[f"{name} {n}"] = tensor.detach()
    return results


@pytest.mark.usefixtures("poisoned_memory")
def test_norms_never_read_fresh_memory(backend: str) -> None:
    assert all(torch.isfinite(tensor).all() for tensor in norms(backend).values())


LARGER = [
    Case("larger", Shape(2, 4, 2, 150, 170, 32, 16), always(Causal("lower_right"))),
    Case("larger_lengths", Shape(3, 2, 2, 70, 90, 16, 16), always(KeyLengths(lengths(90, 3, 41)))),
    Case(
        "larger_bias_dropout",
        Shape(2, 3, 1, 100, 100, 24, 24),
        bias=random_bias(False, False, True, True),
        options={"dropout_p": 0.1, "seed": 1},
    ),
]


def same(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_any_number_of_threads_and_runs(case: Case, dtype: torch.dtype, backend: str) -> None:
    arguments = case.build(dtype, device_of(backend))
    torch.set_num_threads(1)
    expected = run(backend, arguments)
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        same(run(backend, arguments), expected)


@pytest.mark.usefixtures("restored_threads")
def test_norms_on_any_number_of_threads(backend: str) -> None:
    torch.set_num_threads(1)
    expected = norms(backend)
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        same(norms(backend), expected)


@pytest.mark.usefixtures("restored_threads")
def test_python_threads_at_once(backend: str) -> None:
    """Several callers at a time, each on several threads of its own."""
    if is_interpreted(backend):
        pytest.skip("Triton's interpreter keeps the grid of a launch in one global place")
    torch.set_num_threads(2)
    many = [case.build(torch.float32, device_of(backend)) for case in LARGER]
    expected = [run(backend, arguments) for arguments in many]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: (n % 3, run(backend, many[n % 3])), range(24)))
    for n, results in found:
        same(results, expected[n])


def _send(results: Any, backend: str, arguments: AttentionCase) -> None:
    results.put({name: tensor.cpu().numpy() for name, tensor in run(backend, arguments).items()})


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child(backend: str) -> None:
    """After the parent has used its threads, a child gets the same bits, and does not hang.

    The reference gets one thread: torch's own operations on several hang in a forked child.
    """
    torch.set_num_threads(1 if backend == "reference" else 2)
    arguments = LARGER[0].build(torch.float32, device_of(backend))
    expected = run(backend, arguments)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_send, args=(queue, backend, arguments), daemon=True)
    child.start()
    try:
        found = queue.get(timeout=60)
    finally:
        child.kill()
        child.join()
    same({name: torch.from_numpy(array) for name, array in found.items()}, expected)


@pytest.mark.slow
def test_a_spawned_child(backend: str) -> None:
    """The function, its masks and its result travel to a fresh process and back."""
    arguments = LARGER[1].build(torch.float32)
    mask = Causal("lower_right") & KeyLengths(lengths(90, 3, 41))
    tensors = (arguments.q, arguments.k, arguments.v, mask)
    expected = attention(*tensors, backend=backend)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply_async(attention, tensors, {"backend": backend}).get(timeout=120)
    assert torch.equal(got, expected)
