"""The model against torch's own Transformer layers, and what masks and positions must do."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from rowmax.kernels.backends import dispatch
from rowmax.transformer import EncoderDecoder, ModelConfig
from rowmax.transformer.cache import Slots
from rowmax.transformer.config import ConfigError, from_mapping
from rowmax.transformer.model import sinusoids
from rowmax.transformer.tokenizer import BOS

from .beams import assert_beams_go_on

SMALL = ModelConfig(
    vocab_size=50, encoder_layers=2, decoder_layers=3, d_model=24, heads=3, d_ff=40, max_length=32
)


def small(backend: str = "reference", **changes) -> EncoderDecoder:
    torch.manual_seed(0)
    model = EncoderDecoder(dataclasses.replace(SMALL, **changes), backend)
    with torch.no_grad():  # norms that do something
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def sentences(seed: int = 0, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source (4, 9) with lengths 9, 5, 1 and 7, target (4, 6)."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, 50, (4, length), generator=generator)
    target = torch.randint(3, 50, (4, 6), generator=generator)
    target[:, 0] = BOS
    return source, torch.tensor([9, 5, 1, 7]), target


def torch_layer(layer: Any, kind: type[nn.Module], norms: list[nn.Module], pre: bool):
    """torch's layer with the weights of ours; ``norms`` in the order of torch's."""
    theirs = kind(24, 3, 40, dropout=0.0, batch_first=True, norm_first=pre, dtype=torch.float64)
    attentions = [(theirs.self_attn, layer.self_attention)]
    if kind is nn.TransformerDecoderLayer:
        attentions.append((theirs.multihead_attn, layer.source_attention))
    with torch.no_grad():
        for their, our in attentions:
            weights = [our.w_q.weight, our.w_k.weight, our.w_v.weight]
            their.in_proj_weight.copy_(torch.cat(weights))
            their.in_proj_bias.zero_()
            their.out_proj.weight.copy_(our.w_o.weight)
            their.out_proj.bias.zero_()
        theirs.linear1.load_state_dict(layer.feed_forward.w_1.state_dict())
        theirs.linear2.load_state_dict(layer.feed_forward.w_2.state_dict())
        for number, norm in enumerate(norms, start=1):
            getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
    return theirs


def torch_logits(model: EncoderDecoder, source, lengths, target) -> torch.Tensor:
    """The same computation by torch.nn's encoder and decoder layers."""
    pre = model.config.pre_norm
    padding = torch.arange(source.shape[1]) >= lengths[:, None]
    causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)

    def embed(tokens):
        positions = sinusoids(tokens.shape[1], 24).double()
        return nn.functional.embedding(tokens, model.embedding.weight) * math.sqrt(24) + positions

    def norms_of(layers, count):
        """Post-norm: each layer's own. Pre-norm: the stack's first norm, then all others."""
        own = [getattr(layer, f"add_norm_{i}") for layer in layers for i in range(1, count + 1)]
        return own, own[-1]

    def run(layers, first, count, kind, x, *inputs, **masks):
        own, last = norms_of(layers, count)
        order = [first, *own[:-1]] if pre else own
        for i, layer in enumerate(layers):
            x = torch_layer(layer, kind, order[count * i : count * (i + 1)], pre)(
                x, *inputs, **masks
            )
        if pre:
            x = nn.functional.layer_norm(x, (24,), last.weight, last.bias)
        return x

    memory = run(
        *(model.encoder, getattr(model, "encoder_norm", None), 2, nn.TransformerEncoderLayer),
        embed(source),
        src_key_padding_mask=padding,
    )
    top = run(
        *(model.decoder, getattr(model, "decoder_norm", None), 3, nn.TransformerDecoderLayer),
        embed(target),
        memory,
        tgt_mask=causal,
        memory_key_padding_mask=padding,
    )
    return top @ model.embedding.weight.T


