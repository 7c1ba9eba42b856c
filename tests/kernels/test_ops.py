"""The operators as torch sees them: opcheck, gradcheck, autocast, and modes without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk
from rowmax.kernels.api.attention import attention_problem
from rowmax.kernels.api.masks import structure_of
from rowmax.kernels.backends.reference import naive_attention
from rowmax.kernels.ops.problem import SoftmaxProblem

from .backends import BACKENDS, device_of, is_interpreted
from .cases import BY_NAME, lengths

Sample = Callable[[torch.device], tuple[Any, ...]]


def rand(device: torch.device, *size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(len(size))
    return torch.randn(size, generator=generator, dtype=dtype).to(device)


def attention_sample(name: str) -> Sample:
    def make(device: torch.device) -> tuple[Any, ...]:
        arguments = BY_NAME[name].build(torch.float64, device)
        leaves = {key: value.requires_grad_() for key, value in arguments.differentiable().items()}
        fields: dict[str, Any] = dict.fromkeys(("scale", "softcap", "seed"))
        fields |= {"dropout_p": 0.0, "bias": leaves.get("bias", arguments.bias)}
        fields |= {"sinks": leaves.get("sinks"), "mask": arguments.mask, **arguments.options}
        return attention_problem(
            leaves["q"], leaves["k"], leaves["v"], draw_seed=True, **fields
        ).flat()

    return make


def softmax_sample(device: torch.device) -> tuple[Any, ...]:
    scores = rand(device, 2, 3, 7, 9).requires_grad_()
    mask = rk.Causal(2) & rk.KeyLengths(lengths(9, 0).to(device))
    return SoftmaxProblem(scores, structure_of(mask, (2, 3, 7, 9), scores), 0.5).flat()


def norm_sample(*kinds: str, p: float | None = None) -> Sample:
    def make(device: torch.device) -> tuple[Any, ...]:
        tensors = {
            "rows": lambda: rand(device, 3, 5, 12).requires_grad_(),
            "columns": lambda: rand(device, 12).requires_grad_(),
            "none": lambda: None,
        }
        dropout = () if p is None else (p, torch.tensor(3) if p > 0 else None)
        return (*(tensors[kind]() for kind in kinds), 1e-5, *dropout)

    return make


# op -> samples of its arguments, all but the backend
SAMPLES: list[tuple[str, str, Sample]] = [
    *(
        ("attention", name, attention_sample(name))
        for name in (
            "joined_causal_both_lengths",
            "bias_1H1K",
            "layout_heads_last",
            "dropout_half",
            "window_2_None_wide",
            "everything",
            "shape_no_keys",
        )
    ),
    ("masked_softmax", "masked", softmax_sample),
    ("layer_norm", "both", norm_sample("rows", "columns", "columns")),
    ("layer_norm", "none", norm_sample("rows", "none", "none")),
    ("rms_norm", "weight", norm_sample("rows", "columns")),
    ("rms_norm", "none", norm_sample("rows", "none")),
    ("add_layer_norm", "dropout", norm_sample("rows", "rows", "columns", "columns", p=0.5)),
    ("add_layer_norm", "plain", norm_sample("rows", "rows", "none", "columns", p=0.0)),
]
WITH_BACKENDS = [
    pytest.param(op, sample, backend, id=f"{op}-{name}-{backend}")
    for op, name, sample in SAMPLES
    for backend in BACKENDS
]


@pytest.mark.parametrize("op,sample,backend", WITH_BACKENDS)
def test_opcheck(op: str, sample: Sample, backend: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch agree with what the op does."""
    operator = getattr(torch.ops.rowmax, op).default
    arguments = (*sample(device_of(backend)), backend)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("op,sample,backend", WITH_BACKENDS)
def test_opcheck_backward(op: str, sample: Sample, backend: str) -> None:
    operator = getattr(torch.ops.rowmax, op).default
    flat = (*sample(device_of(backend)), backend)
    flat = tuple(value.detach() if isinstance(value, Tensor) else value for value in flat)
    outputs = operator(*flat)
    if op == "attention":
        out, lse = outputs
        grads = (torch.ones_like(out), torch.ones_like(lse), out, lse)
        arguments = (*grads, flat[3] is not None, flat[6] is not None, *flat)
    elif op == "masked_softmax":
        arguments = (torch.ones_like(outputs), outputs, *flat[-2:])
    elif op == "add_layer_norm":
        y, total, mean, rstd = outputs
        arguments = (torch.ones_like(y), torch.ones_like(total), total, mean, rstd, *flat[2:])
    else:
        arguments = (torch.ones_like(outputs[0]), *outputs[1:], *flat)
    backward = getattr(torch.ops.rowmax, f"{op}_backward").default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(backward, arguments, test_utils=tests)


