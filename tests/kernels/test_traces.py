"""torch.jit.trace: a graph of honest operations, right for other lengths, masks and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk

from .support import loss_gradients, traced

Draw = Callable[[torch.Generator, int], tuple[Tensor, ...]]


def check(function: Callable[..., Any], draw: Draw) -> None:
    """Traced with one length and its values, the function itself with others, gradients too."""
    generator = torch.Generator().manual_seed(0)
    graph = traced(function, *draw(generator, 9))
    for length in (9, 12, 4):
        arguments = draw(generator, length)
        found = (loss_gradients(call, arguments) for call in (graph, function))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)


def heads(generator: torch.Generator, length: int) -> tuple[Tensor, ...]:
    """q, k, v, lengths of keys, ids of documents, a bias, sinks."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        *(normal(2, 4, length, 8), normal(2, 2, length, 8), normal(2, 2, length, 8)),
        torch.randint(length + 1, (2,), generator=generator),
        torch.randint(3, (2, length), generator=generator).sort(1).values,
        *(normal(4, 1, length), normal(4)),
    )


CASES: dict[str, Callable[..., Any]] = {
    "plain": lambda call, q, k, v, n, ids, bias, sinks: call(q, k, v),
    "lengths": lambda call, q, k, v, n, ids, bias, sinks: call(
        q, k, v, rk.KeyLengths(n) & rk.QueryLengths(n + 1), return_lse=True
    ),
    "causal": lambda call, q, k, v, n, ids, bias, sinks: call(q, k, v, rk.Causal()),
    "offset": lambda call, q, k, v, n, ids, bias, sinks: call(
        q[:, :, :-2], k, v, rk.Causal("lower_right") & rk.Window(2, 1, n)
    ),
    "dense": lambda call, q, k, v, n, ids, bias, sinks: call(q, k, v, ids[:, None, None] > 0),
    "documents": lambda call, q, k, v, n, ids, bias, sinks: call(
        q, k, v, rk.Documents(ids) & rk.Documents(ids % 2, ids % 3)
    ),
    "bias_sinks": lambda call, q, k, v, n, ids, bias, sinks: call(
        q, k, v, bias=bias, sinks=sinks, softcap=2.0
    ),
    "alibi": lambda call, q, k, v, n, ids, bias, sinks: call(
        q[:, :, 1:], k, v, bias=rk.ALiBi(sinks.detach().abs(), "lower_right")
    ),
    "dropout": lambda call, q, k, v, n, ids, bias, sinks: call(q, k, v, dropout_p=0.3, seed=7),
    "weights": lambda call, q, k, v, n, ids, bias, sinks: call(
        q, k, v, rk.KeyLengths(n), return_weights=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    check(lambda *tensors: CASES[name](rk.attention, *tensors), heads)


def test_the_lengths_are_an_input_of_the_graph() -> None:
    *qkv, lengths, _, _, _ = heads(torch.Generator().manual_seed(0), 9)
    graph = torch.jit.trace(
        lambda q, k, v, n: rk.attention(q, k, v, rk.KeyLengths(n)), (*qkv, lengths)
    )
    (node,) = (node for node in graph.graph.nodes() if node.kind() == "rowmax::attention")
    (cast,) = (value.node() for value in node.inputs() if value.node().kind() == "aten::to")
    *_, last = graph.graph.inputs()
    assert last in list(cast.inputs())


def test_dropout_draws_anew() -> None:
    q = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    graph = torch.jit.trace(lambda q: rk.attention(q, q, q, dropout_p=0.5), (q,), check_trace=False)
    torch.manual_seed(0)
    first, second = graph(q), graph(q)
    torch.manual_seed(0)
    assert torch.equal(first, rk.attention(q, q, q, dropout_p=0.5))
    assert torch.equal(second, rk.attention(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, second)


def rows(generator: torch.Generator, length: int) -> tuple[Tensor, ...]:
    x = torch.randn(2, length, 8, generator=generator, dtype=torch.float64)
    w, b = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    return x, w, b, torch.randint(length + 1, (2,), generator=generator)


ROW_WISE: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x, w, b, n: rk.layer_norm(x, w, b),
    "rms_norm": lambda x, w, b, n: rk.rms_norm(x, w),
    "add_layer_norm": lambda x, w, b, n: rk.add_layer_norm(x, x.cos(), w, b),
    "masked_softmax": lambda x, w, b, n: rk.masked_softmax(
        x @ x.transpose(1, 2), rk.KeyLengths(n) & rk.Causal(1), 0.5
    ),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_norms_and_softmax(name: str) -> None:
    check(ROW_WISE[name], rows)


def test_what_is_wrong_is_refused_in_a_trace_too() -> None:
    q = torch.randn(2, 2, 9, 8)
    with pytest.raises(ValueError, match=r"attention: `k`: expected .*, got shape \(2, 2, 9, 7\)"):
        torch.jit.trace(lambda q: rk.attention(q, q[..., :7], q), (q,))
    with pytest.raises(ValueError, match=r"`bias`: .* = \(2, 2, 9, 9\), got shape \(2, 2, 9, 5\)"):
        torch.jit.trace(lambda q, b: rk.attention(q, q, q, bias=b), (q, q[..., :5]))


def test_packed_sequences_are_refused() -> None:
    x, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9])
    with pytest.raises(RuntimeError, match=r"attention_varlen: torch\.jit\.trace can't record it"):
        torch.jit.trace(lambda x, starts: rk.attention_varlen(x, x, x, starts, starts), (x, starts))
