"""Masks on a GPU: nothing waits for the device, and layers still get bands, windows and padding.

Without a GPU, tensors only say that they lie elsewhere, and the profiler counts the operators that
would wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs rowmax[huggingface]")

from rowmax.kernels import (  # noqa: E402
    Dense,
    register_huggingface,
    scaled_dot_product_attention,
    swapped,
)
from rowmax.kernels.integrations import tensor_masks  # noqa: E402
from rowmax.kernels.integrations.huggingface import attention as huggingface  # noqa: E402

from . import architectures as zoo  # noqa: E402

transformers.logging.set_verbosity_error()
WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they don't lie on the CPU, and can't become numbers unseen."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))

    def refuse(tensor: Tensor) -> Any:
        raise AssertionError("would copy from the device")

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks that attentions of layers were given."""
    seen: list[Any] = []
    attention = getattr(huggingface, "attention")  # noqa: B009 (mypy: not exported)

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[3])
        return attention(*args, **kwargs)

    monkeypatch.setattr(huggingface, "attention", noted)
    return seen


def waits(call: Callable[[], Any]) -> Counter[str]:
    """How often each operator of WAITING ran outside of rowmax's own operators."""
    with torch.profiler.profile() as profile, torch.no_grad():
        call()
    counted: Counter[str] = Counter()
    for event in profile.events() or ():
        parent = event
        while parent is not None and not parent.name.startswith("rowmax::"):
            parent = parent.cpu_parent
        if parent is None and event.name in WAITING:
            counted[event.name] += 1
    return counted


def model_of(name: str, implementation: str) -> Any:
    if name in zoo.ONLY_FROM_5 and zoo.VERSION < (5, 0):
        pytest.skip(f"{name} does not go through the interface in transformers 4")
    register_huggingface()
    model = zoo.model_of(name)
    model.set_attn_implementation(implementation)
    return model.eval()


def batch(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 9, dtype=torch.int64)
    if padding != "none":
        real[1, slice(5, None) if padding == "right" else slice(0, 4)] = 0
    return {"input_ids": ids, "attention_mask": real}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 3", "GPT-2", "BERT"])
def test_no_layer_waits(name: str, padding: str, elsewhere: None, masks: list[Any]) -> None:
    """All that waits is what transformers looks at once a forward pass, for "sdpa" as well."""
    inputs = batch(padding)
    ours, theirs, eager = (model_of(name, n) for n in ("rowmax", "sdpa", "eager"))
    assert waits(lambda: ours(**inputs)) == waits(lambda: theirs(**inputs))
    assert masks
    assert not any(isinstance(mask, Dense) for mask in masks)
    with torch.no_grad():
        got, expected = (model(**inputs).last_hidden_state for model in (ours, eager))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_static_caches(name: str, padding: str, elsewhere: None, masks: list[Any]) -> None:
    """Prefill and steps of a cache longer than what it holds."""
    inputs = batch(padding)
    results = []
    for implementation in ("rowmax", "eager"):
        model = model_of(name, implementation)
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        outputs = []
        real = inputs["attention_mask"]
        for first, last in ((0, 6), (6, 7), (7, 8), (8, 9)):
            given = {
                "input_ids": inputs["input_ids"][:, first:last],
                "attention_mask": real[:, :last],
                "past_key_values": cache,
                "cache_position": torch.arange(first, last),
            }
            with torch.no_grad():
                outputs.append(model(**given).last_hidden_state)
        results.append(torch.cat(outputs, 1)[real.bool()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert masks
    assert not any(isinstance(mask, Dense) for mask in masks)


def test_a_mask_that_was_written_to_is_taken_as_it_is(elsewhere: None) -> None:
    allowed = huggingface.rowmax_mask(
        batch_size=1,
        **({"q_length": 4} if zoo.VERSION >= (5, 0) else {"cache_position": torch.arange(4)}),
        kv_length=4,
        mask_function=transformers.masking_utils.causal_mask_function,
        allow_is_causal_skip=False,
    )
    assert allowed is not None
    assert not isinstance(tensor_masks.mask_of(allowed, (1, 2, 4, 4)), Dense)
    assert isinstance(tensor_masks.mask_of(allowed, (1, 2, 3, 4)), Dense)
    allowed[..., 0, 3] = True
    assert isinstance(tensor_masks.mask_of(allowed, (1, 2, 4, 4)), Dense)


def test_other_masks_are_taken_as_they_are(elsewhere: None) -> None:
    q = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert not waits(lambda: scaled_dot_product_attention(q, q, q, mask))
    assert not waits(lambda: scaled_dot_product_attention(q, q, q, mask.float()))


@pytest.mark.parametrize("kind", ["torch", "BERT"])
def test_packed_encoders_stay_padded_in_a_recording(
    kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """To count the real tokens would end the recording of a CUDA graph."""
    real = torch.arange(7) < torch.tensor([[7], [4]])
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model: Any = nn.TransformerEncoder(layer, 2).eval()
        x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))

        def call() -> Tensor:
            return model(x, src_key_padding_mask=~real)
    else:
        model = zoo.model_of(kind)
        ids = torch.arange(3, 17).view(2, 7)

        def call() -> Tensor:
            return model(ids, attention_mask=real.long()).last_hidden_state

    if kind in zoo.ONLY_FROM_5 and zoo.VERSION < (5, 0):
        pytest.skip(f"{kind} does not go through the interface in transformers 4")
    with torch.no_grad(), swapped(model, pack=True):
        packed = call()
        request.getfixturevalue("elsewhere")
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not waits(call)
        torch.testing.assert_close(call()[real], packed[real], rtol=1e-5, atol=1e-5)