@pytest.mark.parametrize(
    "name",
    ["joined_causal_keys", "bias_BH1K", "dropout_half", "window_3_0_short", "everything", "alibi"],
)
def test_gradcheck_of_attention(name: str, backend: str) -> None:
    case = BY_NAME[name]
    arguments = case.build(torch.float64, device_of(backend))
    arguments = type(arguments)(
        arguments.q[:1, :, :5, :3],
        arguments.k[:1, :, :7, :3],
        arguments.v[:1, :, :7, :4],
        bias=arguments.bias[:1, :, :5, :7] if isinstance(arguments.bias, Tensor) else None,
        sinks=arguments.sinks,
        mask=rk.Window(4, 1, "lower_right") & rk.KeyLengths(lengths(6).to(arguments.q.device)),
        options=arguments.options,
    )
    leaves = {
        key: value.clone().requires_grad_() for key, value in arguments.differentiable().items()
    }

    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named: dict[str, Any] = dict(zip(leaves, tensors, strict=True))
        q, k, v = (named.pop(key) for key in "qkv")
        return rk.attention(
            q, k, v, arguments.mask, return_lse=True, backend=backend, **named, **arguments.options
        )

    # the fast mode checks the Jacobian along random directions
    fast = is_interpreted(backend)
    assert torch.autograd.gradcheck(forward, tuple(leaves.values()), fast_mode=fast)


REST = ("layer_norm", "rms_norm", "add_layer_norm", "masked_softmax")


@pytest.mark.parametrize("name,backend", [(name, b) for name in REST for b in BACKENDS])
def test_gradcheck_of_the_rest(name: str, backend: str) -> None:
    device = device_of(backend)
    x, weight = (rand(device, *size).requires_grad_() for size in ((3, 2, 7), (7,)))
    other = rand(device, 2, 3, 7, 1).squeeze(-1).transpose(0, 1).requires_grad_()
    bias = (weight.detach() + 1).requires_grad_()
    mask = (rand(device, 2, 7) > -0.5).index_fill(0, torch.tensor(1, device=device), False)
    calls: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "layer_norm": (lambda *t: rk.layer_norm(*t, backend=backend), (x, weight, bias)),
        "rms_norm": (lambda *t: rk.rms_norm(*t, backend=backend), (x, weight)),
        "add_layer_norm": (
            lambda x, other, weight, bias: rk.add_layer_norm(
                x, other, weight, bias, dropout_p=0.3, seed=2, backend=backend
            ),
            (x, other, weight, bias),
        ),
        "masked_softmax": (lambda t: rk.masked_softmax(t, mask, scale=0.7, backend=backend), (x,)),
    }
    function, tensors = calls[name]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=is_interpreted(backend))


def test_only_wanted_gradients(backend: str) -> None:
    """Each input alone may require a gradient; lse alone may receive one; none is fine too."""
    device = device_of(backend)
    sizes = {"q": (2, 4, 5, 8), "k": (2, 2, 9, 8), "v": (2, 2, 9, 6), "bias": (4, 1, 9)}
    tensors: dict[str, Any] = {name: rand(device, *size) for name, size in sizes.items()}
    everything: dict[str, Any] = {
        name: tensor.clone().requires_grad_() for name, tensor in tensors.items()
    }
    out, lse = rk.attention(**everything, return_lse=True, backend=backend)
    expected = torch.autograd.grad(out.sum() + lse.sum(), tuple(everything.values()))
    for name, gradient in zip(tensors, expected, strict=True):
        mixed = tensors | {name: tensors[name].clone().requires_grad_()}
        out, lse = rk.attention(**mixed, return_lse=True, backend=backend)
        (out.sum() + lse.sum()).backward()
        torch.testing.assert_close(mixed[name].grad, gradient, rtol=1e-12, atol=1e-12)
    _, lse = rk.attention(**everything, return_lse=True, backend=backend)
    d_v = torch.autograd.grad(lse.sum(), everything["v"], allow_unused=True)[0]
    assert d_v is None or (d_v == 0).all()
    assert not rk.attention(**tensors, backend=backend).requires_grad


