"""attention_varlen: each packed sequence is attention on that sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk

from .backends import device_of, dtype_name

QUERY_LENGTHS = [5, 0, 1, 17, 3, 0, 9]
KEY_LENGTHS = [5, 4, 8, 11, 0, 0, 30]
HEADS, KEY_HEADS, D, DV = 4, 2, 8, 6
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal_lower_right": {"mask": rk.Causal("lower_right")},
    "window": {"mask": rk.Window(3, 1, "upper_left") & rk.Causal(2)},
    "scale": {"scale": 0.2},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.3, "seed": 21, "mask": rk.Causal("upper_left")},
    "alibi": {"bias": rk.ALiBi(SLOPES, "lower_right")},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)},
}


def starts(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    total_q, total_k = sum(QUERY_LENGTHS), sum(KEY_LENGTHS)
    sizes = ((total_q, HEADS, D), (total_k, KEY_HEADS, D), (total_k, KEY_HEADS, DV))
    return [
        torch.randn(size, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for size in sizes
    ]


def padded(tensor: Tensor, lengths: list[int]) -> Tensor:
    """(total, H, D) -> (n, H, longest, D), zeros behind each sequence."""
    parts = tensor.split(lengths)
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).transpose(1, 2)


def unpadded(tensor: Tensor, lengths: list[int]) -> Tensor:
    """(n, H, longest, D) -> (total, H, D)."""
    return torch.cat(
        [row[:, :length].transpose(0, 1) for row, length in zip(tensor, lengths, strict=True)]
    )


def cast(options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    options = dict(options)
    if "bias" in options:
        options["bias"] = rk.ALiBi(SLOPES.to(device), options["bias"].align)
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().to(device, dtype).requires_grad_()
    return options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_for_itself(name: str, dtype: torch.dtype, backend: str) -> None:
    """Bitwise the same as one `attention` a sequence, gradients too."""
    device = device_of(backend)
    q, k, v = packed(dtype, device)
    options = cast(OPTIONS[name], device, dtype)
    cu_q, cu_k = starts(QUERY_LENGTHS).to(device), starts(KEY_LENGTHS).to(device)
    out, lse = rk.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, backend=backend, **options)
    assert out.shape == (sum(QUERY_LENGTHS), HEADS, DV)
    assert lse.shape == (HEADS, sum(QUERY_LENGTHS))
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    leaves = [q, k, v, *([options["sinks"]] if name == "sinks" else [])]
    weights = torch.linspace(-1, 1, out.numel(), device=device, dtype=dtype).view(out.shape)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    grads = torch.autograd.grad((out * weights).sum() + finite.sin().sum(), leaves)

    if name == "dropout":
        return  # each call counts its batch from 0; the padded form below covers it
    outs, lses = [], []
    for rows_q, rows_k, rows_v in zip(
        q.split(QUERY_LENGTHS), k.split(KEY_LENGTHS), v.split(KEY_LENGTHS), strict=True
    ):
        one_out, one_lse = rk.attention(
            *(rows.transpose(0, 1)[None] for rows in (rows_q, rows_k, rows_v)),
            return_lse=True,
            backend=backend,
            **options,
        )
        outs.append(one_out[0].transpose(0, 1))
        lses.append(one_lse[0])
    expected_out, expected_lse = torch.cat(outs), torch.cat(lses, 1)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    finite = expected_lse.masked_fill(expected_lse == -torch.inf, 0.0)
    loss = (expected_out * weights).sum() + finite.sin().sum()
    for got, expected in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_padded_form_gives_the_same(dropout_p: float, backend: str) -> None:
    """Sequence b is batch element b, for dropout as well; gradients included."""
    q, k, v = packed(torch.float64, device_of(backend))
    device = q.device
    cu_q, cu_k = starts(QUERY_LENGTHS).to(device), starts(KEY_LENGTHS, torch.int64).to(device)
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": 77, "backend": backend}
    out, lse = rk.attention_varlen(
        q, k, v, cu_q, cu_k, rk.Causal("upper_left"), return_lse=True, **options
    )
    lengths = [torch.tensor(lengths, device=device) for lengths in (QUERY_LENGTHS, KEY_LENGTHS)]
    mask = rk.Causal("upper_left") & rk.QueryLengths(lengths[0]) & rk.KeyLengths(lengths[1])
    heads = (padded(q, QUERY_LENGTHS), padded(k, KEY_LENGTHS), padded(v, KEY_LENGTHS))
    whole_out, whole_lse = rk.attention(*heads, mask=mask, return_lse=True, **options)
    expected = unpadded(whole_out, QUERY_LENGTHS)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    expected_lse = unpadded(whole_lse[..., None], QUERY_LENGTHS).squeeze(-1).T
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-13)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view(out.shape)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for gradient, other in zip(
        got, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_nothing_packed(lengths: list[int], backend: str) -> None:
    device = device_of(backend)
    q = torch.empty(0, HEADS, D, device=device, requires_grad=True)
    cu = starts(lengths).to(device)
    out, lse = rk.attention_varlen(q, q, q, cu, cu, return_lse=True, backend=backend)
    assert out.shape == (0, HEADS, D)
    assert lse.shape == (HEADS, 0)


def test_one_seed_is_drawn_for_all(backend: str) -> None:
    q, k, v = packed(torch.float32, device_of(backend))
    cu_q, cu_k = (starts(n).to(q.device) for n in (QUERY_LENGTHS, KEY_LENGTHS))
    results = []
    for seed in (None, None, 12):
        torch.manual_seed(12 if seed is None else 0)
        results.append(rk.attention_varlen(q, k, v, cu_q, cu_k, dropout_p=0.5, backend=backend))
    torch.manual_seed(12)
    drawn = int(torch.randint(2**63 - 1, (), device=q.device))
    given = rk.attention_varlen(q, k, v, cu_q, cu_k, dropout_p=0.5, seed=drawn, backend=backend)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], given)
    assert not torch.equal(results[0], results[2])


# --- bounds of the lengths, given by the caller ---------------------------------------------------


@pytest.mark.parametrize("bounds", [(17, 30), (20, 64), (1000, 1000)], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal_lower_right", "alibi"])
def test_bounds_change_nothing(name: str, bounds: tuple[int, int], backend: str) -> None:
    q, k, v = packed(torch.float64, device_of(backend))
    options = cast(OPTIONS[name], q.device, q.dtype)
    cu_q, cu_k = (starts(n).to(q.device) for n in (QUERY_LENGTHS, KEY_LENGTHS))
    expected = rk.attention_varlen(q, k, v, cu_q, cu_k, backend=backend, **options)
    given: dict[str, Any] = {"max_seqlen_q": bounds[0], "max_seqlen_k": bounds[1]}
    out = rk.attention_varlen(q, k, v, cu_q, cu_k, backend=backend, **options, **given)
    assert torch.equal(out, expected)
    weights = torch.linspace(-1, 1, out.numel(), device=q.device, dtype=q.dtype).view(out.shape)
    gradients = (torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in (out, expected))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_is_read_beside_bounds(name: str) -> None:
    """Tensors on "meta" have none: what a call asked of them would fail."""
    q, k, v = packed(torch.float32, torch.device("meta"))
    options = cast(OPTIONS[name], q.device, q.dtype)
    cu_q, cu_k = (starts(n).to("meta") for n in (QUERY_LENGTHS, KEY_LENGTHS))
    with pytest.raises(RuntimeError, match="meta"):
        rk.attention_varlen(q, k, v, cu_q, cu_k, **options)
    out = rk.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=17, max_seqlen_k=30, **options)
    assert out.shape == (sum(QUERY_LENGTHS), HEADS, DV)
    out.sum().backward()
    assert q.grad is not None


def test_an_alignment_is_named_where_lengths_are_not_read() -> None:
    q, k, v = packed(torch.float32, torch.device("meta"))
    cu_q, cu_k = (starts(n).to("meta") for n in (QUERY_LENGTHS, KEY_LENGTHS))
    bounds: dict[str, Any] = {"max_seqlen_q": 17, "max_seqlen_k": 30}
    with pytest.raises(ValueError, match="`align` is needed where lengths are not read"):
        rk.attention_varlen(q, k, v, cu_q, cu_k, rk.Causal(), **bounds)
    rk.attention_varlen(q, q, q, cu_q, cu_q, rk.Causal(), **bounds)


def compiled(mask: rk.Causal | None) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        lambda q, k, v, cu_q, cu_k, bound: rk.attention_varlen(
            q, k, v, cu_q, cu_k, mask, max_seqlen_q=bound, max_seqlen_k=30
        ),
        backend="aot_eager",
        fullgraph=True,
    )


@pytest.mark.parametrize("mask", [None, rk.Causal("lower_right")], ids=str)
def test_one_graph_beside_bounds(mask: rk.Causal | None) -> None:
    q, k, v = packed(torch.float64, torch.device("cpu"))
    cu_q, cu_k = starts(QUERY_LENGTHS), starts(KEY_LENGTHS)
    function = compiled(mask)
    expected = rk.attention_varlen(q, k, v, cu_q, cu_k, mask)
    torch.testing.assert_close(function(q, k, v, cu_q, cu_k, 17), expected, rtol=1e-12, atol=1e-13)
    for wrong in (cu_q.flip(0), cu_q + 1, cu_q - 1):
        with pytest.raises(RuntimeError, match="cu_seqlens_q"):
            function(q, k, v, wrong, cu_k, 17)
    with pytest.raises(RuntimeError, match="cu_seqlens_q"):
        function(q, k, v, cu_q, cu_k, 16)
