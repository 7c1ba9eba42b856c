"""How attention on the CPU is divided among threads: all have work, and the bits are the same."""

from __future__ import annotations

import heapq

import pytest
import torch

from rowmax.kernels import Causal, KeyLengths, Window, attention_varlen
from rowmax.kernels.backends import dispatch

from .backends import dtype_name
from .cases import Case, Shape, alibi, always, lengths, random_bias
from .support import Results, run

if dispatch.unavailable("numba"):
    pytest.skip(str(dispatch.unavailable("numba")), allow_module_level=True)

from rowmax.kernels.backends.cpu_common.constants import BLOCK_KEYS, CACHE_BYTES
from rowmax.kernels.backends.cpu_numba import attention_plan
from rowmax.kernels.backends.cpu_numba.attention_plan import Sizes, backward_plan, forward_plan
from rowmax.kernels.backends.cpu_numba.gemm import lanes_in

pytestmark = pytest.mark.usefixtures("restored_threads")
LANES = lanes_in(torch.float32)

CASES = [
    Case("one_head", Shape(1, 1, 1, 300, 900, 24, 40), always(Causal("lower_right"))),
    Case("one_head_window", Shape(1, 1, 1, 700, 700, 16, 16), always(Window(150, 20))),
    Case(
        "shared_bias",
        Shape(2, 3, 3, 90, 520, 16, 16),
        always(KeyLengths(lengths(520, 300))),
        random_bias(False, False, True, True),
        options={"dropout_p": 0.2, "seed": 3},
    ),
    Case(
        "bias_of_all_keys", Shape(1, 1, 1, 90, 400, 16, 16), None, random_bias(*[True] * 3, False)
    ),
    Case("grouped", Shape(1, 4, 1, 130, 400, 16, 16), bias=alibi(7), options={"softcap": 2.0}),
    Case("decode", Shape(1, 4, 1, 2, 1500, 32, 32), always(Causal("lower_right")), sinks=True),
    Case("short_heads", Shape(9, 4, 2, 40, 40, 16, 16), always(Causal())),
]

each_backend = pytest.mark.parametrize(
    "backend",
    [
        "numba",
        pytest.param(
            "native",
            marks=pytest.mark.skipif(
                dispatch.unavailable("native") is not None, reason="no C++ extension"
            ),
        ),
    ],
)


def assert_same(got: Results, expected: Results) -> None:
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bits_do_not_depend_on_the_threads(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    arguments = case.build(dtype)
    torch.set_num_threads(1)
    expected = run(backend, arguments)
    for threads in (2, 5, 64):  # more than there are cores: waiting threads must let others run
        torch.set_num_threads(threads)
        assert_same(run(backend, arguments), expected)


@each_backend
def test_packed_sequences_of_all_lengths_on_any_threads(backend: str) -> None:
    """Among them some that a tile takes, some that are decoded, and an empty one."""
    generator = torch.Generator().manual_seed(0)
    starts_q = torch.tensor([0, 1, 71, 71, 76, 376])
    starts_k = torch.tensor([0, 600, 670, 680, 1000, 1300])

    def results() -> list[torch.Tensor]:
        q, k, v = (
            torch.randn(total, 2, 16, generator=generator.manual_seed(1)).requires_grad_()
            for total in (376, 1300, 1300)
        )
        mask = Causal("lower_right")
        out = attention_varlen(q, k, v, starts_q, starts_k, mask, backend=backend)
        return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]

    torch.set_num_threads(1)
    expected = results()
    torch.set_num_threads(7)
    for got, tensor in zip(results(), expected, strict=True):
        assert torch.equal(got, tensor)


def test_sums_that_outgrow_the_cache_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 512
    most = 3 * CACHE_BYTES // row_bytes  # keys
    heads = 4 * torch.get_num_threads()  # enough of them for all threads
    plan = backward_plan(Sizes(1, heads, heads, 64, most), LANES, row_bytes, None)
    assert (plan.chunk_tasks, plan.chunk_keys) == (1, most)
    plan = backward_plan(Sizes(1, heads, heads, 64, most + 1), LANES, row_bytes, None)
    assert plan.chunk_keys * row_bytes == CACHE_BYTES
    assert plan.chunk_tasks == -(-(most + 1) // plan.chunk_keys)

    for case in CASES:
        arguments = case.build(torch.float32)
        expected = run("numba", arguments)
        with monkeypatch.context() as patch:
            patch.setattr(attention_plan, "CACHE_BYTES", 2 * BLOCK_KEYS * 32 * 4)
            assert_same(run("numba", arguments), expected)


def busiest(weights: list[int], threads: int) -> float:
    """Work of the busiest thread over the mean; whoever gets free takes the next task."""
    loads = [0] * threads
    for weight in weights:
        heapq.heapreplace(loads, loads[0] + weight)
    return max(loads) * threads / sum(weights)


@pytest.mark.parametrize("length", [8192, 16384])
def test_one_head_keeps_64_threads_busy(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = 64
    monkeypatch.setattr(attention_plan, "thread_count", lambda tasks: min(tasks, threads))
    one_head = Sizes(1, 1, 1, length, length)
    tiles = forward_plan(one_head, LANES, 0).grabs
    assert busiest([1] * tiles, threads) == 1.0
    # causal: tile t has t + 1 parts of work, the longest first
    assert busiest(list(range(tiles, 0, -1)), threads) < 1.02

    plan = backward_plan(one_head, LANES, 512, None)
    chunks = plan.chunk_tasks
    assert plan.chunk_keys % BLOCK_KEYS == 0
    assert chunks * plan.chunk_keys >= length
    assert busiest([1] * chunks, threads) == 1.0
    # causal: the first chunk, which all queries attend, has twice the mean of as many threads
    assert busiest(list(range(chunks, 0, -1)), threads) < (2.0 if length == 8192 else 1.02)


def test_short_queries_are_divided_into_narrower_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    one_head = Sizes(1, 1, 1, 512, 512)
    monkeypatch.setattr(attention_plan, "thread_count", lambda tasks: min(tasks, 64))
    narrow = forward_plan(one_head, LANES, 0).tile
    monkeypatch.setattr(attention_plan, "thread_count", lambda tasks: 1)
    assert narrow < forward_plan(one_head, LANES, 0).tile
