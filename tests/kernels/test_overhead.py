"""Calls past torch's dispatcher: when they are, that nothing is lost by it, and what they cost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rowmax.kernels as rk
from rowmax.kernels.ops import fast_path, operators

from ..tensors import left_by, rand
from .backends import BACKENDS, device_of, is_interpreted


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that calls went through torch's dispatcher for."""
    names: list[str] = []
    through_dispatcher = operators.through_dispatcher

    def spy(name: str, arguments: tuple[Any, ...]) -> Any:
        names.append(name)
        return through_dispatcher(name, arguments)

    monkeypatch.setattr(operators, "through_dispatcher", spy)
    return names


FUNCTIONS: dict[str, Callable[[Tensor, str], Any]] = {
    "attention": lambda x, backend: rk.attention(
        x,
        x.cos(),
        x.sin(),
        rk.Causal() & rk.KeyLengths(torch.tensor([3], device=x.device)),
        dropout_p=0.2,
        seed=1,
        backend=backend,
    ),
    "masked_softmax": lambda x, backend: rk.masked_softmax(x, rk.Causal(2), 0.5, backend=backend),
    "layer_norm": lambda x, backend: rk.layer_norm(x, x[0, 0, 0].cos(), backend=backend),
    "add_layer_norm": lambda x, backend: rk.add_layer_norm(
        x, x.sin(), x[0, 0, 0].cos(), dropout_p=0.2, seed=1, backend=backend
    )[0],
    "rms_norm": lambda x, backend: rk.rms_norm(x, x[0, 0, 0].cos(), backend=backend),
}
EVERY = pytest.mark.parametrize(
    "name,backend", [(name, backend) for name in FUNCTIONS for backend in BACKENDS]
)


def both_passes(name: str, backend: str) -> tuple[Tensor, Tensor]:
    x = rand(1, 2, 4, 6).to(device_of(backend)).requires_grad_()
    out = FUNCTIONS[name](x, backend)
    return out, torch.autograd.grad(out.sin().sum(), x)[0]


class EveryOperator(TorchDispatchMode):
    """A mode that changes nothing, and keeps every call in the dispatcher."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


@EVERY
def test_the_same_bits_both_ways(name: str, backend: str, dispatched: list[str]) -> None:
    at_once = both_passes(name, backend)
    assert not dispatched
    with EveryOperator():
        through = both_passes(name, backend)
    assert dispatched == [name, f"{name}_backward"]
    for one, other in zip(at_once, through, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
        assert one.requires_grad == other.requires_grad


class Marked(Tensor):
    """A subclass that changes nothing."""


class EveryFunction(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


WATCHED: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[Tensor], Tensor]]] = {
    "dispatch mode": (EveryOperator, lambda x: x),
    "function mode": (EveryFunction, lambda x: x),
    "profiler": (torch.profiler.profile, lambda x: x),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda x: x),
    "forward mode": (torch.autograd.forward_ad.dual_level, lambda x: x),
    "subclass": (nullcontext, lambda x: x.as_subclass(Marked)),
    "negated": (nullcontext, lambda x: torch._neg_view(-x)),
    "meta": (nullcontext, lambda x: x.to("meta")),
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("backend", ["auto", *{"native"}.intersection(BACKENDS)])
def test_what_the_dispatcher_serves_goes_through_it(
    backend: str, name: str, dispatched: list[str]
) -> None:
    context, made = WATCHED[name]
    q, k, v = (rand(1, 2, 4, 6, seed=seed) for seed in range(3))
    expected = rk.attention(q, k, v, backend=backend)
    assert not dispatched
    for at in range(3):
        tensors = [q, k, v]
        tensors[at] = made(tensors[at])
        if name == "meta":
            tensors = [tensor.to("meta") for tensor in tensors]
        with context():
            out = rk.attention(tensors[0], tensors[1], tensors[2], backend=backend)
        assert dispatched.pop() == "attention"
        assert not dispatched
        if name != "meta":
            torch.testing.assert_close(out.as_subclass(Tensor), expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated)")
def test_only_ordinary_tensors_go_past_it() -> None:
    x = rand(3, 4)
    with torch.inference_mode():
        inside = x.sin()
        assert fast_path.are_ordinary((inside, inside[1:], x.detach()))
    ordinary = [x, x.T, x.long(), x.bool(), x[:0], inside, x.clone().requires_grad_()]
    assert fast_path.are_ordinary((*ordinary, torch.nn.Parameter(x), None, 1.0, 2, True, "auto"))
    special = {
        "subclass": x.as_subclass(Marked),
        "zeros without memory": torch._efficientzerotensor((3, 4)),
        "a view of such zeros": torch._efficientzerotensor((3, 4))[1:],
        "negated": torch._neg_view(x),
        "conjugated": x.to(torch.complex64).conj(),
        "imaginary part": x.to(torch.complex64).conj().imag,
        "functional": torch._to_functional_tensor(x),
        "of grad": left_by(torch.func.grad, x),
        "of vmap": left_by(torch.func.vmap, x),
        "of functionalize": left_by(torch.func.functionalize, x),
        "sparse": x.to_sparse(),
        "sparse rows": x.to_sparse_csr(),
        "nested": torch.nested.nested_tensor([x, x[:2]]),
        "jagged": torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
        "quantized": torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        "meta": x.to("meta"),
        "fake": FakeTensorMode().from_tensor(x),
    }
    if torch.backends.mkldnn.is_available():
        special["mkldnn"] = x.float().to_mkldnn()
    for name, tensor in special.items():
        assert not fast_path.are_ordinary((x, tensor)), name


def test_the_keys_of_an_ordinary_tensor_on_a_gpu() -> None:
    """A fake one's are the same and those of a subclass, on a machine without a GPU too."""
    keys = torch._C._dispatch_keys
    with FakeTensorMode() as mode:
        on_gpu = keys(torch.empty(2, device="cuda")).raw_repr()
    of_fakes = keys(mode.from_tensor(rand(2))).raw_repr() & ~keys(rand(2)).raw_repr()
    assert on_gpu & ~of_fakes in fast_path._ORDINARY


