"""`record`: what it notes of a running model, and what `speed` and `verify` make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rowmax.bench import record
from rowmax.bench.measure.cases import FORWARD, FORWARD_BACKWARD, Case
from rowmax.bench.shapes import calls
from rowmax.bench.shapes.calls import Call
from rowmax.bench.shapes.saving import cases_of

pytestmark = pytest.mark.usefixtures("small_machine")

F32 = {"float32": torch.float32}


def attention(*shape: int, mask: str = "none", **changed: Any) -> Call:
    fields: dict[str, Any] = {"dropout": False, "gradients": False, **changed}
    strides = ((1,), (1,), (1,))
    return Call("attention", shape, "float32", "cpu", strides, mask, **fields)


def test_a_training_step_of_torchs_transformer() -> None:
    """Two layers each: self-attention of both sides, and the decoder's of the memory."""
    model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.1, batch_first=True)
    source, target = torch.randn(3, 9, 32), torch.randn(3, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    real = F.scaled_dot_product_attention
    with record() as recorder:
        model(source, target, tgt_mask=mask, tgt_is_causal=True).sum().backward()
    assert F.scaled_dot_product_attention is real
    found = {
        (call.shape, call.mask, call.dropout, call.gradients): count
        for call, count in recorder.calls.items()
        if call.op == "attention"
    }
    assert found == {
        ((3, 4, 4, 9, 9, 8, 8), "none", True, True): 2,
        ((3, 4, 4, 7, 7, 8, 8), "causal", True, True): 2,
        ((3, 4, 4, 7, 9, 8, 8), "none", True, True): 2,
    }
    norms = {c.shape: count for c, count in recorder.calls.items() if c.op == "layer_norm"}
    assert norms == {(27, 32): 2 * 2 + 1, (21, 32): 2 * 3 + 1}


def test_fused_encoder_layers_are_seen_too() -> None:
    """In evaluation mode torch calls one operator for the whole layer; not while it is watched."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad(), record() as recorder:
        layer(torch.randn(2, 6, 32), src_key_padding_mask=padding)
    assert torch.backends.mha.get_fastpath_enabled()
    (call,) = [call for call in recorder.calls if call.op == "attention"]
    assert (call.shape, call.gradients) == ((2, 4, 4, 6, 6, 8, 8), False)
    assert call.mask == "padded"  # which torch has made a float mask by then


def test_generation_of_a_llama() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with record() as recorder:
        model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False, use_cache=True)
    lengths = sorted((c.shape[3], c.shape[4], n) for c, n in recorder.calls.items())
    assert lengths == [(1, 6, 2), (1, 7, 2), (5, 5, 2)]
    assert not any(call.gradients for call in recorder.calls)


@pytest.mark.parametrize(
    "mask, kind",
    [
        (torch.tensor([True, False, True]).expand(3, 3).clone(), "padded"),
        (torch.ones(2, 1, 3, 3, dtype=torch.bool).tril(), "causal"),
        (torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf), "causal"),
        (torch.eye(3).bool(), "dense"),
        (torch.ones(2, 3, dtype=torch.bool).tril(), "dense"),
        (torch.linspace(-1.0, 1.0, 9).view(3, 3), "bias"),
        (torch.zeros(3, 3, requires_grad=True), "bias"),
    ],
)
def test_the_kind_of_a_mask_that_is_written_out(mask: torch.Tensor, kind: str) -> None:
    q, k = torch.randn(2, 1, mask.shape[0] if mask.dim() == 2 else 3, 4), torch.randn(2, 1, 3, 4)
    with record() as recorder:
        F.scaled_dot_product_attention(q, k, k, mask)
    assert [call.mask for call in recorder.calls] == [kind]


@pytest.mark.parametrize(
    "call, kind, shape, step",
    [
        (attention(2, 4, 4, 9, 9, 8, 8), "full", (2, 4, 4, 9, 9, 8), FORWARD),
        (attention(2, 4, 2, 1, 9, 8, 8), "decode", (2, 4, 2, 1, 9, 8), FORWARD),
        (attention(2, 4, 4, 20, 9, 8, 8), "cross", (2, 4, 4, 20, 9, 8), FORWARD),
        (
            attention(2, 4, 4, 9, 9, 8, 8, mask="causal", dropout=True, gradients=True),
            *("causal+dropout", (2, 4, 4, 9, 9, 8), FORWARD_BACKWARD),
        ),
        (attention(2, 4, 4, 5, 9, 8, 8, mask="padded"), "padded", (2, 4, 4, 5, 9, 8), FORWARD),
    ],
)
def test_the_case_of_a_call(call: Call, kind: str, shape: tuple[int, ...], step: str) -> None:
    case = call.case(F32)
    assert isinstance(case, Case)
    assert (case.kind, case.shape, case.step) == (kind, shape, step)


def test_what_is_no_case_is_counted() -> None:
    odd = attention(2, 4, 4, 9, 9, 8, 16)
    uneven = attention(2, 4, 4, 5, 9, 8, 8, mask="causal")
    cases, reasons = cases_of({odd: 3, uneven: 1, attention(1, 1, 1, 4, 4, 8, 8): 5}, F32)
    assert list(cases.values()) == [5]
    assert reasons == [
        "3 calls are left out: head sizes of keys and values that differ are not timed",
        "1 calls are left out: a causal mask of 5 queries and 9 keys is not timed",
    ]


def test_calls_that_differ_in_strides_alone_are_one_case() -> None:
    one = attention(1, 1, 1, 4, 4, 8, 8)
    other = Call(**{**vars(one), "strides": ((2,), (2,), (2,))})
    assert list(cases_of({one: 2, other: 3}, F32)[0].values()) == [5]


SCRIPT = """
import sys
import torch
import torch.nn.functional as F

q = torch.randn(2, 4, 9, 8)
for _ in range(int(sys.argv[1])):
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
F.layer_norm(torch.randn(4, 16), (16,))
"""


def test_a_script_is_recorded_timed_and_verified(tmp_path: Path, shown: Any) -> None:
    script, file = tmp_path / "step.py", tmp_path / "shapes.json"
    script.write_text(SCRIPT, encoding="utf-8")
    assert "7 calls of attention and norms, 2 distinct" in shown(
        "record", "--out", str(file), "--", "python", str(script), "6"
    )
    document = json.loads(file.read_text(encoding="utf-8"))
    assert [row["count"] for row in document["calls"]] == [6, 1]

    few = ["--seconds", "0.01", "--quick", "--backend", "reference", "--peers", "sdpa,torch"]
    output = shown("speed", "--shapes", str(file), *few)
    assert "cpu-norms, float32" in output
    assert "the 7 recorded calls: " in output
    assert " ms saved, " in output

    narrow = ["--backend", "reference", "--op", "attention", "--dtype", "float32"]
    chosen = ["--kind", "none,causal", "--check", "accuracy", "--verbose"]
    assert "attention causal (2,4,4,9,9,8,8) float32" in shown(
        "verify", "--shapes", str(file), *narrow, *chosen
    )


def test_the_file_is_written_after_an_error_too(tmp_path: Path) -> None:
    file = tmp_path / "shapes.json"

    def step() -> None:
        with record(file):
            F.layer_norm(torch.zeros(2, 3), (3,))
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        step()
    assert [call.shape for call in calls.read(file)] == [(2, 3)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["record"], "record: expected -- python SCRIPT ..., got nothing"),
        (["record", "--", "ls"], "record: expected -- python SCRIPT ..., got ls"),
        (["record", "--", "python", "nowhere.py"], "record: expected a script or -m MODULE"),
        (["speed", "--shapes", "nowhere.json"], "--shapes: expected a file of rowmax-shapes-1"),
        (["speed", "--shapes", "x", "--kind", "full"], "--kind: not with --shapes"),
        (["verify", "--shapes", "nowhere.json"], "--shapes: expected a file of rowmax-shapes-1"),
        (["verify", "--shapes", "x", "--shape", "1,1,1,4,4,8,8"], "--shape: not with --shapes"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, refused: Any) -> None:
    assert words in refused(*arguments)
