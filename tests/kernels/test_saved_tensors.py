"""What is kept for the backward pass: no more than torch keeps; what may be changed in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rowmax.kernels as rk

from .. import tensors
from .backends import BACKENDS, device_of

HEADS, LENGTH, DIM = 4, 48, 16
ROWS, COLUMNS = 40, 32
Call = Callable[..., Any]
# without the types of their arguments, which here come as a tuple
attend: Call = rk.attention
add_norm: Call = rk.add_layer_norm
torchs_norm: Call = F.layer_norm
rand = functools.partial(tensors.rand, dtype=torch.float32)


def saved_bytes(call: Callable[[], Any]) -> int:
    """Of all tensors that autograd keeps for the backward pass; each storage once."""
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for _, size in storages.values())


def softmax_of(q: Tensor, k: Tensor, v: Tensor, change: Call) -> Tensor:
    """Attention written out, with a change of the scores."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return change(q @ k.mT * DIM**-0.5).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out: Tensor = F.scaled_dot_product_attention(q, k, v, **options)
    return out


POSITIONS = torch.arange(LENGTH)
DISTANCE = POSITIONS[:, None] - POSITIONS
CAUSAL = DISTANCE >= 0
PADDED = torch.tensor([LENGTH, 9]).view(2, 1, 1, 1) > POSITIONS
BLOCKS = (POSITIONS >= 10) == (POSITIONS >= 10)[:, None]
BIAS = rand(HEADS, LENGTH, LENGTH, seed=7)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = rand(HEADS, seed=8)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT * DIM**-0.5
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    starts = torch.tensor([0, 10, LENGTH])
    return rk.attention_varlen(q, k, v, starts, starts, **options)


# name -> more tensors than q, k and v; rowmax's call of them; and torch's
ATTENTION: dict[str, tuple[tuple[Tensor, ...], Call, Call]] = {
    "plain": ((), rk.attention, sdpa),
    "lse": ((), lambda *t, **o: attend(*t, return_lse=True, **o), sdpa),
    "causal": (
        (),
        lambda *t, **o: attend(*t, rk.Causal(), **o),
        lambda *t: sdpa(*t, is_causal=True),
    ),
    "window": (
        (),
        lambda *t, **o: attend(*t, rk.Window(3, 0), **o),
        lambda *t: sdpa(*t, attn_mask=CAUSAL & (DISTANCE <= 3)),
    ),
    "lengths": (
        (),
        lambda *t, **o: attend(*t, rk.KeyLengths(torch.tensor([LENGTH, 9])), **o),
        lambda *t: sdpa(*t, attn_mask=PADDED),
    ),
    "dense": (
        (),
        lambda *t, **o: attend(*t, rk.Dense(BLOCKS), **o),
        lambda *t: sdpa(*t, attn_mask=BLOCKS),
    ),
    "bias": (
        (BIAS,),
        lambda *t, **o: attend(*t[:3], bias=t[3], **o),
        lambda *t: sdpa(*t[:3], attn_mask=t[3]),
    ),
    "alibi": (
        (),
        lambda *t, **o: attend(*t, bias=rk.ALiBi(SLOPES), **o),
        lambda *t: sdpa(*t, attn_mask=(-SLOPES.view(-1, 1, 1) * DISTANCE.abs()).to(t[0])),
    ),
    "softcap": (
        (),
        lambda *t, **o: attend(*t, softcap=3.0, **o),
        lambda q, k, v: softmax_of(q, k, v, lambda scores: 3.0 * torch.tanh(scores / 3.0)),
    ),
    "sinks": ((SINKS,), lambda *t, **o: attend(*t[:3], sinks=t[3], **o), with_sinks),
    "dropout": (
        (),
        lambda *t, **o: attend(*t, dropout_p=0.1, seed=1, **o),
        lambda *t: sdpa(*t, dropout_p=0.1),
    ),
    "packed": ((), packed, lambda q, k, v: sdpa(q[:1], k[:1], v[:1], attn_mask=BLOCKS)),
}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def assert_no_more(ours: Any, theirs: Any, leaves: list[Tensor], backend: str, wider: int) -> None:
    """Ours keeps no more bytes than theirs, and than `wider`."""
    on_device = [leaf.detach().to(device_of(backend)).requires_grad_() for leaf in leaves]
    own = saved_bytes(lambda: ours(*on_device, backend=backend))
    assert 0 < own <= saved_bytes(lambda: theirs(*leaves)) + wider