@pytest.mark.parametrize("pre_norm", [False, True])
def test_equals_torchs_layers(pre_norm):
    model = small(pre_norm=pre_norm)
    inputs = sentences()
    # float64; torch's norms have the same eps.
    torch.testing.assert_close(model(*inputs), torch_logits(model, *inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("backend", ["numba", "native", "triton", "auto"])
def test_every_backend_gives_the_same_numbers(backend, pre_norm):
    """Logits, loss gradients, and, with dropout, the same masks."""
    results = []
    for name in ("reference", backend):
        model = small(name, pre_norm=pre_norm, dropout=0.2, attention_dropout=0.1).float().train()
        torch.manual_seed(7)
        try:
            logits = model(*sentences())
        except RuntimeError as error:
            if "can't do this" not in str(error):
                raise
            pytest.skip(str(error))
        logits.square().mean().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, expected in zip(results[1], results[0], strict=True):
        # A few float32 roundings of sums of some dozen terms.
        torch.testing.assert_close(
            ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_source_padding_has_no_influence():
    model = small()
    source, lengths, target = sentences()
    expected = model(source, lengths, target)
    for row, length in enumerate(lengths):
        source[row, length:] = 7
    torch.testing.assert_close(model(source, lengths, target), expected, rtol=0, atol=0)
    wider = torch.nn.functional.pad(source, (0, 3), value=9)
    torch.testing.assert_close(model(wider, lengths, target), expected, rtol=0, atol=1e-13)


def test_a_sentence_does_not_depend_on_its_batch():
    model = small()
    source, lengths, target = sentences()
    together = model(source, lengths, target)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model(source[one, :length], lengths[one], target[one])
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-13)


def test_no_target_position_sees_a_later_one():
    model = small()
    source, lengths, target = sentences()
    expected = model(source, lengths, target)
    for position in range(1, 6):
        changed = target.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        logits = model(source, lengths, changed)
        torch.testing.assert_close(logits[:, :position], expected[:, :position], rtol=0, atol=0)
        assert (logits[:, position] != expected[:, position]).any()


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1), (2, 1, 3)])
def test_decoding_in_pieces_equals_decoding_at_once(pre_norm, cuts):
    model = small(pre_norm=pre_norm)
    source, lengths, target = sentences()
    state = model.start(source, lengths)
    pieces = [model.decode(piece, state) for piece in target.split(list(cuts), dim=1)]
    assert state.length == 6
    torch.testing.assert_close(
        torch.cat(pieces, 1), model(source, lengths, target), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("backend", ["reference", "numba", "native"])
def test_beams_that_change_places(backend, pre_norm):
    if dispatch.unavailable(backend):
        pytest.skip(f"{backend} does not work here")
    assert_beams_go_on(small(backend=backend, pre_norm=pre_norm))


def keys_address(slots: Slots) -> int:
    assert slots._memory is not None
    return slots._memory[0].data_ptr()


def test_the_cache_copies_no_key_where_beams_change_places():
    model = small()
    source, lengths, _ = sentences()
    state = model.start(source, lengths, beams=3)
    tokens = torch.full((len(source), 3), 4)
    for _ in range(5):
        model.decode(tokens, state)
    before = [keys_address(slots) for slots in state.own]
    state.reorder(torch.zeros(len(source), 3, dtype=torch.int64))
    model.decode(tokens, state)
    assert [keys_address(slots) for slots in state.own] == before
    assert state.source[0][0].shape[0] == len(source)


@torch.no_grad()
def test_the_cache_stays_where_it_is_for_a_while():
    """Its memory is made in the second step, for 32, and again in the 33rd."""
    model = small()
    source, lengths, _ = sentences()
    state = model.start(source, lengths)
    addresses = []
    for _ in range(33):
        tokens = torch.full((len(source), 1), 4)
        if state.length < model.config.max_length:
            model.decode(tokens, state)
        else:
            keys, values = state.source[0]
            state.own[0].append((keys[:, :, :1], values[:, :, :1]))
        addresses.append(keys_address(state.own[0]))
    assert addresses[0] != addresses[1]
    assert len(set(addresses[1:32])) == 1
    assert addresses[32] != addresses[31]


def test_layers_share_no_weights():
    model = small()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    first, second = model.encoder[0].get_parameter, model.encoder[1].get_parameter
    name = "self_attention.w_q.weight"
    assert not torch.equal(first(name), second(name))


def test_the_base_model_is_the_papers():
    """Table 3: 65 million parameters with the shared vocabulary of about 37,000."""
    model = EncoderDecoder(ModelConfig(vocab_size=37_000))
    count = sum(parameter.numel() for parameter in model.parameters())
    # Each encoder layer: 4 projections, feed-forward with biases, 2 norms; each decoder layer
    # one more attention and norm.
    feed_forward = 2 * 512 * 2048 + 2048 + 512
    encoder_layer = 4 * 512**2 + feed_forward + 2 * 2 * 512
    decoder_layer = 8 * 512**2 + feed_forward + 3 * 2 * 512
    assert count == 37_000 * 512 + 6 * (encoder_layer + decoder_layer)
    assert 60e6 < count < 65.5e6


def test_sinusoids():
    table = sinusoids(40, 10)
    for position in (0, 1, 17, 39):
        for i in range(5):
            angle = position / 10_000 ** (2 * i / 10)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_dropout_only_in_training():
    model = small(dropout=0.3, attention_dropout=0.3)
    inputs = sentences()
    torch.testing.assert_close(model(*inputs), model(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(
        model(*inputs), small(dropout=0.0, attention_dropout=0.0)(*inputs), rtol=0, atol=0
    )
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


@pytest.mark.parametrize("where", ["dropout", "attention_dropout"])
def test_each_dropout_does_something(where):
    settings: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, where: 0.3}
    model = small(**settings)
    inputs = sentences()
    assert not torch.equal(model.train()(*inputs), model.eval()(*inputs))


def test_one_seed_gives_one_set_of_masks():
    model = small(dropout=0.3, attention_dropout=0.3).train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(*sentences()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_empty_batch():
    model = small()
    logits = model(
        torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 3, dtype=torch.int64),
    )
    assert logits.shape == (0, 3, 50)


def test_sentence_longer_than_the_positions():
    model = small()
    source, lengths, _ = sentences()
    with pytest.raises(ValueError, match="sentence of 33 tokens: max_length is 32"):
        model(source, lengths, torch.ones(4, 33, dtype=torch.int64))


@pytest.mark.parametrize(
    "tokens", [torch.ones(4, 9), torch.ones(9, dtype=torch.int64), torch.ones(4, 9, 1).long()]
)
def test_tokens_of_the_wrong_kind(tokens):
    with pytest.raises(ValueError, match=r"tokens: expected an int64 tensor \(batch, length\)"):
        small()(tokens, torch.tensor([9, 5, 1, 7]), sentences()[2])


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        small("fast")(*sentences())


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"heads": 5}, "d_model: expected a multiple of heads = 5, got 24"),
        ({"d_model": 27}, "d_model: expected an even number"),
        ({"dropout": 1.0}, "dropout: expected 0 <= p < 1, got 1.0"),
        ({"dropout": "a"}, "dropout: expected 0 <= p < 1, got 'a'"),
        ({"encoder_layers": 0}, "encoder_layers: expected a positive integer, got 0"),
        ({"vocab_size": 2.5}, "vocab_size: expected a positive integer, got 2.5"),
        ({"pre_norm": 1}, "pre_norm: expected true or false, got 1"),
        ({"width": 3}, "unknown setting 'width' for ModelConfig"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(ModelConfig, {**dataclasses.asdict(SMALL), **setting})


def test_missing_setting():
    with pytest.raises(ConfigError, match="setting 'vocab_size' of ModelConfig is missing"):
        from_mapping(ModelConfig, {"heads": 8})
