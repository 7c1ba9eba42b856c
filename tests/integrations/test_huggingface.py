"""Hugging Face models: swapped, compared with eager, generating, restored; and the refused ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs rowmax[huggingface]")

from rowmax.kernels import register_huggingface, swap, swapped  # noqa: E402
from rowmax.kernels.integrations.huggingface import attention as huggingface  # noqa: E402

from . import architectures as zoo  # noqa: E402
from .support import results  # noqa: E402

transformers.logging.set_verbosity_error()


def take(name: str) -> Any:
    if name in zoo.ONLY_FROM_5 and zoo.VERSION < (5, 0):
        pytest.skip(f"{name} does not go through the interface in transformers 4")
    return zoo.model_of(name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of rowmax's attention through the interface was given."""
    made: list[dict[str, Any]] = []
    attention = getattr(huggingface, "attention")  # noqa: B009 (mypy: not exported)

    def noted(*args, **kwargs):
        made.append(kwargs | {"mask": args[3], "bias": args[4]})
        return attention(*args, **kwargs)

    monkeypatch.setattr(huggingface, "attention", noted)
    return made


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """1e-5 of the largest value; gradients that are zero but for rounding by the largest of all."""
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        size = max(1.0, float(tensor.abs().max())) if name == "the output" else largest
        assert float((got[name] - tensor).abs().max()) <= 1e-5 * size, name


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_like_eager(name: str, calls: list[dict[str, Any]]) -> None:
    """Outputs and the gradients of all weights, with padding; each attention is rowmax's."""
    model, kind = take(name), zoo.ARCHITECTURES[name][1]
    paddings = ("right", "left") if kind == "text" else ("right",)
    for padding in paddings:
        call = zoo.forward(*zoo.batch_of(kind, padding))
        expected = results(model, call)
        assert not calls
        report = swap(model)
        got = results(model, call)
        sites = sum("interface" in site.reason for site in report.swapped)
        assert not report.left
        assert len(calls) == (
            2 if name == "ALBERT" else sites
        )  # ALBERT's layers are one and the same
        calls.clear()
        assert_close(got, expected)
        report.restore()
        again = results(model, call)
        assert all(torch.equal(tensor, again[key]) for key, tensor in expected.items())


def test_what_models_ask_for_reaches_the_kernels(calls: list[dict[str, Any]]) -> None:
    gemma, oss = zoo.model_of("Gemma 2"), zoo.model_of("gpt-oss")
    arguments, _ = zoo.batch_of("text")
    swap(gemma)
    gemma(**arguments)
    assert {call["softcap"] for call in calls} == {0.5}
    assert {call["scale"] for call in calls} == {8**-0.5}
    calls.clear()
    swap(oss)
    oss(**arguments)
    assert [tuple(call["sinks"].shape) for call in calls] == [(4,), (4,)]


@pytest.mark.parametrize("name,band", [("Llama", "Causal"), ("Mistral", "Window")])
def test_masks_reach_the_kernels_in_their_structure(
    name: str, band: str, calls: list[dict[str, Any]]
) -> None:
    """Not as dense masks: blocks of padding, and outside a band, are skipped."""
    model = zoo.model_of(name)
    swap(model)
    model(**zoo.batch_of("text")[0])
    parts = calls[0]["mask"].parts()
    assert [type(part).__name__ for part in parts] == [band, "KeyLengths"]
    assert parts[1].lengths.tolist() == zoo.LENGTHS.flatten().tolist()
    if band == "Window":
        assert (parts[0].left, parts[0].right, parts[0].align) == (3, 0, 0)


GENERATORS = {
    "Marian": ("MarianMTModel", "MarianConfig", zoo.ARCHITECTURES["Marian"][2]),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", zoo.ARCHITECTURES["GPT-2"][2]),
    "Mistral": ("MistralForCausalLM", "MistralConfig", zoo.ARCHITECTURES["Mistral"][2]),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", zoo.ARCHITECTURES["Gemma 2"][2]),
}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", GENERATORS)
def test_generate_gives_the_same_tokens(
    name: str, beams: int, cache: str | None, calls: list[dict[str, Any]]
) -> None:
    """Greedy and beam search, with left padding where the model decodes from a prompt."""
    if cache == "static" and name == "Marian":
        pytest.skip("Marian has no static cache")
    model = zoo.build(*GENERATORS[name])
    arguments, _ = zoo.batch_of("text", "right" if name == "Marian" else "left")
    options: dict[str, Any] = {
        "max_new_tokens": 9,
        "num_beams": beams,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if cache is not None:
        options |= {"cache_implementation": cache, "disable_compile": True}
    expected = model.generate(**arguments, **options)
    with swapped(model):
        got = model.generate(**arguments, **options)
    assert len(calls) > 9
    assert torch.equal(got, expected)


def test_a_shared_config_and_other_models_stay_as_they_are(calls: list[dict[str, Any]]) -> None:
    model = zoo.model_of("Llama")
    config = model.config
    other = type(model)(config).eval()
    arguments, _ = zoo.batch_of("text")
    expected = other(**arguments).last_hidden_state
    report = swap(model, norms=False)
    assert model.config is config
    assert all(layer.self_attn.config is config for layer in model.layers)
    assert config._attn_implementation == "eager"
    assert torch.equal(other(**arguments).last_hidden_state, expected)
    assert not calls
    model(**arguments)
    assert len(calls) == 2
    report.restore()
    assert model.config is config
    assert all(layer.self_attn.config is config for layer in model.layers)


def test_copies_pickles_and_saved_models(tmp_path, calls: list[dict[str, Any]]) -> None:
    model = zoo.model_of("Llama")
    arguments, _ = zoo.batch_of("text")
    swap(model)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(**arguments)[0], model(**arguments)[0])
    assert len(calls) == 4
    data = pickle.dumps(model)
    assert b"rowmax" not in data
    loaded = pickle.loads(data)
    assert type(loaded.config) is transformers.LlamaConfig
    assert loaded.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert "rowmax" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**arguments)[0], model(**arguments)[0])