@DTYPES
@pytest.mark.parametrize("name,backend", [(n, b) for n in ATTENTION for b in BACKENDS])
def test_bytes_of_attention(name: str, backend: str, dtype: torch.dtype) -> None:
    more, ours, theirs = ATTENTION[name]
    tensors = [rand(2, HEADS, LENGTH, DIM, seed=seed) for seed in range(3)]
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (*tensors, *more)]
    # lse is kept one step wider than the inputs (`layout.saved_lse_dtype`), torch's in float32
    wider = 2 * HEADS * LENGTH * 4 if dtype == torch.float32 else 0
    assert_no_more(ours, theirs, leaves, backend, wider)


def and_norm(x: Tensor, residual: Tensor, *parameters: Tensor, p: float = 0.0) -> Tensor:
    y: Tensor = torchs_norm(residual + F.dropout(x, p), (COLUMNS,), *parameters)
    return y


def scaled(x: Tensor, weight: Tensor | None = None) -> Tensor:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    y = x * rstd.to(x.dtype)
    return y if weight is None else y * weight


# name -> how many of x's shape and parameters; statistics a row; rowmax's call; and torch's
ROWWISE: dict[str, tuple[int, int, int, Call, Call]] = {
    "layer_norm": (1, 2, 2, rk.layer_norm, lambda x, *p: torchs_norm(x, (COLUMNS,), *p)),
    "layer_norm of x alone": (1, 0, 2, rk.layer_norm, lambda x: F.layer_norm(x, (COLUMNS,))),
    "rms_norm": (1, 1, 1, rk.rms_norm, scaled),
    "rms_norm of x alone": (1, 0, 1, rk.rms_norm, scaled),
    "add_layer_norm": (2, 2, 2, rk.add_layer_norm, and_norm),
    "add_layer_norm of x alone": (2, 0, 2, rk.add_layer_norm, and_norm),
    "add_layer_norm with dropout": (
        *(2, 2, 2),
        lambda *t, **o: add_norm(*t, dropout_p=0.2, seed=1, **o),
        lambda *t: and_norm(*t, p=0.2),
    ),
    "masked_softmax": (
        *(1, 0, 0),
        lambda x, **o: rk.masked_softmax(x, rk.KeyLengths(torch.tensor([20])), **o),
        lambda x: x.masked_fill(torch.arange(COLUMNS) >= 20, -torch.inf).softmax(-1),
    ),
}
EVERY = pytest.mark.parametrize("name,backend", [(name, b) for name in ROWWISE for b in BACKENDS])


@DTYPES
@EVERY
def test_bytes_of_the_rest(name: str, backend: str, dtype: torch.dtype) -> None:
    like_x, parameters, statistics, ours, theirs = ROWWISE[name]
    leaves = [rand(ROWS, COLUMNS, seed=n, dtype=dtype) for n in range(like_x)]
    leaves += [rand(COLUMNS, seed=n, dtype=dtype) for n in range(parameters)]
    for leaf in leaves:
        leaf.requires_grad_()
    # statistics are float32 or wider, torch's of a half type's rows are of that type
    wider = statistics * ROWS * 2 if dtype == torch.bfloat16 else 0
    assert_no_more(ours, theirs, leaves, backend, wider)


@EVERY
def test_second_derivatives_keep_no_outputs(name: str, backend: str) -> None:
    """A gradient with a graph keeps what the first one did, the gradient that came, and no more."""
    like_x, parameters, _, ours, _ = ROWWISE[name]
    sizes = [(ROWS, COLUMNS)] * like_x + [(COLUMNS,)] * parameters
    leaves = [rand(*size).to(device_of(backend)).requires_grad_() for size in sizes]
    outputs = ours(*leaves, backend=backend)
    y = outputs if isinstance(outputs, Tensor) else outputs[0]
    came = torch.ones_like(y).requires_grad_()
    found = saved_bytes(lambda: torch.autograd.grad(y, leaves, came, create_graph=True))
    rows, columns = 4 * ROWS * COLUMNS, 4 * COLUMNS
    assert found <= 2 * rows + parameters * columns + 8


