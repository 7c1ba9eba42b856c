"""Tensors that autograd makes and whose memory is not their values: zeros without memory.

The gradient of `sgn` is one, and so are second derivatives of `abs` and of `l1_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rowmax.kernels as rk

from ..tensors import rand
from .backends import BACKENDS, device_of


def zeros_as(tensor: Tensor) -> Tensor:
    """Zeros without memory, of the shape and device of `tensor`."""
    leaf = tensor.detach().requires_grad_()
    (zeros,) = torch.autograd.grad(torch.sgn(leaf).sum(), leaf)
    assert zeros._is_zerotensor()
    return zeros


def packed(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    starts = torch.tensor([0, 1, 4], device=q.device)
    return rk.attention_varlen(q, k, v, starts, starts, rk.Causal(), backend=backend)


# without the types of their arguments, which here come as a tuple
attend: Callable[..., Any] = rk.attention
add_norm: Callable[..., Any] = rk.add_layer_norm

HEADS, ROWS, PARAMETERS = ((1, 2, 4, 6),) * 3, ((3, 5),), ((5,), (5,))
# op and what it is called with: the shapes of its tensors, each in turn without memory
CALLS: dict[str, tuple[str, tuple[tuple[int, ...], ...], Callable[..., Any]]] = {
    "attention": ("attention", HEADS, lambda *t, backend: attend(*t, backend=backend)),
    "causal": ("attention", HEADS, lambda *t, backend: attend(*t, rk.Causal(), backend=backend)),
    "everything": (
        "attention",
        (*HEADS, (2, 4, 4), (2,), (2,)),
        lambda q, k, v, bias, sinks, slopes, backend: (
            rk.attention(
                *(q, k, v, rk.KeyLengths(torch.tensor([3], device=q.device)), bias),
                sinks=sinks,
                softcap=2.0,
                dropout_p=0.2,
                seed=3,
                return_lse=True,
                backend=backend,
            ),
            rk.attention(q, k, v, bias=rk.ALiBi(slopes.detach()), backend=backend),
        ),
    ),
    "packed": ("attention", HEADS, packed),
    "masked_softmax": (
        "masked_softmax",
        ((2, 4, 5),),
        lambda t, backend: rk.masked_softmax(t, rk.Causal(1), 0.5, backend=backend),
    ),
    "layer_norm": (
        "layer_norm",
        (*ROWS, *PARAMETERS),
        lambda *t, backend: rk.layer_norm(*t, backend=backend),
    ),
    "rms_norm": (
        "rms_norm",
        (*ROWS, *PARAMETERS[:1]),
        lambda *t, backend: rk.rms_norm(*t, backend=backend),
    ),
    "add_layer_norm": (
        "add_layer_norm",
        (*ROWS, *ROWS, *PARAMETERS),
        lambda *t, backend: add_norm(*t, dropout_p=0.3, seed=1, backend=backend),
    ),
}
EVERY = pytest.mark.parametrize(
    "name,backend", [(name, backend) for name in CALLS for backend in BACKENDS]
)


def tensors_of(name: str, backend: str) -> list[Tensor]:
    shapes = CALLS[name][1]
    return [rand(*size, seed=n).to(device_of(backend)) for n, size in enumerate(shapes)]


def outputs_of(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in outputs_of(output)]


def all_equal(found: Any, expected: Any) -> bool:
    pairs = zip(outputs_of(found), outputs_of(expected), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def gradients_of(outputs: Any, leaves: list[Tensor], of_outputs: Any) -> list[Tensor]:
    found = torch.autograd.grad(
        outputs_of(outputs), leaves, of_outputs, retain_graph=True, allow_unused=True
    )
    return [gradient for gradient in found if gradient is not None]


@EVERY
def test_as_inputs(name: str, backend: str) -> None:
    """The bits of zeros in memory, a view of them too, with and without a gradient."""
    call = CALLS[name][2]
    tensors = tensors_of(name, backend)
    for at, tensor in enumerate(tensors):
        of_both = zeros_as(torch.cat((tensor, tensor)))
        others = [*tensors[:at], *tensors[at + 1 :]]
        leaves = [other.clone().requires_grad_() for other in others]
        results: list[list[Tensor]] = []
        for zeros in (torch.zeros_like(tensor), zeros_as(tensor), of_both[len(tensor) :]):
            outputs = outputs_of(call(*others[:at], zeros, *others[at:], backend=backend))
            if leaves:
                with_graph = outputs_of(call(*leaves[:at], zeros, *leaves[at:], backend=backend))
                weights = [output.detach().cos() for output in with_graph]
                outputs += gradients_of(with_graph, leaves, weights)
            results.append(outputs)
        assert all_equal(results[1], results[0])
        assert all_equal(results[2], results[0])


@EVERY
def test_as_gradients(name: str, backend: str) -> None:
    """What arrives from `sgn` gives zeros, and beside other gradients adds nothing."""
    leaves = [tensor.requires_grad_() for tensor in tensors_of(name, backend)]
    outputs = outputs_of(CALLS[name][2](*leaves, backend=backend))
    signs = [torch.sgn(output).sum() for output in outputs]
    for gradient in gradients_of(signs, leaves, None):
        assert (gradient == 0).all()
    for at, output in enumerate(outputs):
        weight = rand(*output.shape, seed=9).to(output)
        without = [zeros_as(other) for other in outputs]
        in_memory = [torch.zeros_like(other) for other in outputs]
        without[at] = in_memory[at] = weight
        found = gradients_of(outputs, leaves, without)
        assert all_equal(found, gradients_of(outputs, leaves, in_memory))


@EVERY
def test_negated_gradients(name: str, backend: str) -> None:
    """A gradient that is negated when it is read."""
    leaves = [tensor.requires_grad_() for tensor in tensors_of(name, backend)]
    outputs = outputs_of(CALLS[name][2](*leaves, backend=backend))
    weights = [rand(*output.shape, seed=9).to(output) for output in outputs]
    negated = [torch._neg_view(-weight) for weight in weights]
    assert all(weight.is_neg() for weight in negated)
    found = gradients_of(outputs, leaves, negated)
    assert all_equal(found, gradients_of(outputs, leaves, weights))


def product(function: Callable[[Tensor], Tensor], x: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """A Hessian-vector product of the loss."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(function(leaf)), leaf, create_graph=True)
    (found,) = torch.autograd.grad((gradient * x.cos()).sum(), leaf)
    return found


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda y: F.l1_loss(y, y.detach().cos()),
    "abs": lambda y: y.abs().mean(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_hessian_vector_products(loss: str, backend: str) -> None:
    device = device_of(backend)
    x, weight = rand(4, 8).to(device), rand(8, seed=1).to(device).requires_grad_()
    heads = rand(1, 2, 4, 8, seed=2).to(device)
    mask = torch.ones(4, 4, dtype=torch.bool, device=device).tril()
    pairs: list[tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (
            x,
            lambda x: rk.layer_norm(x, weight, backend=backend),
            lambda x: F.layer_norm(x, (8,), weight),
        ),
        (
            x,
            lambda x: rk.rms_norm(x, weight, backend=backend),
            lambda x: F.rms_norm(x, (8,), weight, eps=1e-6),
        ),
        (
            x,
            lambda x: rk.add_layer_norm(x, x.sin(), weight, backend=backend)[0],
            lambda x: F.layer_norm(x + x.sin(), (8,), weight),
        ),
        (
            heads,
            lambda x: rk.attention(x, x, x, rk.Causal(), backend=backend),
            lambda x: (x @ x.mT * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ x,
        ),
        (x, lambda x: rk.masked_softmax(x, backend=backend), lambda x: x.softmax(-1)),
    ]
    for at, ours, theirs in pairs:
        expected = product(theirs, at, LOSSES[loss])
        torch.testing.assert_close(product(ours, at, LOSSES[loss]), expected, rtol=1e-9, atol=1e-12)
