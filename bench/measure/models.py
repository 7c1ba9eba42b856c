"""Whole models: one training step of them on each path, with the same weights.

`transformer` is the reference Transformer of rowmax.transformer, `encoder` torch's own
`nn.TransformerEncoder`. Each path is the same model with other functions in the places where it
calls attention and norms, put there for the time of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import kernels
from ...kernels import Causal, KeyLengths
from ...kernels.testing.tolerance import CHANCES, perturbed
from ...transformer import interface
from ...transformer import model as reference_model
from ...transformer.config import ModelConfig
from .cases import MODEL_HEAD_SIZE, Case

VOCABULARY = 1000
LAYERS = 2  # and as many again of the Transformer's decoder
SEED = 20170612

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class ModelInputs:
    """A batch and the weights: what is differentiated are the weights."""

    kind: str
    shape: tuple[int, ...]
    weights: Outputs  # in the order of the module's parameters
    x: Tensor  # (B, L, width) for the encoder; (B, L) tokens for the Transformer
    d_out: Tensor  # like the output
    lengths: Tensor  # (B,) int64, of the Transformer's sources
    dropout_p: float = 0.0

    renewed = ("x", "d_out")  # the weights stay those of a model

    @property
    def leaves(self) -> Outputs:
        return self.weights

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    def pieces(self) -> Iterator[tuple[ModelInputs, None]]:
        yield self, None

    def some_piece(self, _draw: Random) -> tuple[ModelInputs, None]:
        return self, None

    def regions(self, _part: None) -> dict[str, tuple[slice, ...]]:
        return {"x": (slice(None),) * self.x.dim()}

    def split(self) -> list[ModelInputs]:
        return [self]

    def join(self, results: Sequence[Outputs]) -> Outputs:
        return results[0]

    def to_copy(self) -> Tensor:
        return self.x.detach()

    def moved(self) -> Iterator[ModelInputs]:
        """The same with all weights `perturbed`, several times."""
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(CHANCES):
            weights = (perturbed(weight, generator).requires_grad_() for weight in self.weights)
            yield replace(self, weights=tuple(weights))


def model_inputs(case: Case) -> ModelInputs:
    batch, length, width = case.shape
    module = _module(case.kind, case.shape)
    generator = torch.Generator().manual_seed(SEED)
    device, dtype = case.suite.device, case.dtype

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    if case.kind == "encoder":
        x, d_out = normal(batch, length, width), normal(batch, length, width)
    else:
        x = torch.randint(VOCABULARY, (batch, length), generator=generator).to(device)
        d_out = normal(batch, length, VOCABULARY)
    lengths = torch.randint((length + 1) // 2, length + 1, (batch,), generator=generator)
    weights = tuple(
        weight.detach().to(device, dtype).requires_grad_() for weight in module.parameters()
    )
    return ModelInputs(case.kind, case.shape, weights, x, d_out, lengths.to(device))


@functools.lru_cache(maxsize=2)
def _module(kind: str, shape: tuple[int, ...]) -> nn.Module:
    """In training mode, for torch's encoder has another path out of it, without dropout."""
    _, length, width = shape
    heads = width // MODEL_HEAD_SIZE
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        if kind == "encoder":
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, batch_first=True
            )
            return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).train()
        config = ModelConfig(
            vocab_size=VOCABULARY,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            d_model=width,
            heads=heads,
            d_ff=4 * width,
            dropout=0.0,
            max_length=length,
        )
        return reference_model.EncoderDecoder(config).train()


def run(replacements: dict[str, dict[str, Any]], inputs: ModelInputs) -> Outputs:
    """The model's output; `replacements` by kind, name of a function -> what stands for it."""
    module = _module(inputs.kind, inputs.shape)
    names = [name for name, _ in module.named_parameters()]
    weights = dict(zip(names, inputs.weights, strict=True))
    places: tuple[ModuleType, ...] = (F,)
    given: tuple[Tensor, ...] = (inputs.x,)
    if inputs.kind != "encoder":
        places, given = (reference_model, interface), (inputs.x, inputs.lengths, inputs.x)
    with _replaced(places, replacements.get(inputs.kind, {})):
        return (torch.func.functional_call(module, weights, given),)


@contextmanager
def _replaced(modules: tuple[ModuleType, ...], functions: dict[str, Any]) -> Iterator[None]:
    """Each function stands in for the one of its name, in the modules that call it."""
    before = [
        (module, name, getattr(module, name))
        for name in functions
        for module in modules
        if hasattr(module, name)
    ]
    assert {name for _, name, _ in before} == set(functions)
    for module, name, _ in before:
        setattr(module, name, functions[name])
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


# --- the paths ------------------------------------------------------------------------------------


def rowmax_path(backend: str) -> dict[str, dict[str, Any]]:
    def sdpa(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any
    ) -> Tensor:
        assert attn_mask is None  # the encoder is measured without padding
        dropout_p, is_causal = rest
        mask = Causal() if is_causal else None
        return kernels.attention(query, key, value, mask, dropout_p=dropout_p, backend=backend)

    def layer_norm(
        x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        assert tuple(shape) == x.shape[-1:]  # as nn.TransformerEncoderLayer makes it
        return kernels.layer_norm(x, weight, bias, eps, backend=backend)

    names = ("attention", "add_layer_norm", "layer_norm")
    return {
        "encoder": {"scaled_dot_product_attention": sdpa, "layer_norm": layer_norm},
        "transformer": {name: _by(getattr(kernels, name), backend) for name in names},
    }


def _by(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`function` on `backend`, whatever the model asks for."""

    def call(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **{**options, "backend": backend})

    return call


def torch_path() -> dict[str, dict[str, Any]]:
    """Torch's own path: the encoder as it is, the Transformer on SDPA and F.layer_norm."""
    return {"transformer": _unfused_norms() | {"attention": _attention_by_sdpa}}


def naive_path() -> dict[str, dict[str, Any]]:
    """Attention and norms as the paper writes them."""
    return {
        "encoder": {"scaled_dot_product_attention": lambda *qkv: _naive_attention(*qkv[:3])},
        "transformer": _unfused_norms() | {"attention": _naive_attention},
    }


def _unfused_norms() -> dict[str, Any]:
    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        total = residual + x
        return F.layer_norm(total, total.shape[-1:], weight, bias), total

    return {"add_layer_norm": add_layer_norm}


def _attention_by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Causal | KeyLengths | None, **_options: Any
) -> Tensor:
    if isinstance(mask, Causal):  # queries and keys are as many: nothing is decoded here
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_allowed(mask, q, k))


def _naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Causal | KeyLengths | None = None, **_options: Any
) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    allowed = _allowed(mask, q, k)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def _allowed(mask: Causal | KeyLengths | None, q: Tensor, k: Tensor) -> Tensor | None:
    """bool, broadcastable to (B, H, Lq, Lk), as small as it can be."""
    if mask is None:
        return None
    batch = q.shape[0] if isinstance(mask, KeyLengths) else 1
    rows = 1 if isinstance(mask, KeyLengths) else q.shape[2]
    return mask.dense(batch, 1, rows, k.shape[2]).to(q.device)
