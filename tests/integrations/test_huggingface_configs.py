"""The configs of swapped Hugging Face models: shared, compared, copied, set, built from."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs rowmax[huggingface]")

from rowmax.kernels import compare, swap, swapped  # noqa: E402
from rowmax.kernels.integrations.huggingface import attention as huggingface  # noqa: E402

from . import architectures as zoo  # noqa: E402

transformers.logging.set_verbosity_error()

_CLIP: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": zoo.VOCABULARY,
        "projection_dim": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 16,
    },
    "projection_dim": 16,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", zoo.ARCHITECTURES["Llama"][2]),
    "BART": ("BartForConditionalGeneration", "BartConfig", zoo.ARCHITECTURES["BART"][2]),
    "CLIP": ("CLIPModel", "CLIPConfig", _CLIP),
}


def build(name: str, implementation: str = "eager") -> Any:
    model = zoo.build(*MODELS[name])
    model.set_attn_implementation(implementation)
    return model


def call(model: Any) -> Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, zoo.VOCABULARY, (2, 7))
    ids[:, -1] = 2
    real = torch.arange(7) < torch.tensor([[7], [4]])
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
    if model.config.model_type == "clip":
        arguments["pixel_values"] = torch.randn(2, 3, 16, 16)
        out = model(**arguments)
        return torch.cat((out.text_embeds, out.image_embeds))
    if model.config.model_type == "bart":
        return model(**arguments, decoder_input_ids=ids[:, :3]).logits
    return model(**arguments).logits[real]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The attentions that have called rowmax's, by the interface's function."""
    made: list[nn.Module] = []
    library = transformers.modeling_utils.AttentionInterface
    huggingface.is_registered()
    original = library._global_mapping["rowmax"]

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made.append(module)
        return original(module, *args, **kwargs)

    monkeypatch.setitem(library._global_mapping, "rowmax", noted)
    return made


def configs(model: Any) -> list[Any]:
    """The configs of all modules, and those in the outermost one."""
    inner = [getattr(model.config, name) for name in model.config.sub_configs]
    return inner + [module.config for module in model.modules() if hasattr(module, "config")]


def implementations(model: Any) -> set[str]:
    return {config._attn_implementation for config in configs(model)}


def test_the_configs_are_what_they_were() -> None:
    for name in MODELS:
        model = build(name, "sdpa")
        before = [(config, config.to_json_string(), repr(config)) for config in configs(model)]
        dicts = [config.to_dict() for config in configs(model)]
        with swapped(model):
            for config, known, as_dict in zip(configs(model), before, dicts, strict=True):
                assert config is known[0]
                assert config == copy.deepcopy(config)
                assert (config.to_json_string(), repr(config)) == known[1:]
                assert config.to_dict() == as_dict
            assert implementations(model) == {"sdpa"}


def test_a_config_equals_its_copies_while_the_model_runs() -> None:
    model = build("CLIP")
    original, seen = model.config, []
    as_dict = original.to_dict()

    def look(*_: Any) -> None:
        config = model.config
        seen.append(config._attn_implementation)
        duplicate = copy.deepcopy(config)
        assert config == duplicate == original == config
        assert duplicate._attn_implementation == "rowmax"
        assert duplicate.vision_config._attn_implementation == "rowmax"
        assert config.vision_config == original.vision_config
        assert type(config)() == type(original)()
        config.projection_dim += 1  # what is set on one is seen on the other
        assert original.projection_dim == as_dict["projection_dim"] + 1
        config.projection_dim -= 1
        assert config.to_dict() == duplicate.to_dict() == as_dict
        assert type(pickle.loads(pickle.dumps(config))) is type(original)

    with swapped(model):
        model.visual_projection.register_forward_hook(look)
        call(model)
        assert original._attn_implementation == "eager"
    assert seen == ["rowmax"]


