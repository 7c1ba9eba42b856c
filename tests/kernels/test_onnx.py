"""The operators as ONNX's own, by both of torch's exporters, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk

from .onnx_files import EXPORTS, Call, export, operators, run
from .support import AttentionCase, assert_parity

EVERY_EXPORT = pytest.mark.parametrize("how", EXPORTS)


def heads(length: int, key_heads: int) -> tuple[Tensor, ...]:
    """q, k, v, lengths (one of them 0), ids, a bias, sinks."""
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(2, 4, length, 8, generator=generator),
        *torch.randn(2, 2, key_heads, length, 8, generator=generator).unbind(0),
        torch.tensor([0, length - 1]),
        torch.randint(3, (2, length), generator=generator).sort(1).values,
        torch.randn(4, 1, length, generator=generator),
        torch.randn(4, generator=generator),
    )


# name -> mask, bias, sinks and options from lengths, ids, a bias and sinks
Features = tuple[rk.Mask | Tensor | None, Any, Tensor | None, dict[str, Any]]
CASES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Features]] = {
    "plain": lambda n, ids, bias, sinks: (None, None, None, {"scale": 0.3}),
    "causal": lambda n, ids, bias, sinks: (rk.Causal(), None, None, {}),
    "lengths": lambda n, ids, bias, sinks: (rk.KeyLengths(n) & rk.Window(2, 1), None, None, {}),
    "dense": lambda n, ids, bias, sinks: (ids[:, None, None] > 0, None, None, {}),
    "documents": lambda n, ids, bias, sinks: (rk.Documents(ids), None, sinks, {"softcap": 3.0}),
    "bias": lambda n, ids, bias, sinks: (rk.Causal(1), bias, None, {}),
    "alibi": lambda n, ids, bias, sinks: (None, rk.ALiBi(sinks.abs()), None, {}),
}


@pytest.mark.parametrize(
    "how,key_heads", [("traced", 4), ("traced", 2), ("exported", 4), ("opset_23", 2)]
)
def test_attention(how: str, key_heads: int, tmp_path: Path) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for case in CASES.values():
            mask, bias, sinks, options = case(*features)
            outputs += rk.attention(q, k, v, mask, bias, sinks=sinks, return_lse=True, **options)
        return tuple(outputs)

    qkv: tuple[dict[int, str], ...] = ({0: "B", 2: "L"},) * 3
    dynamic = (*qkv, {0: "B"}, {0: "B", 1: "L"}, {2: "L"}, None)
    path = export(Call(attend), heads(5, key_heads), dynamic, how, tmp_path)
    # with a mask other than a causal one ONNX's operator does not say what an empty row gives
    assert operators(path).count("Attention") == (2 if how == "opset_23" else 0)
    for length in (5, 9):
        given = heads(length, key_heads)
        outputs = iter(run(path, given))
        for case in CASES.values():
            mask, bias, sinks, options = case(*given[3:])
            q, k, v = given[:3]
            arguments = AttentionCase(q, k, v, mask, bias, sinks, options)
            assert_parity({"out": next(outputs), "lse": next(outputs)}, arguments)


def rows(length: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 8, generator=generator)
    weight, bias = torch.randn(2, 8, generator=generator)
    return x, weight, bias, torch.tensor([0, length - 1])


def norms(x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    mask = rk.KeyLengths(lengths) & rk.Causal(1)
    return (
        rk.layer_norm(x, weight, bias),
        rk.layer_norm(x, eps=1e-3),
        *rk.add_layer_norm(x, x.cos(), weight, bias),
        rk.rms_norm(x, weight),
        rk.rms_norm(x),
        rk.masked_softmax(x @ x.transpose(1, 2), mask, 0.5),
    )


@EVERY_EXPORT
def test_norms_and_softmax(how: str, tmp_path: Path) -> None:
    path = export(Call(norms), rows(5), ({1: "L"}, None, None, None), how, tmp_path)
    found = operators(path)
    assert found.count("LayerNormalization") == 3
    assert found.count("RMSNormalization") == (2 if how == "opset_23" else 0)
    assert found.count("Softmax") == 1
    for length in (5, 9):
        given = rows(length)
        exact = norms(*(x.double() if x.is_floating_point() else x for x in given))
        for got, expected in zip(run(path, given), exact, strict=True):
            limit = 16 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (got - expected).abs().max() <= limit


@EVERY_EXPORT
def test_dropout_is_refused(how: str, tmp_path: Path) -> None:
    call = Call(lambda q: rk.attention(q, q, q, dropout_p=0.1))
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(Exception, match=r"attention: `dropout_p`: expected 0 while torch\.onnx"):
        export(call, (q,), (None,), how, tmp_path)


def test_a_program_that_was_exported_before(tmp_path: Path) -> None:
    """torch.export keeps the operators whole; torch.onnx takes them apart later."""
    call = Call(lambda q, n: rk.attention(q, q, q, rk.KeyLengths(n)))
    q, n = torch.randn(2, 4, 5, 8), torch.tensor([5, 2])
    program = torch.export.export(call, (q, n))
    assert "rowmax.attention" in str(program.graph)
    path = tmp_path / "program.onnx"
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    assert "Softmax" in operators(path)
    torch.testing.assert_close(run(path, (q, n))[0], call(q, n))
