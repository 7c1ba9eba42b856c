"""Second derivatives, forward mode and vmap: against finite differences, the oracle, and loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    KeyLengths,
    QueryLengths,
    Window,
    add_layer_norm,
    attention,
    attention_varlen,
    explain,
    layer_norm,
    masked_softmax,
    rms_norm,
)

from .backends import device_of, doing, is_interpreted, refused

Function = Callable[..., Any]
Made = tuple[Function, tuple[Tensor, ...]]


def rand(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=dtype)


def heads(heads: int = 2, key_heads: int = 1, keys: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q = rand(2, heads, 3, 2, seed=1)
    return q, rand(2, key_heads, keys, 2, seed=2), rand(2, key_heads, keys, 3, seed=3)


# name -> (q, k, v and further tensors with a derivative), and how they become arguments
ATTENTION: dict[str, tuple[tuple[Tensor, ...], Callable[..., dict[str, Any]]]] = {
    "plain": (heads(), dict),
    "masked_softcap": (
        heads(),
        lambda: {
            "mask": Causal("lower_right") & KeyLengths(torch.tensor([0, 3])),
            "softcap": 0.8,
        },
    ),
    "bias_sinks": (
        (*heads(), rand(2, 1, 4), rand(2)),
        lambda bias, sinks: {"bias": bias, "sinks": sinks},
    ),
    "all": (
        (*heads(), rand(1, 3, 4), rand(2)),
        lambda bias, sinks: {
            "bias": bias.masked_fill(torch.eye(3, 4).bool(), -torch.inf),
            "sinks": sinks,
            "mask": Window(2, 1, "lower_right") & QueryLengths(torch.tensor([3, 2])),
            "softcap": 1.5,
            "dropout_p": 0.3,
            "seed": 4,
            "scale": 0.6,
        },
    ),
    "alibi_dropout": (
        heads(2, 2),
        lambda: {"bias": ALiBi(torch.tensor([0.5, 0.2]), 1), "dropout_p": 0.5, "seed": 1},
    ),
    "no_keys": (heads(keys=0), dict),
}
FEATURES = {
    "masked_softcap": {"softcap"},
    "bias_sinks": {"sinks"},
    "all": {"softcap", "sinks"},
    "alibi_dropout": {"alibi"},
}


def attention_case(name: str, backend: str) -> Made:
    tensors, options = ATTENTION[name]

    def call(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, return_lse=True, backend=backend, **options(*others))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return call, tensors


def norm_case(name: str, backend: str) -> Made:
    x, other, weight, bias = rand(2, 3, 5), rand(2, 3, 5, seed=7), rand(5), rand(5, seed=1)
    mask = Causal(1) & KeyLengths(torch.tensor([4]))
    calls: dict[str, Made] = {
        "layer_norm": (lambda *t: layer_norm(*t, backend=backend), (x, weight, bias)),
        "layer_norm_plain": (lambda x: layer_norm(x, backend=backend), (x,)),
        "rms_norm": (lambda *t: rms_norm(*t, backend=backend), (x, weight)),
        "rms_norm_plain": (lambda x: rms_norm(x, backend=backend), (x,)),
        "add_layer_norm": (
            lambda *t: add_layer_norm(*t, backend=backend),
            (x, other, weight, bias),
        ),
        "add_layer_norm_dropout": (
            lambda x, residual, weight, bias: add_layer_norm(
                x, residual, weight, bias, dropout_p=0.4, seed=3, backend=backend
            ),
            (x, other, weight, bias),
        ),
        "masked_softmax": (lambda x: masked_softmax(x, mask, 0.7, backend=backend), (x[:1],)),
    }
    return calls[name]


NORMS = (
    "layer_norm",
    "layer_norm_plain",
    "rms_norm",
    "rms_norm_plain",
    "add_layer_norm",
    "add_layer_norm_dropout",
    "masked_softmax",
)


def op_of(name: str) -> str:
    return name.removesuffix("_plain").removesuffix("_dropout") if name in NORMS else "attention"


# What is tested is the same on every backend; an interpreted one is too slow for all of it.
EVERY = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name in (*ATTENTION, *NORMS)
    for backend in doing(op_of(name))
    if not is_interpreted(backend)
]
COMPILED = pytest.mark.parametrize(
    "backend", [backend for backend in doing("attention") if not is_interpreted(backend)]
)


def made(name: str, backend: str) -> Made | None:
    """The case; None where the backend declines it, which is then asserted."""
    make = norm_case if name in NORMS else attention_case
    function, tensors = make(name, backend)
    tensors = tuple(tensor.to(device_of(backend)) for tensor in tensors)
    features = FEATURES.get(name, set()) | {op_of(name)}
    return None if refused(backend, features, lambda: function(*tensors)) else (function, tensors)


@pytest.mark.parametrize("name,backend", EVERY)
def test_second_derivatives(name: str, backend: str) -> None:
    """Reverse and forward over reverse, against finite differences of the gradients."""
    case = made(name, backend)
    if case is None:
        return
    function, tensors = case
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name,backend", EVERY)
def test_forward_mode(name: str, backend: str) -> None:
    case = made(name, backend)
    if case is None:
        return
    function, tensors = case
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, check_backward_ad=False
    )
    values, tangents = jvp(function, tensors, tuple(t.cos() for t in tensors))
    expected = function(*tensors)
    found: Any = zip(tuple_of(values), tuple_of(tangents), tuple_of(expected), strict=True)
    for value, tangent, other in found:
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-13)
        assert tangent.shape == value.shape


def jvp(
    function: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Any, Any]:
    """The value and the tangent."""
    both: Any = torch.func.jvp(function, tensors, tangents)
    return both


def tuple_of(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def loss_of(function: Function) -> Function:
    return lambda *tensors: sum(output.sin().sum() for output in tuple_of(function(*tensors)))


@pytest.mark.parametrize(
    "name,backend",
    [each for each in EVERY if each.values[0] != "no_keys"],  # torch can't stack no rows
)
def test_hessians_of_torch_func(name: str, backend: str) -> None:
    """`torch.func.hessian` (forward over reverse), jacrev of grad, and hessian-vector products."""
    case = made(name, backend)
    if case is None:
        return
    function, tensors = case
    loss = loss_of(function)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    expected = torch.autograd.functional.hessian(loss, leaves)[0]
    every = tuple(range(len(tensors)))
    forward = torch.func.hessian(loss, argnums=every)(*tensors)[0]
    reverse = torch.func.jacrev(torch.func.grad(loss, argnums=every), argnums=every)(*tensors)[0]
    found: Any = zip(forward, reverse, expected, strict=True)
    for got, other, right in found:
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(other, right, rtol=1e-9, atol=1e-11)
    direction = tuple(tensor.cos() for tensor in tensors)
    _, product = jvp(torch.func.grad(loss), tensors, direction)
    right = torch.stack(
        [
            torch.einsum("...i,i", of.reshape(*tensors[0].shape, -1), along.reshape(-1))
            for of, along in zip(expected, direction, strict=True)
        ]
    ).sum(0)
    torch.testing.assert_close(product, right, rtol=1e-9, atol=1e-11)


@COMPILED
def test_third_derivatives(backend: str) -> None:
    q, k, v = (tensor[:1, :1, :2].clone().requires_grad_() for tensor in heads())

    def gradient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        loss = attention(q, k, v, backend=backend).sin().sum()
        return torch.autograd.grad(loss, (q, k, v), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (q, k, v), fast_mode=True)


@COMPILED
def test_nested_forward_mode(backend: str) -> None:
    """A tangent of a tangent, and a gradient of one, as of the equation in plain torch."""
    q, k, v = (tensor.to(device_of(backend)) for tensor in heads(1, 1))

    def plain(q: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * q.shape[3] ** -0.5, -1) @ v

    def fused(q: Tensor) -> Tensor:
        return attention(q, k, v, backend=backend)

    def tangent(function: Function) -> Function:
        return lambda q: jvp(function, (q,), (q.cos(),))[1]

    nested = tangent(tangent(fused))(q)
    torch.testing.assert_close(nested, tangent(tangent(plain))(q), rtol=1e-10, atol=1e-12)
    mixed = torch.func.grad(loss_of(tangent(fused)))(q)
    torch.testing.assert_close(
        mixed, torch.func.grad(loss_of(tangent(plain)))(q), rtol=1e-10, atol=1e-12
    )


@COMPILED
def test_packed_sequences(backend: str) -> None:
    q, k, v = rand(5, 2, 2), rand(6, 1, 2), rand(6, 1, 3)
    starts = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 3, 6])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_varlen(q, k, v, *starts, Causal("lower_right"), backend=backend)

    leaves = tuple(tensor.clone().requires_grad_() for tensor in (q, k, v))
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)


@COMPILED
def test_padding_may_hold_anything(backend: str) -> None:
    """NaN in keys that nobody attends, and in their tangents, reaches no derivative."""
    q, k, v = heads(2, 2)
    mask = KeyLengths(torch.tensor([2, 3]))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, backend=backend)

    def derivatives(k: Tensor, v: Tensor) -> list[Tensor]:
        _, tangent = jvp(function, (q, k, v), (q, k, v))
        loss = loss_of(function)
        _, product = jvp(torch.func.grad(loss, (0, 1, 2)), (q, k, v), (q, k, v))
        return [tangent, *product]

    def twice_backward(k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = tuple(tensor.clone().requires_grad_() for tensor in (q, k, v))
        gradients = torch.autograd.grad(loss_of(function)(*leaves), leaves, create_graph=True)
        return list(torch.autograd.grad(gradients, leaves, (q, k, v)))

    poisoned = tuple(tensor.clone() for tensor in (k, v))
    for tensor in poisoned:
        tensor[0, :, 2:] = torch.nan
        tensor[1, :, 3:] = torch.inf
    for run in (derivatives, twice_backward):
        for got, expected in zip(run(*poisoned), run(k, v), strict=True):
            assert torch.equal(got, expected)


# --- vmap: the same as a loop over the samples ----------------------------------------------------

SAMPLES = 3
Options = Callable[..., dict[str, Any]]


def samples(*size: int, seed: int = 0) -> Tensor:
    return rand(SAMPLES, *size, seed=seed)


LENGTHS = torch.tensor([[4, 2], [1, 3], [0, 4]])
# name -> tensors beyond q, k, v; which of all have samples; their use; the features
VMAPPED: dict[str, tuple[tuple[Tensor, ...], str, Options, set[str]]] = {
    "plain": ((), "qkv", dict, set()),
    "shared_keys": ((), "q", lambda: {"mask": Causal("lower_right")}, set()),
    "shared_queries": ((), "kv", lambda: {"mask": KeyLengths(LENGTHS[0])}, set()),
    "lengths": (
        (LENGTHS,),
        "qkv0",
        lambda lengths: {"mask": KeyLengths(lengths) & QueryLengths(lengths)},
        set(),
    ),
    "offsets": ((LENGTHS - 2,), "qv0", lambda at: {"mask": Causal(at) & Window(2, 2, 0)}, set()),
    "dense": (
        (samples(2, 3, 4) > 0,),
        "qkv0",
        lambda allowed: {"mask": Dense(allowed)},
        set(),
    ),
    "dense_shared": ((rand(2, 1, 3, 4) > 0,), "v", lambda mask: {"mask": Dense(mask)}, set()),
    "documents": (
        (samples(2, 3).gt(0).int(), samples(2, 4).gt(0).int()),
        "qk01",
        lambda ids, key_ids: {"mask": Documents(ids, key_ids)},
        {"documents"},
    ),
    "bias": ((samples(2, 3, 4),), "qkv0", lambda bias: {"bias": bias}, set()),
    "bias_shared": ((rand(2, 1, 1, 4),), "qkv", lambda bias: {"bias": bias}, set()),
    "bias_broadcast": ((rand(1, 2, 3, 4),), "qkv", lambda bias: {"bias": bias}, set()),
    "sinks": ((rand(2),), "qkv", lambda sinks: {"sinks": sinks}, {"sinks"}),
    "sinks_samples": ((samples(2),), "q0", lambda sinks: {"sinks": sinks}, {"sinks"}),
    "alibi": (
        (samples(2).abs(),),
        "qkv0",
        lambda slopes: {"bias": ALiBi(slopes, 1)},
        {"alibi"},
    ),
    "dropout": ((), "qkv", lambda: {"dropout_p": 0.4, "seed": 3}, set()),
    "seeds": (
        (torch.tensor([5, 6, 7]),),
        "qkv0",
        lambda seed: {"dropout_p": 0.4, "seed": seed},
        set(),
    ),
}
VMAP_CASES = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name in VMAPPED
    for backend in doing("attention")
    if not is_interpreted(backend) or name == "plain"
]


def vmapped(name: str, backend: str) -> tuple[Function, tuple[Tensor, ...], tuple[int | None, ...]]:
    """The function of one sample, the tensors, and where their samples lie."""
    others, which, options, _ = VMAPPED[name]
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
        out, lse = attention(q, k, v, return_lse=True, backend=backend, **options(*others))
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
    function, tensors, dims = vmapped(name, backend)
    one = tuple(
        t if dim is None else t.select(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    )
    if not refused(backend, VMAPPED[name][3], lambda: function(*one)):
        assert_as_looped(function, tensors, dims)


@pytest.mark.parametrize("name,backend", VMAP_CASES)
def test_vmap_of_gradients(name: str, backend: str) -> None:
    """A gradient of each sample, of what the samples share too; and a gradient of all of them."""
    function, tensors, dims = vmapped(name, backend)
    one = tuple(
        t if dim is None else t.select(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    )
    if refused(backend, VMAPPED[name][3], lambda: function(*one)):
        return
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
        return attention(q, k, k, backend=backend)

    got = torch.func.vmap(torch.func.vmap(function), in_dims=(0, None))(q, k)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(got[i, j], function(q[i, j], k[j]))


@COMPILED
def test_randomness_of_a_drawn_seed(backend: str) -> None:
    """ "different" draws a seed a sample, "same" one for all, "error" refuses; as in torch."""
    q, k, v = (tensor.expand(SAMPLES, *tensor.shape) for tensor in heads(2, 2, 64))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.5, backend=backend)

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
    for backend in doing(op_of(name))
    if not is_interpreted(backend) or name == "layer_norm"
]


@pytest.mark.parametrize("name,which,backend", NORM_SAMPLES)
def test_vmap_of_norms(name: str, which: str, backend: str) -> None:
    """Samples of rows, with one set of parameters or one a sample; values and gradients."""
    case = made(name, backend)
    assert case is not None
    function, tensors = case
    dims = tuple(0 if which == "xw" or tensor.dim() > 1 else None for tensor in tensors)
    stacked = tuple(
        tensor if dim is None else torch.stack([tensor, tensor.cos(), tensor - 1])
        for tensor, dim in zip(tensors, dims, strict=True)
    )
    assert_as_looped(function, stacked, dims)
    every = tuple(range(len(tensors)))
    assert_as_looped(torch.func.grad(loss_of(function), argnums=every), stacked, dims)


def test_explain_says_who_computes_derivatives() -> None:
    q = torch.zeros(1, 1, 2, 4)
    *_, last = explain(q, q, q).splitlines()
    assert last.startswith("  gradients: ")
    assert "forward-mode and second derivatives: the unfused formulas of the reference" in last