MAKERS: dict[str, Callable[[Any], Any]] = {
    "its class": lambda model: type(model)(model.config),
    "the class": lambda model: getattr(transformers, type(model).__name__)(model.config),
    "from_config": lambda model: transformers.AutoModel.from_config(model.config),
    "of a copy": lambda model: type(model)(copy.deepcopy(model.config)),
    "of a dictionary": lambda model: type(model)(type(model.config)(**model.config.to_dict())),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_from_the_config_is_as_ever(
    name: str, maker: str, implementation: str, calls: list[nn.Module]
) -> None:
    model = build(name, implementation)
    config, other = model.config, type(model)(model.config).eval()
    expected, expected_other = call(model), call(other)
    with swapped(model) as report:
        new = MAKERS[maker](model).eval()
        attentions = sum("interface" in site.reason for site in report.swapped)
        if new.config is config:  # a copy of its own may have the default
            assert implementations(new) == {implementation}
        assert not any(
            "rowmax" in cls.__module__ for own in new.modules() for cls in type(own).__mro__
        )
        if maker != "from_config":  # which has no head
            new.load_state_dict(model.state_dict())
            torch.testing.assert_close(call(new), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(call(other), expected_other)
        assert not calls
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == attentions
    calls.clear()
    assert model.config is config
    for own in (model, other):
        assert implementations(own) == {implementation}
    assert torch.equal(call(model), expected)
    assert torch.equal(call(other), expected_other)
    assert not calls


def test_models_of_the_configs_inside() -> None:
    model = build("CLIP")
    with swapped(model):
        text = transformers.CLIPTextModel(model.config.text_config)
        image = transformers.CLIPVisionModel(model.vision_model.config)
        assert implementations(text) == implementations(image) == {"eager"}
    assert implementations(model) == {"eager"}


def test_saved_and_loaded_while_swapped(tmp_path) -> None:
    model = build("BART", "sdpa")
    expected = call(model)
    with swapped(model):
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert implementations(again) == {"eager"}
        assert type(again) is transformers.BartForConditionalGeneration
        torch.testing.assert_close(call(again), expected, rtol=1e-4, atol=1e-5)
    assert "rowmax" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_an_implementation_set_on_another_model_is_that_models(
    name: str, calls: list[nn.Module]
) -> None:
    model = build(name)
    other = type(model)(model.config).eval()
    expected = call(model)
    with swapped(model):
        other.set_attn_implementation("sdpa")
        assert implementations(other) == {"sdpa"}
        call(other)
        assert not calls
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
        assert calls
    assert implementations(model) == {"sdpa"}  # they share it


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_an_implementation_set_on_the_model_wins(
    name: str, implementation: str, calls: list[nn.Module]
) -> None:
    """The one that it had before, too."""
    model = build(name)
    expected = call(model)
    report = swap(model)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
    assert not calls
    assert implementations(model) == {implementation}
    report.restore()
    assert implementations(model) == {implementation}


def test_an_implementation_set_for_a_part(calls: list[nn.Module]) -> None:
    model = build("CLIP", "sdpa")
    expected = call(model)
    swap(model)
    duplicate = copy.deepcopy(model)
    model.set_attn_implementation({"vision_config": "eager"})
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"
    torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
    assert {id(module) for module in calls} == {
        id(layer.self_attn) for layer in _text_layers(model)
    }
    calls.clear()
    torch.testing.assert_close(call(duplicate), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


def _text_layers(model: Any) -> Any:
    text = model.text_model
    return getattr(text, "text_model", text).encoder.layers


def test_an_implementation_set_where_a_part_is_left(calls: list[nn.Module]) -> None:
    model = build("Llama", "sdpa")
    expected = call(model)
    swap(model, norms=False, filter_fn=lambda _, name: "layers.0" not in name)
    call(model)
    assert len(calls) == 1
    model.set_attn_implementation("eager")
    torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def test_an_implementation_set_on_a_packed_model(calls: list[nn.Module]) -> None:
    if zoo.VERSION < (5, 0):
        pytest.skip("BERT does not go through the interface in transformers 4")
    model = zoo.model_of("BERT")
    swap(model, pack=True)
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([[7], [8], [0]])  # sdpa's mask of one token looks like rowmax's
    arguments = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    out = model(**arguments)[0]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(out[:2], model(**arguments)[0][:2], rtol=1e-4, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("last", [0, 1])
def test_two_swaps_ended_in_any_order(last: int, calls: list[nn.Module]) -> None:
    model = build("Llama", "sdpa")
    config, classes = model.config, [type(module) for module in model.modules()]
    expected = call(model)
    reports = [swap(model, filter_fn=lambda _, name: "layers.0" in name), swap(model)]
    for report in (reports[1 - last], reports[last]):
        calls.clear()
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == (2 if report is reports[1 - last] else 1)
        report.restore()
    assert [type(module) for module in model.modules()] == classes
    assert all(vars(module).get("config", config) is config for module in model.modules())
    assert torch.equal(call(model), expected)


def test_another_thread_sees_the_config_as_it_is(calls: list[nn.Module]) -> None:
    """While the model runs in this one."""
    model, seen = build("Llama"), []

    def look(*_: Any) -> None:
        def read() -> None:
            new = transformers.LlamaForCausalLM(model.config)
            seen.append((model.config._attn_implementation, implementations(new)))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    swap(model)
    model.model.norm.register_forward_hook(look)
    call(model)
    assert seen == [("eager", {"eager"})]
    assert len(calls) == 2


def test_a_compiled_model_attends_by_rowmax() -> None:
    model = build("Llama", "sdpa")
    seen: list[str] = []
    expected = call(model)

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with swapped(model), torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(call(compiled), expected, rtol=1e-4, atol=1e-5)
        assert implementations(model) == {"sdpa"}
    assert sum("rowmax" in target and "attention" in target for target in seen) == 2


def test_an_error_inside_leaves_no_trace() -> None:
    model = build("Llama")
    swap(model)
    with pytest.raises(TypeError):
        model(input_ids="no tensor")
    assert implementations(model) == {"eager"}


def test_forwards_set_on_instances_before_the_swap(calls: list[nn.Module]) -> None:
    """As accelerate does it: the class's forward is held, and called by another."""
    model = build("Llama")
    expected = call(model)
    for module in model.modules():
        if hasattr(module, "config"):
            own = module.forward
            module.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
    with swapped(model):
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_the_signature_of_forward_is_the_models() -> None:
    """Trainers and `generate` look at it to know what the model takes."""
    model = build("Llama")
    before = inspect.signature(model.forward)
    with swapped(model):
        assert inspect.signature(model.forward) == before
        assert isinstance(model, transformers.LlamaForCausalLM)


def test_compare_refuses_a_model_of_which_the_attention_is_swapped() -> None:
    model = build("Llama")
    with swapped(model, norms=False), pytest.raises(ValueError, match="restore it first"):
        compare(model, torch.ones(1, 3, dtype=torch.long))


def test_another_config_set_on_a_module_stays() -> None:
    model = build("Llama")
    other = copy.deepcopy(model.config)
    report = swap(model)
    model.config = other
    assert model.config is other
    report.restore()
    assert model.config is other
    assert type(model) is transformers.LlamaForCausalLM
