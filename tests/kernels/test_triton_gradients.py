"""The hand-written derivatives of the Triton kernels against differences, feature by feature.

In float64 and along random directions, which is what `fast_mode` compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk
from rowmax.kernels.backends import dispatch
from rowmax.kernels.ops import operators
from rowmax.kernels.ops.problem import AttentionProblem, BackwardInputs

from .backends import device_of

if dispatch.unavailable("triton") is not None:
    pytest.skip(str(dispatch.unavailable("triton")), allow_module_level=True)

from rowmax.kernels.backends.gpu_triton import attention_decode, attention_launch

DEVICE = device_of("triton")
B, H, QUERIES, KEYS, D, DV = 2, 4, 5, 7, 3, 4


def draw(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


COIN = torch.rand(B, H, QUERIES, KEYS, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.6
MASKS: dict[str, rk.Mask] = {
    "causal": rk.Causal("lower_right"),
    "window": rk.Window(2, 1, lengths(0, 3)),
    "lengths": rk.KeyLengths(lengths(6, 0)) & rk.QueryLengths(lengths(5, 3)),
    "dense": rk.Dense(COIN),
    "documents": rk.Documents(
        torch.arange(QUERIES, device=DEVICE).expand(B, -1) // 2,
        torch.arange(KEYS, device=DEVICE).expand(B, -1) // 3,
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    **{name: {"mask": mask} for name, mask in MASKS.items()},
    "softcap": {"softcap": 0.8},
    "alibi": {"bias": rk.ALiBi(torch.tensor([0.5, 0.25, 0.1, 0.0], device=DEVICE), 2)},
    "dropout": {"dropout_p": 0.3, "seed": 4},
    "scale": {"scale": -1.3, "mask": rk.Causal(1)},
}
BIASES = {"full": (B, H, QUERIES, KEYS), "heads": (1, H, 1, 1), "keys": (1, 1, 1, KEYS)}


def check(call: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> None:
    """lse stands for its finite values: those of rows that attend nothing are constants."""

    def finite(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call(*tensors)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(finite, tensors, fast_mode=True)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return draw(B, H, QUERIES, D), draw(B, 2, KEYS, D), draw(B, 2, KEYS, DV)


@pytest.mark.parametrize("name", OPTIONS)
def test_features(name: str) -> None:
    options = {"return_lse": True, "backend": "triton", **OPTIONS[name]}
    check(lambda q, k, v: rk.attention(q, k, v, **options), *inputs())


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("features", ["base", "score_mod"])
def test_biases_and_sinks(shape: str, features: str) -> None:
    options: dict[str, Any] = {"return_lse": True, "backend": "triton"}
    if features == "score_mod":
        options |= {"mask": rk.Causal(1) & rk.KeyLengths(lengths(6, 0)), "softcap": 1.5}
        options |= {"dropout_p": 0.2, "seed": 1}

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return rk.attention(q, k, v, bias=bias, sinks=sinks, **options)

    check(call, *inputs(), draw(*BIASES[shape]), draw(H))


STARTS = torch.tensor([0, 4, 4, 5]), torch.tensor([0, 3, 5, 7])
PACKED: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": OPTIONS["causal"],
    "dropout": OPTIONS["dropout"],
}
PACKED["alibi"] = {
    "bias": rk.ALiBi(torch.tensor([0.5, 0.25, 0.1, 0.0], device=DEVICE), "upper_left")
}


def packed_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return draw(QUERIES, H, D), draw(KEYS, 2, D), draw(KEYS, 2, DV)


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str) -> None:
    starts_q, starts_k = (tensor.to(DEVICE) for tensor in STARTS)
    options: dict[str, Any] = {"return_lse": True, "backend": "triton", **PACKED[name]}

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return rk.attention_varlen(q, k, v, starts_q, starts_k, sinks=sinks, **options)

    check(call, *packed_inputs(), draw(H))


@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_opcheck_of_packed_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators on a packed problem, as `attention_varlen` hands it to them."""
    seen: list[AttentionProblem] = []
    whole = operators.attention

    def noting(problem: AttentionProblem, *options: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(problem)
        return whole(problem, *options)

    monkeypatch.setattr(operators, "attention", noting)
    q, k, v = packed_inputs()
    starts_q, starts_k = (tensor.to(DEVICE) for tensor in STARTS)
    options: dict[str, Any] = {"sinks": draw(H), "backend": "triton", **PACKED[name]}
    rk.attention_varlen(q, k, v, starts_q, starts_k, **options)
    flat = (*seen[0].flat(), "triton")
    torch.library.opcheck(torch.ops.rowmax.attention.default, flat)
    flat = tuple(value.detach() if isinstance(value, Tensor) else value for value in flat)
    out, lse = torch.ops.rowmax.attention.default(*flat)
    arguments = (torch.ones_like(out), None, out, lse, False, True, *flat)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    backward = torch.ops.rowmax.attention_backward.default
    torch.library.opcheck(backward, arguments, test_utils=tests)


def test_bounds_too_small_touch_no_other_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is checked on the device: rows in reach are right, as are sequences within bounds."""
    seen: list[AttentionProblem] = []

    def noting(problem: AttentionProblem, *options: Any) -> tuple[Tensor, Tensor]:
        seen.append(problem)
        return problem.query, problem.key

    monkeypatch.setattr(operators, "attention", noting)
    lengths_q, lengths_k = [3, 70, 5], [30, 90, 2]
    starts_q, starts_k = (
        torch.tensor([0, *n], device=DEVICE).cumsum(0) for n in (lengths_q, lengths_k)
    )
    q, k, v = draw(sum(lengths_q), H, D), draw(sum(lengths_k), 2, D), draw(sum(lengths_k), 2, DV)
    rk.attention_varlen(q, k, v, starts_q, starts_k, backend="triton")
    query, key, value = (tensor.detach() for tensor in seen[0][:3])
    problem = seen[0]._replace(query=query, key=key, value=value)
    grad_out = torch.ones(1, H, sum(lengths_q), DV, device=DEVICE, dtype=q.dtype)
    bounded = problem._replace(longest_query=33, longest_key=33)
    results = []
    for one in (problem, bounded):
        out, lse = attention_launch.attention(one)
        gradients = attention_launch.attention_backward(
            one, BackwardInputs(grad_out, None, out, lse)
        )
        results.append((out, *gradients[:3]))
    reached = int(starts_q[1]) + 33
    assert torch.equal(results[1][0][:, :, :reached], results[0][0][:, :, :reached])
    for (got, wanted), ends in zip(
        zip(*results, strict=True), (starts_q, starts_q, starts_k, starts_k), strict=True
    ):
        for part in (slice(0, int(ends[1])), slice(int(ends[2]), None)):
            torch.testing.assert_close(got[:, :, part], wanted[:, :, part], rtol=0, atol=0)


def test_split_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass after a forward pass in chunks, of 32 keys here."""
    for module in (attention_decode, attention_launch):
        monkeypatch.setattr(module, "CHUNK", 32)
    monkeypatch.setattr(attention_launch, "forward", None)
    mask = rk.Causal(lengths(60, 20))
    tensors = draw(B, H, 2, D), draw(B, 2, 64, D), draw(B, 2, 64, DV), draw(H)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return rk.attention(q, k, v, mask, sinks=sinks, return_lse=True, backend="triton")

    check(call, *tensors)