def test_setting_another_implementation_wins() -> None:
    model = zoo.model_of("Llama")
    swap(model, norms=False)
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_the_registered_name(calls: list[dict[str, Any]]) -> None:
    """Without a swap: transformers' own setting, and the mask comes with it."""
    register_huggingface()
    model = zoo.model_of("Llama")
    arguments, real = zoo.batch_of("text")
    expected = model(**arguments).last_hidden_state[real]
    model.set_attn_implementation("rowmax")
    got = model(**arguments).last_hidden_state[real]
    assert len(calls) == 2
    assert all(call["mask"] is not None for call in calls)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_output_attentions() -> None:
    model = zoo.model_of("Llama")
    arguments, real = zoo.batch_of("text")
    expected = model(**arguments, output_attentions=True).attentions
    with swapped(model):
        got = model(**arguments, output_attentions=True).attentions
    assert real is not None
    rows = real[:, None, :, None]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a * rows, b * rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_part_may_be_left(implementation: str, calls: list[dict[str, Any]]) -> None:
    """The masks stay those of the other implementation, and are understood."""
    model = zoo.model_of("Llama")
    model.set_attn_implementation(implementation)
    arguments, real = zoo.batch_of("text")
    expected = model(**arguments).last_hidden_state[real]
    with swapped(
        model, filter_fn=lambda _, name: not name.startswith("layers.0.self_attn")
    ) as report:
        got = model(**arguments).last_hidden_state[real]
    assert len(calls) == 1
    assert [site.name for site in report.left] == ["layers.0.self_attn"]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_bypasses_the_interface_is_refused(name: str) -> None:
    stem, options = zoo.REFUSED[name]
    model = zoo.build(f"{stem}Model", f"{stem}Config", options)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"does not go through transformers' AttentionInterface"):
        swap(model)
    assert [type(module) for module in model.modules()] == classes
    arguments, real = zoo.batch_of("text")
    expected = model(**arguments).last_hidden_state[real]
    with swapped(model, attention=False) as report:
        got = model(**arguments).last_hidden_state[real]
    assert {site.kind for site in report.swapped} == {"norm"}
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["4.56.2", "6.0.0", "3.5.1", "6.0.0.dev0"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=f"transformers {version} is outside the range"):
        huggingface.check_version(version)
    for known in ("4.57.0", "5.0.0rc1", "5.23.0"):
        huggingface.check_version(known)


def test_another_version_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model_of("Llama")
    monkeypatch.setattr(huggingface, "_OLDEST", (5, 998))
    huggingface.is_registered.cache_clear()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="outside the range"):
        swap(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._attn_implementation == "eager"


def test_arguments_that_are_not_done_are_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="passes `block_indices`"):
        huggingface.rowmax_attention(torch.nn.Module(), q, q, q, None, block_indices=q)
    with pytest.raises(ValueError, match="`attention_mask`: expected .B, H, Lq, Lk."):
        huggingface.rowmax_attention(torch.nn.Module(), q, q, q, torch.ones(1, 3))


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "ELECTRA"])
def test_packed(name: str, padding: str) -> None:
    model = take(name)
    arguments, real = zoo.batch_of("text", padding)
    arguments["position_ids"] = torch.arange(11).expand(3, -1)
    call = zoo.forward(arguments, real)
    expected = results(model, call)
    seen = []
    with swapped(model, pack=True) as report:
        assert [site.kind for site in report.swapped].count("encoder") == 1
        layer = model.encoder.layer[0].intermediate
        handle = layer.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
        got = results(model, call)
        handle.remove()
    assert seen == [(1, int(zoo.LENGTHS.sum()), 32)]
    assert_close(got, expected)


def test_hidden_states_of_a_packed_model_are_padded() -> None:
    model = take("BERT")
    arguments, real = zoo.batch_of("text")
    expected = model(**arguments, output_hidden_states=True)
    with swapped(model, pack=True):
        got = model(**arguments, output_hidden_states=True)
        alone = model(**arguments)
    assert len(got.hidden_states) == 3
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone[0][real], expected[0][real], rtol=1e-5, atol=1e-5)
