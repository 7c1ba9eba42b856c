"""Swapped modules in graphs: traced, scripted, compiled, exported, as ONNX, ahead of time.

A graph is recorded with one batch and then given others: of other lengths, with less padding, with
none, with padding at the front.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rowmax.kernels import scaled_dot_product_attention, swap

from ..kernels.onnx_files import Call, export, run
from ..kernels.support import traced
from .support import assert_same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH = 16
Batch = tuple[Tensor, Tensor]


def batch(lengths: list[int], at_front: bool = False) -> Batch:
    """Tokens and where the padding is; the longest sequence has none."""
    generator = torch.Generator().manual_seed(sum(lengths))
    longest = max(lengths)
    tokens = torch.randn(len(lengths), longest, WIDTH, generator=generator, dtype=torch.float64)
    padding = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
    return tokens, padding.flip(1) if at_front else padding


RECORDED = batch([7, 3])
OTHERS = [
    RECORDED,
    batch([7, 6]),
    batch([7, 7]),
    batch([5, 9, 2]),
    batch([4, 7], at_front=True),
]


def layers(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        *(WIDTH, 2, 32), batch_first=True, dtype=torch.float64, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH, dtype=torch.float64))


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64, **options)


def causal(tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "attention": (
        attention,
        lambda m, x, p: m(x, x, x, key_padding_mask=p, need_weights=False)[0],
    ),
    "weights": (attention, lambda m, x, p: m(x, x, x, key_padding_mask=p)),
    "own_keys": (
        lambda: attention(add_bias_kv=True, add_zero_attn=True),
        lambda m, x, p: m(x, x, x, key_padding_mask=p, average_attn_weights=False),
    ),
    "additive": (
        attention,
        lambda m, x, p: m(
            *(x, x, x),
            key_padding_mask=torch.zeros_like(p, dtype=x.dtype).masked_fill(p, -torch.inf),
        ),
    ),
    "layer": (lambda: layers().layers[0], lambda m, x, p: m(x, src_key_padding_mask=p)),
    "norm_first": (
        lambda: layers(norm_first=True).layers[0],
        lambda m, x, p: m(x, src_mask=causal(x)),
    ),
    "encoder": (layers, lambda m, x, p: m(x, src_key_padding_mask=p)),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True, dtype=torch.float64),
        lambda m, x, p: m(x[:, 1:], x, tgt_mask=causal(x[:, 1:]), memory_key_padding_mask=p),
    ),
}


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The original and the swapped module, each a call of tokens and padding."""
    torch.manual_seed(0)
    make, call = MODULES[name]
    original = make().eval()
    copied = copy.deepcopy(original)
    swap(copied, **options)
    return Call(call, original), Call(call, copied)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("name", MODULES)
def test_traced(name: str, gradients: bool) -> None:
    original, module = pair(name)
    with torch.set_grad_enabled(gradients):
        graph = traced(module, *RECORDED)
    for given in OTHERS:
        with torch.no_grad():  # as the trace was checked: with zeros where padding is
            torch.testing.assert_close(graph(*given), original(*given))
        if not gradients or name == "encoder":
            continue
        found = []
        for call in (graph, original):
            tokens = given[0].clone().requires_grad_()
            outputs = call(tokens, given[1])
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            found.append(torch.autograd.grad(outputs.square().sum(), tokens)[0])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("mask", ["none", "hint", "triangle"])
def test_a_packed_encoder_traced(mask: str) -> None:
    """Zeros where padding is, as the packed encoder has by itself."""

    def call(encoder: nn.Module, tokens: Tensor, padding: Tensor) -> Tensor:
        given = None if mask == "none" else causal(tokens)
        hint = True if mask == "hint" else None
        return encoder(tokens, mask=given, src_key_padding_mask=padding, is_causal=hint)

    encoder = layers().eval()
    swap(encoder, pack=True)
    graph = traced(Call(call, encoder), *RECORDED)
    for given in OTHERS[:4]:
        torch.testing.assert_close(graph(*given), call(encoder, *given))


