"""FlexAttention, run eagerly here, and other packages, stood in for by fakes of their interface."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowmax.bench.measure.cases import FORWARD_BACKWARD, SUITES, Case
from rowmax.bench.measure.gate import Gate
from rowmax.bench.measure.inputs import EPS, AttentionInputs, make_inputs
from rowmax.bench.measure.report import machine_lines
from rowmax.bench.peers import candidates as peers
from rowmax.bench.peers.packages import Flex, UnsupportedError

SUITE = replace(SUITES["gpu-attention"], device="cpu")
NORMS = replace(SUITES["gpu-norms"], device="cpu")
FLOAT = torch.float32


def gate_of(kind: str, *, backward: bool = True) -> Gate:
    # longer than flex's blocks and than the window
    inputs = make_inputs(Case(SUITE, FLOAT, kind, (2, 8, 300, 16), FORWARD_BACKWARD))
    return Gate(inputs, kind, peers.naive(SUITE, kind), backward=backward)


@pytest.mark.parametrize(
    "kind", [*(kind for kind in SUITE.kinds if kind != "dropout"), "causal+padded+bias"]
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_asked_for_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward: the CPU has no backward of it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    gate = gate_of(kind, backward=False)
    assert gate.fault(Flex(kind), backward=False, is_peer=True) is None


@pytest.mark.parametrize(
    "kind, words", [("dropout", "no dropout"), ("full", "no backward on the CPU")]
)
def test_what_flex_has_not(kind: str, words: str) -> None:
    inputs = make_inputs(Case(SUITE, FLOAT, kind, (1, 1, 8, 8), FORWARD_BACKWARD))
    with pytest.raises(UnsupportedError, match=words):
        Flex(kind)(inputs)  # type: ignore[arg-type]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(B, L, H, D), as flash-attn 2."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    allowed = (j <= i) if causal or window_size[1] == 0 else torch.ones_like(i == j)
    if window_size[0] >= 0:
        allowed = allowed & (i - j <= window_size[0])
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, dropout_p=dropout_p, enable_gqa=True
    )
    return out.transpose(1, 2)


class LowerTriangularMask:
    """As xformers.ops has it."""


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0
) -> Tensor:
    is_causal = isinstance(attn_bias, LowerTriangularMask)
    bias = None if is_causal else attn_bias
    if bias is not None:
        assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=p, is_causal=is_causal
    ).transpose(1, 2)


def rms(x: Tensor, weight: Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Tensor:
    assert (offset, mode, in_place) == (0.0, "llama", False)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def layer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


FAKES: dict[str, dict[str, Any]] = {
    "flash_attn": {"flash_attn_func": flash_attn_func},
    "xformers": {
        "ops": SimpleNamespace(
            LowerTriangularMask=LowerTriangularMask,
            memory_efficient_attention=memory_efficient_attention,
        )
    },
    "liger_kernel": {},
    "liger_kernel.ops": {},
    "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": SimpleNamespace(apply=rms)},
    "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": SimpleNamespace(apply=layer)},
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FAKES.items():
        module = ModuleType(name)
        for attribute, value in content.items():
            setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("flash-attn", {"full", "causal", "dropout", "window", "gqa"}),
        ("xformers", {"full", "causal", "dropout", "bias"}),
    ],
)
@pytest.mark.usefixtures("installed")
def test_attention_packages_are_called_right(name: str, kinds: set[str]) -> None:
    for kind in SUITE.kinds:
        function = peers.peers_of(SUITE)[name](kind)
        if kind in kinds:
            fault = gate_of(kind).fault(function, backward=True, is_peer=True)
            assert fault is None, kind
        else:
            with pytest.raises(UnsupportedError):
                function(AttentionInputs(*(None,) * 9))  # type: ignore[arg-type]


@pytest.mark.usefixtures("installed")
def test_liger_is_called_right() -> None:
    for kind in NORMS.kinds:
        inputs = make_inputs(Case(NORMS, FLOAT, kind, (16, 24), FORWARD_BACKWARD))
        gate = Gate(inputs, kind, peers.naive(NORMS, kind), backward=True)
        function = peers.peers_of(NORMS)["liger"](kind)
        if kind in ("layer_norm", "rms_norm"):
            assert gate.fault(function, backward=True, is_peer=True) is None
        else:
            with pytest.raises(UnsupportedError, match=kind):
                function(inputs)
    assert EPS > 0


def test_what_is_not_installed_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    assert set(SUITE.peers) - set(peers.peers_of(SUITE)) == {"flash-attn", "xformers"}
    machine: dict[str, Any] = {
        "packages": {},
        "load_average": None,
        "torch_threads": 1,
        "python": "3",
    }
    lines = machine_lines(machine | {"cpu": "C", "instruction_set": "I"}, {}, [SUITE, NORMS])
    assert lines[-1] == "peers that are not installed here: flash-attn, xformers, liger"