# what may be changed in place before the backward pass, by rowmax's functions and by torch's
def changed_y(backend: str) -> dict[str, tuple[Call, Call]]:
    return {
        "layer_norm": (
            lambda x, w, b: rk.layer_norm(x, w, b, backend=backend),
            lambda x, w, b: F.layer_norm(x, (COLUMNS,), w, b),
        ),
        "rms_norm": (
            lambda x, w, b: rk.rms_norm(x, w, backend=backend),
            lambda x, w, b: F.rms_norm(x, (COLUMNS,), w, 1e-6),
        ),
        "add_layer_norm": (
            lambda x, w, b: rk.add_layer_norm(x, x.sin(), w, b, backend=backend)[0],
            lambda x, w, b: and_norm(x, x.sin(), w, b),
        ),
    }


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "leaky relu": lambda y, p: F.leaky_relu(y, 0.2, inplace=True),
    "sum": lambda y, p: y.add_(p),
    "product": lambda y, p: y.mul_(p),
    "part": lambda y, p: y[1:].zero_(),
    "filled": lambda y, p: y.zero_(),
}


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_y_of_a_norm_may_be_changed_in_place(name: str, backend: str) -> None:
    ours, theirs = changed_y(backend)[name]
    device = device_of(backend)
    for step in STEPS.values():
        gradients = []
        for function in (ours, theirs):
            leaves = [rand(*size, seed=1).double() for size in ((ROWS, COLUMNS), (COLUMNS,))]
            leaves.append(leaves[1].cos())
            leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
            y = function(*leaves)
            step(y, rand(ROWS, COLUMNS, seed=2).double().to(device))
            found = torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)
            gradients.append([gradient for gradient in found if gradient is not None])
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_add_layer_norm_does_not_read(backend: str) -> None:
    """x and residual are not read again; the sum is, and a change of it is found."""
    x, residual = (rand(ROWS, COLUMNS, seed=n).to(device_of(backend)) for n in range(2))
    weight = rand(COLUMNS).to(device_of(backend)).requires_grad_()

    def gradient(change: Call) -> Tensor:
        kept = x.clone(), residual.clone()
        y, total = rk.add_layer_norm(*kept, weight, dropout_p=0.3, seed=2, backend=backend)
        change(*kept, total)
        return torch.autograd.grad(y.sin().sum(), weight)[0]

    def terms(x: Tensor, residual: Tensor, total: Tensor) -> None:
        x.zero_()
        residual.zero_()

    assert torch.equal(gradient(terms), gradient(lambda *_: None))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(lambda x, residual, total: total.add_(1.0))


READ: dict[str, Callable[[Tensor, str], tuple[Tensor, Tensor]]] = {
    "the x of layer_norm": lambda x, backend: (rk.layer_norm(x, backend=backend), x),
    "the x of rms_norm": lambda x, backend: (rk.rms_norm(x, backend=backend), x),
    "the weights of masked_softmax": lambda x, backend: (
        (rk.masked_softmax(x, backend=backend),) * 2
    ),
    "the out of attention": lambda x, backend: (
        (rk.attention(*(x.view(1, 1, ROWS, COLUMNS),) * 3, backend=backend),) * 2
    ),
    "the q of attention": lambda x, backend: (
        rk.attention(*(x.view(1, 1, ROWS, COLUMNS),) * 3, backend=backend),
        x,
    ),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_of_what_is_read_is_found(name: str, backend: str) -> None:
    """As with torch's own: its fused attention reads out too."""
    leaf = rand(ROWS, COLUMNS).to(device_of(backend)).requires_grad_()
    out, read = READ[name](leaf.sin(), backend)
    loss = out.sum()
    read.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_swapped_models_with_steps_in_place() -> None:
    torch.manual_seed(0)
    for norm in (nn.LayerNorm(16), nn.RMSNorm(16)):
        model = nn.Sequential(nn.Linear(3, 16), norm, nn.LeakyReLU(0.2, inplace=True))
        x = rand(5, 3)
        model(x).square().sum().backward()
        parameters = list(model.parameters())
        expected = [each.grad for each in parameters]
        model.zero_grad()
        rk.swap(model)
        model(x).square().sum().backward()
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)
