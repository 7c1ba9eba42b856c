"""Hugging Face models on a GPU: against eager, without waiting, in CUDA graphs, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs rowmax[huggingface]")

from rowmax.kernels import register_huggingface  # noqa: E402
from rowmax.kernels.backends import dispatch  # noqa: E402

from . import architectures as zoo  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if dispatch.unavailable("triton") is not None:
    pytest.skip(str(dispatch.unavailable("triton")), allow_module_level=True)

DEVICE = torch.device("cuda")
NAMES = pytest.mark.parametrize("name", ["Llama", "Mistral"])


def model_of(name: str, implementation: str) -> Any:
    register_huggingface()
    model = zoo.model_of(name)
    model.set_attn_implementation(implementation)
    return model.eval().to(DEVICE)


def inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    real = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    real[1, :4] = 0
    return ids, real


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@NAMES
@torch.no_grad()
def test_layers_do_not_wait(name: str) -> None:
    """The mask is there before: transformers looks at padding itself, once a forward pass."""
    ids, real = inputs()
    ours, eager = model_of(name, "rowmax"), model_of(name, "eager")
    expected = eager(ids, attention_mask=real).last_hidden_state
    ours(ids, attention_mask=real)
    handles = [
        layer.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
        for layer in ours.layers
    ]
    try:
        got = ours(ids, attention_mask=real).last_hidden_state
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.remove()
    assert_close(got[real.bool()], expected[real.bool()])


@NAMES
@torch.no_grad()
def test_a_step_of_a_static_cache_in_a_graph(name: str) -> None:
    """One step recorded, replayed for the steps that follow."""
    ids, real = inputs()
    models = {kind: model_of(name, kind) for kind in ("rowmax", "eager")}
    caches = {
        kind: transformers.StaticCache(config=model.config, max_cache_len=16)
        for kind, model in models.items()
    }
    full = torch.zeros(2, 16, dtype=torch.int64, device=DEVICE)
    full[:, :9] = real
    token, at = ids[:, 6:7].clone(), torch.full((1,), 6, device=DEVICE)

    def step(kind: str, tokens: Tensor, position: Tensor) -> Tensor:
        given = {"attention_mask": full, "past_key_values": caches[kind]}
        if zoo.VERSION < (5, 0):  # from then on a cache counts for itself, on the device
            given["cache_position"] = position
        out: Tensor = models[kind](tokens, position_ids=position[None], **given).last_hidden_state
        return out

    for kind in models:
        step(kind, ids[:, :6], torch.arange(6, device=DEVICE))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = step("rowmax", token, at)
    torch.cuda.current_stream().wait_stream(side)
    assert_close(first, step("eager", token, at))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step("rowmax", token, at)
    for n in (7, 8):
        token.copy_(ids[:, n : n + 1])
        at.fill_(n)
        graph.replay()
        assert_close(held, step("eager", token, at))


@NAMES
@torch.no_grad()
def test_generation_with_a_compiled_static_cache(name: str) -> None:
    """transformers compiles the steps of a static cache with mode "reduce-overhead"."""
    ids, real = inputs()
    register_huggingface()
    generated = {}
    for kind in ("rowmax", "eager"):
        stem, _, sizes = zoo.ARCHITECTURES[name]
        model = zoo.build(f"{stem}ForCausalLM", f"{stem}Config", sizes).to(DEVICE)
        model.set_attn_implementation(kind)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        generated[kind] = model.generate(
            ids, attention_mask=real, cache_implementation="static", **options
        )
    assert torch.equal(generated["rowmax"], generated["eager"])
