"""torch.compile with fullgraph=True: masks made inside, dynamic shapes, real Inductor code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk

from .backends import BACKENDS, device_of
from .support import loss_gradients

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def inputs(backend: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "q": (2, 4, 9, 8),
        "k": (2, 2, 9, 8),
        "v": (2, 2, 9, 8),
        "bias": (4, 1, 9),
        "sinks": (4,),
    }
    device = device_of(backend)
    made = {name: torch.randn(size, generator=generator).to(device) for name, size in sizes.items()}
    made["lengths"] = torch.tensor([3, 9], device=device)
    made["ids"] = torch.randint(3, (2, 9), generator=generator).sort(1).values.to(device)
    return made


def check(
    function: Callable[..., Any],
    *arguments: Any,
    backend: str = "aot_eager",
    dynamic: bool | None = None,
) -> None:
    """Compiled in one graph, the same values, strides and gradients as without."""
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    found = (loss_gradients(call, arguments) for call in (compiled, function))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
        if got is not None and expected is not None:
            assert got.stride() == expected.stride()


CASES: dict[str, tuple[Callable[..., Any], str]] = {
    "plain": (lambda call, q, k, v: call(q, k, v), "q k v"),
    "causal_lse": (lambda call, q, k, v: call(q, k, v, rk.Causal(), return_lse=True), "q k v"),
    "masks_made_inside": (
        lambda call, q, k, v, lengths: call(
            q,
            k,
            v,
            rk.Window(2, 1, lengths) & rk.KeyLengths(lengths) & rk.QueryLengths(lengths + 1),
        ),
        "q k v lengths",
    ),
    "offset": (
        lambda call, q, k, v: call(
            q[:, :, :5], k, v, rk.Causal("lower_right") & rk.Window(4, None, 2)
        ),
        "q k v",
    ),
    "dense": (
        lambda call, q, k, v, ids: call(q, k, v, rk.Dense(ids[:, None, None] > 0) & rk.Causal()),
        "q k v ids",
    ),
    "bare_tensor": (lambda call, q, k, v, ids: call(q, k, v, ids[:, None, None] > 0), "q k v ids"),
    "documents": (
        lambda call, q, k, v, ids: call(
            q, k, v, rk.Documents(ids) & rk.Documents(ids % 2, ids % 3)
        ),
        "q k v ids",
    ),
    "bias": (lambda call, q, k, v, bias: call(q, k, v, bias=bias, scale=0.3), "q k v bias"),
    "softcap": (lambda call, q, k, v: call(q, k, v, softcap=2.0), "q k v"),
    "sinks": (lambda call, q, k, v, sinks: call(q, k, v, sinks=sinks), "q k v sinks"),
    "alibi": (
        lambda call, q, k, v, sinks: call(q, k, v, bias=rk.ALiBi(sinks.detach().abs())),
        "q k v sinks",
    ),
    "dropout": (lambda call, q, k, v: call(q, k, v, dropout_p=0.3, seed=7), "q k v"),
    "heads_last": (
        lambda call, q: call(*(q.mT.reshape(2, 9, 2, 4, 4).permute(3, 0, 2, 1, 4)[:3])).transpose(
            1, 2
        ),
        "q",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_in_one_graph(name: str, backend: str) -> None:
    function, names = CASES[name]
    made = inputs(backend)

    def call(*arguments: Any, **options: Any) -> Any:
        return rk.attention(*arguments, **options, backend=backend)

    def attend(*tensors: Tensor) -> Any:
        return function(call, *tensors)

    tensors = [made[key] for key in names.split()]
    check(attend, *tensors)


def test_one_graph_serves_other_lengths_and_seeds(backend: str) -> None:
    made = inputs(backend)
    graphs: list[Any] = []

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: int) -> Tensor:
        mask = rk.Causal("lower_right") & rk.Window(3, None, "upper_left")
        return rk.attention(q, k, v, mask, scale=scale, dropout_p=p, seed=seed, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend=counting, dynamic=True)
    for length, seed in ((5, 3), (7, 4), (6, 5)):
        arguments = (made["q"][:, :, :length], made["k"], made["v"], 0.3, 0.2, seed)
        torch.testing.assert_close(compiled(*arguments), attend(*arguments))
    assert len(graphs) == 1
    torch.testing.assert_close(
        compiled(*arguments[:3], 0.4, 0.1, 5), attend(*arguments[:3], 0.4, 0.1, 5)
    )


def test_a_mask_from_outside(backend: str) -> None:
    made = inputs(backend)
    mask = rk.Causal() & rk.KeyLengths(made["lengths"])
    q, k, v = (made[name] for name in "qkv")
    check(lambda q, k, v: rk.attention(q, k, v, mask, backend=backend), q, k, v)
    compiled = torch.compile(rk.attention, fullgraph=True, backend="aot_eager")
    expected = rk.attention(q, k, v, mask, backend=backend)
    torch.testing.assert_close(compiled(q, k, v, mask, backend=backend), expected)


def test_the_seed_is_drawn_in_the_graph(backend: str) -> None:
    q = inputs(backend)["q"]
    compiled = torch.compile(
        lambda q: rk.attention(q, q, q, dropout_p=0.5, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(0)
    first, second = compiled(q), compiled(q)
    torch.manual_seed(0)
    assert torch.equal(compiled(q), first)
    assert not torch.equal(first, second)


NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x, w, b, backend: rk.layer_norm(x, w, b, backend=backend),
    "rms_norm": lambda x, w, b, backend: rk.rms_norm(x, w, backend=backend),
    "add_layer_norm": lambda x, w, b, backend: rk.add_layer_norm(
        x.cos(), x, w, b, dropout_p=0.2, seed=1, backend=backend
    ),
    "masked_softmax": lambda x, w, b, backend: rk.masked_softmax(
        x + w, rk.Causal(1), 0.5, backend=backend
    ),
}


@pytest.mark.parametrize(
    "name,backend", [(name, backend) for name in NORMS for backend in BACKENDS]
)
def test_norms_in_one_graph(name: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(size, generator=generator).to(device_of(backend))
        for size in ((2, 3, 8), (8,), (8,))
    )
    check(lambda x, w, b: NORMS[name](x, w, b, backend), x, w, b)
    check(lambda x, w, b: NORMS[name](x, w, b, backend), x, w, b, dynamic=True)


@pytest.mark.slow
def test_through_inductor(backend: str) -> None:
    """Real generated code around the ops: a projection split into heads, attention, a norm."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(size, generator=generator).to(device_of(backend))
        for size in ((2, 7, 16), (48, 16))
    )
    lengths = torch.tensor([7, 4], device=x.device)

    def layer(x: Tensor, weight: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (x @ weight.T).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        out = rk.attention(q, k, v, rk.Causal() & rk.KeyLengths(lengths), backend=backend)
        return rk.add_layer_norm(out.transpose(1, 2).flatten(2), x, backend="reference")[0]

    check(layer, x, weight, lengths, backend="inductor")
