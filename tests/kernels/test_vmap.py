"""vmap: the same as a loop over the samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk

from ..tensors import rand
from .backends import BACKENDS, device_of, is_interpreted
from .derivative_cases import COMPILED, NORMS, Function, heads, loss_of, made, tuple_of

SAMPLES = 3
Options = Callable[..., dict[str, Any]]


def samples(*size: int, seed: int = 0) -> Tensor:
    return rand(SAMPLES, *size, seed=seed)


LENGTHS = torch.tensor([[4, 2], [1, 3], [0, 4]])
# name -> tensors beyond q, k, v; which of all have samples; their use
VMAPPED: dict[str, tuple[tuple[Tensor, ...], str, Options]] = {
    "plain": ((), "qkv", dict),
    "shared_keys": ((), "q", lambda: {"mask": rk.Causal("lower_right")}),
    "shared_queries": ((), "kv", lambda: {"mask": rk.KeyLengths(LENGTHS[0])}),
    "lengths": (
        (LENGTHS,),
        "qkv0",
        lambda lengths: {"mask": rk.KeyLengths(lengths) & rk.QueryLengths(lengths)},
    ),
    "offsets": ((LENGTHS - 2,), "qv0", lambda at: {"mask": rk.Causal(at) & rk.Window(2, 2, 0)}),
    "dense": ((samples(2, 3, 4) > 0,), "qkv0", lambda allowed: {"mask": rk.Dense(allowed)}),
    "dense_shared": ((rand(2, 1, 3, 4) > 0,), "v", lambda mask: {"mask": rk.Dense(mask)}),
    "documents": (
        (samples(2, 3).gt(0).int(), samples(2, 4).gt(0).int()),
        "qk01",
        lambda ids, key_ids: {"mask": rk.Documents(ids, key_ids)},
    ),
    "bias": ((samples(2, 3, 4),), "qkv0", lambda bias: {"bias": bias}),
    "bias_shared": ((rand(2, 1, 1, 4),), "qkv", lambda bias: {"bias": bias}),
    "bias_broadcast": ((rand(1, 2, 3, 4),), "qkv", lambda bias: {"bias": bias}),
    "sinks": ((rand(2),), "qkv", lambda sinks: {"sinks": sinks}),
    "sinks_samples": ((samples(2),), "q0", lambda sinks: {"sinks": sinks}),
    "alibi": ((samples(2).abs(),), "qkv0", lambda slopes: {"bias": rk.ALiBi(slopes, 1)}),
    "dropout": ((), "qkv", lambda: {"dropout_p": 0.4, "seed": 3}),
    "seeds": ((torch.tensor([5, 6, 7]),), "qkv0", lambda seed: {"dropout_p": 0.4, "seed": seed}),
}
VMAP_CASES = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name in VMAPPED
    for backend in BACKENDS
    if not is_interpreted(backend) or name == "plain"
]


def vmapped(name: str, backend: str) -> tuple[Function, tuple[Tensor, ...], tuple[int | None, ...]]:
    """The function of one sample, the tensors, and where their samples lie."""
    others, which, options = VMAPPED[name]
    sizes = {"q": (2, 2, 3, 2), "k": (2, 1, 4, 2), "v": (2, 1, 4, 3)}
    tensors = [
        samples(*size, seed=ord(key)) if key in which else rand(*size, seed=ord(key))
        for key, size in sizes.items()
    ]
    dims = [0 if key in which else None for key in sizes]
    dims += [0 if str(at) in which else None for at in range(len(others))]
    if dims[2] == 0:  # samples need not come first
        tensors[2], dims[2] = tensors[2].movedim(0, 2), 2

    def function(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = rk.attention(q, k, v, return_lse=True, backend=backend, **options(*others))
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    device = device_of(backend)
    return function, tuple(t.to(device) for t in (*tensors, *others)), tuple(dims)


def looped(function: Function, tensors: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> Any:
    """What `torch.func.vmap` stands for."""
    results = [
        tuple_of(
            function(
                *(
                    tensor if dim is None else tensor.select(dim, at)
                    for tensor, dim in zip(tensors, dims, strict=True)
                )
            )
        )
        for at in range(SAMPLES)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def assert_as_looped(
    function: Function, tensors: tuple[Tensor, ...], dims: tuple[int | None, ...]
) -> None:
    got = tuple_of(torch.func.vmap(function, in_dims=dims)(*tensors))
    for one, other in zip(got, looped(function, tensors, dims), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name,backend", VMAP_CASES)
def test_vmap_of_attention(name: str, backend: str) -> None:
    assert_as_looped(*vmapped(name, backend))


@pytest.mark.parametrize("name,backend", VMAP_CASES)
def test_vmap_of_gradients(name: str, backend: str) -> None:
    """A gradient of each sample, of what the samples share too; and a gradient of all of them."""
    function, tensors, dims = vmapped(name, backend)
    floats = tuple(at for at, tensor in enumerate(tensors) if tensor.is_floating_point())
    if name == "alibi":
        floats = (0, 1, 2)  # slopes are constants
    assert_as_looped(torch.func.grad(loss_of(function), argnums=floats), tensors, dims)

    def of_all(call: Function) -> Any:
        def loss(*wanted: Tensor) -> Tensor:
            replaced = list(tensors)
            for at, tensor in zip(floats, wanted, strict=True):
                replaced[at] = tensor
            return sum(output.sin().sum() for output in call(*replaced))

        wanted = tuple(tensors[at] for at in floats)
        return torch.func.grad(loss, argnums=tuple(range(len(floats))))(*wanted)

    got = of_all(torch.func.vmap(function, in_dims=dims))
    expected = of_all(lambda *tensors: looped(function, tensors, dims))
    for gradient, right in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-12)


@COMPILED
def test_vmap_within_vmap(backend: str) -> None:
    q, k = rand(2, 3, 1, 2, 3, 4), rand(3, 1, 1, 5, 4)

    def function(q: Tensor, k: Tensor) -> Tensor:
        return rk.attention(q, k, k, backend=backend)

    got = torch.func.vmap(torch.func.vmap(function), in_dims=(0, None))(q, k)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(got[i, j], function(q[i, j], k[j]))


@COMPILED
def test_randomness_of_a_drawn_seed(backend: str) -> None:
    """ "different" draws a seed a sample, "same" one for all, "error" refuses; as in torch."""
    q, k, v = (tensor.expand(SAMPLES, *tensor.shape) for tensor in heads(2, 2, 64))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rk.attention(q, k, v, dropout_p=0.5, backend=backend)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(function)(q, k, v)
    same = torch.func.vmap(function, randomness="same")(q, k, v)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(function, randomness="different")(q, k, v)
    assert not torch.equal(different[0], different[1])


NORM_SAMPLES = [
    pytest.param(name, which, backend, id=f"{name}-{which}-{backend}")
    for name in NORMS
    for which in (("x",) if name.endswith("plain") or name == "masked_softmax" else ("x", "xw"))
    for backend in BACKENDS
    if not is_interpreted(backend) or name == "layer_norm"
]


@pytest.mark.parametrize("name,which,backend", NORM_SAMPLES)
def test_vmap_of_norms(name: str, which: str, backend: str) -> None:
    """Samples of rows, with one set of parameters or one a sample; values and gradients."""
    function, tensors = made(name, backend)
    dims = tuple(0 if which == "xw" or tensor.dim() > 1 else None for tensor in tensors)
    stacked = tuple(
        tensor if dim is None else torch.stack([tensor, tensor.cos(), tensor - 1])
        for tensor, dim in zip(tensors, dims, strict=True)
    )
    assert_as_looped(function, stacked, dims)
    every = tuple(range(len(tensors)))
    assert_as_looped(torch.func.grad(loss_of(function), argnums=every), stacked, dims)