def test_a_decoder_traced_with_a_causal_mask() -> None:
    """torch's decoder looks at its mask and hands on a hint that holds for that mask alone."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2).eval()
    tokens, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    triangle = torch.ones(5, 5, dtype=torch.bool).triu(1)
    other = triangle.clone()
    other[3, 1] = True
    with torch.no_grad():
        expected = decoder(tokens, memory, other)
        swap(decoder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its look
            graph = torch.jit.trace(decoder, (tokens, memory, triangle))
        torch.testing.assert_close(graph(tokens, memory, other), expected)


SDPA: dict[str, Callable[..., Tensor]] = {
    "padding": lambda call, q, p: call(q, q, q, ~p[:, None, None]),
    "causal": lambda call, q, p: call(q, q[:, :, 1:], q[:, :, 1:], is_causal=True),
    "pairs": lambda call, q, p: call(q, q, q, ~p[0].unsqueeze(0) & ~p[0].unsqueeze(1).triu(1)),
    "bias": lambda call, q, p: call(q, q, q, q.mean((0, 1, 3)).expand(q.shape[2], -1)),
    "few_dimensions": lambda call, q, p: call(q[0, 0], q[0, 0], q[0, 0]),
    "broadcast": lambda call, q, p: call(
        q[:, None], q[:1, None], q[:, None], ~p[:, None, None, None]
    ),
}


@pytest.mark.parametrize("name", SDPA)
def test_the_drop_in_traced(name: str) -> None:
    def of(call: Callable[..., Tensor]) -> nn.Module:
        return Call(lambda x, p: SDPA[name](call, x.unflatten(-1, (2, -1)).transpose(1, 2), p))

    graph = traced(of(scaled_dot_product_attention), *RECORDED)
    for given in OTHERS:
        torch.testing.assert_close(graph(*given), of(F.scaled_dot_product_attention)(*given))


def bert(**options: Any) -> tuple[nn.Module, nn.Module]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=32,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    original = transformers.BertModel(config).double().eval()
    copied = copy.deepcopy(original)
    swap(copied, **options)
    calls = (
        Call(
            lambda m, ids, p: m(input_ids=ids, attention_mask=(~p).long()).last_hidden_state, model
        )
        for model in (original, copied)
    )
    return next(calls), next(calls)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # transformers' own masks
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_bert_traced(pack: bool) -> None:
    original, module = bert(pack=pack)

    def ids(given: Batch) -> Batch:
        return given[0][..., 0].mul(1000).long() % 50, given[1]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = torch.jit.trace(module, ids(RECORDED))
    own = [warning for warning in caught if "transformers" not in warning.filename]
    assert not [warning for warning in own if "is deprecated" not in str(warning.message)]
    for given in OTHERS:
        real = ~given[1]
        torch.testing.assert_close(graph(*ids(given))[real], original(*ids(given))[real])


def test_scripting_is_refused_before_anything_else() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layers(), nn.LayerNorm(WIDTH)).double()
    report = swap(model)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: TransformerEncoder is swapped"):
        torch.jit.script(model)
    assert [type(module) for module in model.modules()] == kinds
    report.restore()
    torch.jit.script(nn.Sequential(model[0], model[2]))


@pytest.mark.parametrize("name", MODULES)
def test_compiled_in_one_graph(name: str) -> None:
    original, module = pair(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for given in (RECORDED, OTHERS[3]):
            torch.testing.assert_close(compiled(*given), original(*given))


@pytest.mark.parametrize("how", ["traced", "opset_23"])
@pytest.mark.parametrize("name", ["weights", "encoder", "decoder"])
def test_as_onnx(name: str, how: str, tmp_path: Path) -> None:
    original, module = (half.float() for half in pair(name))

    def in_float32(given: Batch) -> Batch:
        return given[0].float(), given[1]

    with torch.no_grad():
        sizes = {0: "B", 1: "L"}
        path = export(module, in_float32(RECORDED), (sizes, sizes), how, tmp_path)
        for given in (RECORDED, OTHERS[3]):
            out = original(*in_float32(given))
            out = out if isinstance(out, Tensor) else out[0]
            got = run(path, in_float32(given))[0]
            assert_same({"the output": got}, {"the output": out})


def test_exported() -> None:
    original, module = pair("encoder")
    sizes = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=3, max=64)}
    with torch.no_grad():
        program = torch.export.export(module, RECORDED, dynamic_shapes=((sizes, sizes),)).module()
        for given in OTHERS:
            torch.testing.assert_close(program(*given), original(*given))


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    original, module = pair("encoder")
    length = {1: torch.export.Dim("L", min=3, max=64)}
    with torch.no_grad():
        program = torch.export.export(module, RECORDED, dynamic_shapes=((length, length),))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "encoder.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for given in (*OTHERS[:3], batch([9, 5])):
            torch.testing.assert_close(loaded(*given), original(*given))