def test_modes_without_gradients(backend: str) -> None:
    device = device_of(backend)
    q = rand(device, 1, 2, 5, 8).requires_grad_()
    expected = rk.attention(q, q, q, rk.Causal(), backend=backend).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = rk.attention(q, q, q, rk.Causal(), backend=backend)
        assert not out.requires_grad
        assert torch.equal(out, expected)
    with torch.inference_mode():
        inside = rand(device, 1, 2, 5, 8)
        assert torch.equal(
            rk.attention(inside, inside, inside, rk.Causal(), backend=backend), expected
        )


def test_meta_tensors() -> None:
    """Shapes and dtypes without data, as for a model built on the meta device."""
    q = torch.zeros(2, 4, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out, lse = rk.attention(q, q[:, :2], q[:, :2, :, :3], rk.Causal(), return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 4, 5, 3), torch.bfloat16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
    out.sum().backward()
    assert q.grad is not None
    y, total = rk.add_layer_norm(q, q, dropout_p=0.1)
    assert y.shape == total.shape == q.shape


FUNCTIONS: dict[str, Callable[[Tensor, str], Any]] = {
    "attention": lambda x, backend: rk.attention(x, x, x, backend=backend),
    "masked_softmax": lambda x, backend: rk.masked_softmax(x, backend=backend),
    "layer_norm": lambda x, backend: rk.layer_norm(x, backend=backend),
    "add_layer_norm": lambda x, backend: rk.add_layer_norm(x, x, backend=backend)[0],
    "rms_norm": lambda x, backend: rk.rms_norm(x, backend=backend),
}
EVERY_FUNCTION = pytest.mark.parametrize(
    "name,backend", [(name, backend) for name in FUNCTIONS for backend in BACKENDS]
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_under_autocast(dtype: torch.dtype, backend: str) -> None:
    """As with torch's own attention: half inside, whatever the mixture given; float64 stays."""
    device = device_of(backend)
    q, k, v = (rand(device, 1, 2, 7, 8, dtype=torch.float32).requires_grad_() for _ in "qkv")
    rows = q.detach()[0].transpose(0, 1)
    with torch.autocast(device.type, dtype):
        out = rk.attention(q, k.to(dtype), v, rk.Causal(), backend=backend)
        wide = rk.attention(q.double(), k.double(), v.double(), rk.Causal(), backend=backend)
        cu = torch.tensor([0, 3, 7], device=device)
        packed = rk.attention_varlen(rows, rows, rows, cu, cu, backend=backend)
        out.sum().backward()
    assert out.dtype == packed.dtype == dtype
    assert wide.dtype == torch.float64
    assert torch.equal(
        out, rk.attention(q.to(dtype), k.to(dtype), v.to(dtype), rk.Causal(), backend=backend)
    )
    torch.testing.assert_close(out.double(), wide, rtol=0.02, atol=0.02)
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@EVERY_FUNCTION
def test_autocast_does_not_reach_into_a_backend(name: str, backend: str) -> None:
    """Outside the casts that are announced, the same bits with autocast and without."""
    dtype = torch.float64 if name == "attention" else torch.float32
    x = rand(device_of(backend), 1, 2, 8, 16, dtype=dtype).requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        out = FUNCTIONS[name](x, backend)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    expected = both()
    with torch.autocast(x.device.type, torch.bfloat16):
        got = both()
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_add_layer_norm_takes_the_wider_dtype_under_autocast(backend: str) -> None:
    x = rand(device_of(backend), 3, 8, dtype=torch.float32)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, total = rk.add_layer_norm(x.bfloat16(), x, backend=backend)
    assert y.dtype == total.dtype == torch.float32
    assert torch.equal(total, x + x.bfloat16().float())


def test_the_oracle_can_be_differentiated_twice() -> None:
    """The formulas of the backward passes have their own tests; this holds the oracle to them."""
    arguments = BY_NAME["shape_dv_less"].build(torch.float64)
    q, k, v = (
        t[:1, :1, :3, :2].clone().requires_grad_() for t in (arguments.q, arguments.k, arguments.v)
    )
    arguments = type(arguments)(q, k, v)
    assert torch.autograd.gradgradcheck(
        lambda *t: naive_attention(type(arguments)(*t).naive_problem()).out, (q, k, v)
    )
