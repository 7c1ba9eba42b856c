"""Second derivatives and forward mode, against finite differences and the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels import Causal, KeyLengths, attention, attention_varlen, explain

from ..tensors import rand
from .backends import device_of
from .derivative_cases import COMPILED, EVERY, Function, heads, jvp, loss_of, made, tuple_of


@pytest.mark.parametrize("name,backend", EVERY)
def test_second_derivatives(name: str, backend: str) -> None:
    """Reverse and forward over reverse, against finite differences of the gradients."""
    function, tensors = made(name, backend)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name,backend", EVERY)
def test_forward_mode(name: str, backend: str) -> None:
    function, tensors = made(name, backend)
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


@pytest.mark.parametrize(
    "name,backend",
    [each for each in EVERY if each.values[0] != "no_keys"],  # torch can't stack no rows
)
def test_hessians_of_torch_func(name: str, backend: str) -> None:
    """`torch.func.hessian` (forward over reverse), jacrev of grad, and hessian-vector products."""
    function, tensors = made(name, backend)
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


def test_explain_says_who_computes_derivatives() -> None:
    q = torch.zeros(1, 1, 2, 4)
    *_, last = explain(q, q, q).splitlines()
    assert last.startswith("  gradients: ")
    assert "forward-mode and second derivatives: the unfused formulas of the reference" in last