def test_what_the_dispatcher_serves_in_a_mask_goes_through_it(dispatched: list[str]) -> None:
    q = rand(2, 2, 4, 6)
    lengths = torch.tensor([2, 3])
    expected = rk.attention(q, q, q, rk.KeyLengths(lengths))
    assert not dispatched
    assert torch.equal(rk.attention(q, q, q, rk.KeyLengths(lengths.as_subclass(Marked))), expected)
    assert dispatched == ["attention"]


def test_what_a_transform_left_behind(dispatched: list[str]) -> None:
    """A pullback called after `torch.func.vjp` has ended holds wrappers of the tensors it saved."""
    q = rand(1, 2, 4, 6)
    pullback: Any = torch.func.vjp(lambda q: rk.attention(q, q, q), q)[1]
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rk.attention(leaf, leaf, leaf).sum(), leaf)
    (gradient,) = pullback(torch.ones_like(q))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_the_profiler_shows_the_operators() -> None:
    q = rand(1, 2, 4, 6).requires_grad_()
    with torch.profiler.profile() as profile:
        rk.attention(q, q, q).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"rowmax::attention", "rowmax::attention_backward"} <= names


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit:DeprecationWarning")
def test_traced_calls_are_recorded() -> None:
    q = rand(1, 2, 4, 6)
    traced = torch.jit.trace(lambda q: rk.attention(q, q, q, backend="reference"), (q,))
    other = rand(1, 2, 4, 6, seed=5)
    assert torch.equal(traced(other), rk.attention(other, other, other, backend="reference"))


def test_saved_tensors_are_autograds_own() -> None:
    """Hooks see them, changes in place are found, and they are freed after the backward pass."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    q, k, v = (rand(2, 2, 4, 6, seed=seed).requires_grad_() for seed in range(3))
    lengths = torch.tensor([2, 3])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = rk.attention(q, k, v, rk.KeyLengths(lengths))
    assert any(tensor.dtype == torch.int64 and torch.equal(tensor, lengths) for tensor in packed)
    assert sum(torch.equal(tensor, q) for tensor in packed if tensor.shape == q.shape) == 1
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    out = rk.attention(q, k, v, rk.KeyLengths(lengths))
    lengths.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not is_interpreted(name)])
def test_a_small_call_takes_few_steps(backend: str) -> None:
    """A measure of a call's own cost that is the same on every machine: the functions it calls.

    Each costs 0.05 to 0.1 us and more; the dispatcher's way, with its modes, takes 30 of them more.
    """
    if backend == "reference":
        pytest.skip("the unfused path is many operations of torch")
    q, k, v = (rand(1, 1, 4, 8, seed=seed).float().to(device_of(backend)) for seed in range(3))
    counted: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            counted.append(getattr(argument, "__name__", frame.f_code.co_name))

    with torch.no_grad():
        rk.attention(q, k, v, backend="auto")
        sys.setprofile(count)
        try:
            rk.attention(q, k, v, backend="auto")
        finally:
            sys.setprofile(None)
    assert len(counted) <= 160, counted


@pytest.mark.skipif("numba" not in BACKENDS, reason="Numba does not work here")
def test_a_workspace_in_use_is_not_taken_again() -> None:
    """A signal's handler or a finalizer may call a kernel while the same thread prepares one."""
    from rowmax.kernels.backends.cpu_numba import threads

    first = threads.take_workspace()
    second = threads.take_workspace()
    assert second is not first
    assert first.header_address % 64 == first.scratch(1000) % 64 == 0
    kept = first.scratch(1000)
    assert first.scratch(10) == kept
    threads.give_back(first)
    assert threads.take_workspace() is first
    threads.give_back(first)

    others: list[threads.Workspace] = []
    thread = threading.Thread(target=lambda: others.append(threads.take_workspace()))
    thread.start()
    thread.join()
    assert others[0] is not first
