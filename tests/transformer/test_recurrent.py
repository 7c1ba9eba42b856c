"""The recurrent encoder-decoders: against a loop over cells, padding, layouts, the shared path."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from rowmax.transformer import (
    Dataset,
    ModelConfig,
    RecurrentConfig,
    Tokenizer,
    Trainer,
    TrainingConfig,
    beam_search,
    checkpoint,
    corpus,
    greedy,
    new_model,
)
from rowmax.transformer.config import PRESETS, RECURRENT, ConfigError, model_config, preset_config
from rowmax.transformer.data import pad
from rowmax.transformer.interface import recording
from rowmax.transformer.tokenizer import BOS, EOS

from .beams import assert_beams_go_on

CELLS = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
KINDS = pytest.mark.parametrize("arch", RECURRENT)


def recurrent(arch: str, backend: str = "reference", **changes):
    torch.manual_seed(0)
    config = RecurrentConfig(arch, 40, 2, 3, d_model=12, dropout=0.2, max_length=32)
    return new_model(dataclasses.replace(config, **changes), backend).double().eval()


def sentences(seed: int = 0):
    """Source (4, 7) of lengths 7, 3, 1 and 5, target (4, 6)."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, 39, (4, 7), generator=generator)
    target = torch.randint(3, 39, (4, 6), generator=generator)
    target[:, 0] = BOS
    return source, torch.tensor([7, 3, 1, 5]), target


def cell_of(arch: str, layer: nn.RNNBase, suffix: str, sizes: tuple[int, int]) -> nn.Module:
    cell = CELLS[arch](*sizes, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).copy_(getattr(layer, f"{name}_{suffix}"))
    return cell


def by_hand(model: Any, source, target) -> torch.Tensor:
    """One sentence (Ls,), (Lt,) -> (Lt, vocab_size), cell by cell, attention by its formula."""
    arch, d = model.config.arch, model.config.d_model
    embed = model.embedding.weight * d**0.5
    is_lstm = arch == "lstm"

    def visible(state):
        return state[0] if is_lstm else state

    inputs = [embed[token] for token in source]
    last: list[Any] = []
    for layer in range(model.config.encoder_layers):
        outputs: list[list[torch.Tensor]] = []
        last = []
        for suffix, order in ((f"l{layer}", 1), (f"l{layer}_reverse", -1)):
            cell = cell_of(arch, model.encoder, suffix, (len(inputs[0]), d // 2))
            state: Any = None
            states = []
            for x in inputs[::order]:
                state = cell(x, state)
                states.append(visible(state))
            outputs.append(states[::order])
            last.append(state if is_lstm else (state,))
        inputs = [torch.cat(pair) for pair in zip(*outputs, strict=True)]
    memory = torch.stack(inputs)  # (Ls, d)

    layers = model.config.decoder_layers
    hidden = [
        bridge(torch.cat((last[0][i], last[1][i]))).tanh().view(layers, d)
        for i, bridge in enumerate(model.bridges)
    ]
    cells = [
        cell_of(arch, model.decoder, f"l{n}", (2 * d if n == 0 else d, d)) for n in range(layers)
    ]
    states = [tuple(h[n] for h in hidden) if is_lstm else hidden[0][n] for n in range(layers)]
    fed, logits = torch.zeros(d, dtype=torch.float64), []
    attention = model.source_attention
    for token in target:
        x = torch.cat((embed[token], fed))
        for n, cell in enumerate(cells):
            states[n] = cell(x, states[n])
            x = visible(states[n])
        scores = attention.w_a(memory) @ x / d**0.5
        context = scores.softmax(0) @ memory
        fed = attention.w_c(torch.cat((context, x))).tanh()
        logits.append(model.embedding.weight @ fed)
    return torch.stack(logits)


@KINDS
@torch.no_grad()
def test_against_cells(arch):
    """Also: each sentence of a padded batch gives what it gives by itself."""
    model = recurrent(arch)
    source, lengths, target = sentences()
    batch = model(source, lengths, target)
    for row, length in enumerate(lengths):
        expected = by_hand(model, source[row, :length], target[row])
        torch.testing.assert_close(batch[row], expected, rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_changes_nothing(arch, batch_first):
    """Bitwise, and no gradient reaches the embeddings of what stands in the padding."""
    model = recurrent(arch, batch_first=batch_first)
    source, lengths, target = sentences()
    padding = torch.arange(source.shape[1]) >= lengths[:, None]
    first = model(source, lengths, target)
    other = source.masked_fill(padding, 39)  # a token that is nowhere else
    assert torch.equal(first, model(other, lengths, target))
    with torch.no_grad():
        model.embedding.weight[39] = float("nan")
    states, _ = model.encode(other, lengths)
    state = model.start(other, lengths)
    assert torch.isfinite(states[~padding]).all()
    assert torch.isfinite(state.hidden[0]).all()


@KINDS
def test_layouts_agree(arch):
    """batch_first both ways: the same scores, gradients and beams from the same weights."""
    results = []
    for batch_first in (True, False):
        model = recurrent(arch, batch_first=batch_first)
        source, lengths, target = sentences()
        logits = model(source, lengths, target)
        logits.log_softmax(-1)[..., 5].sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append((logits.detach(), *gradients))
        assert all(gradient is not None for gradient in gradients)
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    source, lengths, _ = sentences(1)
    beams = [
        beam_search(recurrent(arch, batch_first=first), source, lengths, 3)
        for first in (True, False)
    ]
    assert beams[0] == beams[1]


def test_layouts_are_what_the_layers_get(monkeypatch):
    """The setting is not only stored: the encoder's packing and the decoder see that layout."""
    source, lengths, target = sentences()
    for batch_first, shape in ((True, (4, 1, 24)), (False, (1, 4, 24))):
        model = recurrent("gru", batch_first=batch_first)
        assert (model.encoder.batch_first, model.decoder.batch_first) == (batch_first,) * 2
        seen: list[tuple[int, ...]] = []
        model.decoder.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(tuple(inputs[0].shape))
        )
        model(source, lengths, target)
        assert seen == [shape] * target.shape[1]


@KINDS
@torch.no_grad()
def test_step_by_step_is_all_at_once(arch):
    model = recurrent(arch)
    source, lengths, target = sentences()
    state = model.start(source, lengths)
    steps = [model.decode(target[:, i : i + 1], state) for i in range(target.shape[1])]
    torch.testing.assert_close(
        torch.cat(steps, 1), model(source, lengths, target), rtol=0, atol=1e-12
    )
    assert state.length == target.shape[1]


@KINDS
@torch.no_grad()
def test_beams_that_change_places(arch):
    assert_beams_go_on(recurrent(arch))


@KINDS
def test_backends_agree(arch):
    """The kernels' fast path against the reference, output and gradients, in float64."""
    results = []
    for backend in ("reference", "auto"):
        model = recurrent(arch, backend)
        logits = model(*sentences())
        logits.square().sum().backward()
        results.append((logits.detach(), *(p.grad for p in model.parameters())))
    for expected, got in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * max(scale, 1))


@KINDS
@torch.no_grad()
def test_recorded_weights(arch):
    """A step a row, rows of sum 1, nothing on the padding, and the scores stay the same bits."""
    model = recurrent(arch)
    source, lengths, target = sentences()
    plain = model(source, lengths, target)
    layers = model.attention_layers()
    assert list(layers) == ["cross"]
    with recording(layers["cross"]):
        assert torch.equal(model(source, lengths, target), plain)
        weights = torch.cat(layers["cross"][0].recorded, dim=2)
    assert layers["cross"][0].recorded is None
    assert weights.shape == (4, 1, 6, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 1, 6).double(), rtol=0, atol=1e-12)
    padding = torch.arange(7) >= lengths[:, None]
    assert (weights.transpose(1, 3)[padding] == 0).all()


@KINDS
def test_learns_and_resumes_bitwise(arch, tmp_path):
    """Training lowers the loss; 2 + 2 steps are 4 steps; a loaded model writes its likeliest."""
    pairs = corpus.generate(80)
    tokenizer = Tokenizer.train((side for pair in pairs for side in pair), 300)
    config = RecurrentConfig(arch, tokenizer.vocab_size, 1, 1, d_model=16, dropout=0.1)
    training = TrainingConfig(steps=4, warmup=10, learning_rate=0.5, batch_tokens=400)
    dataset = Dataset(pairs, tokenizer, config.max_length)

    def new_trainer() -> Trainer:
        torch.manual_seed(1)
        return Trainer(new_model(config, "reference"), dataset, training)

    trainer = new_trainer()
    before = trainer.validate(dataset)
    for _ in range(2):
        trainer.step()
    path = trainer.save(tmp_path, tokenizer)
    for _ in range(2):
        trainer.step()
    assert trainer.validate(dataset) < before
    saved = checkpoint.load(path)
    assert saved.model == config
    resumed = new_trainer()
    resumed.restore(saved)
    for _ in range(2):
        resumed.step()
    for one, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    source, lengths = pad([[*ids, EOS] for ids in tokenizer.encode([p[0] for p in pairs[:5]])])
    built = checkpoint.build_model(saved, "reference")
    written = greedy(built, source, lengths)
    target, _ = pad([[BOS, *row] for row in written])
    likeliest = built(source, lengths, target).argmax(-1)
    for row, predicted in zip(written, likeliest.tolist(), strict=True):
        assert predicted[: len(row)] == row


def test_configurations():
    small = PRESETS["small"]
    gru = preset_config(small, "gru", {"vocab_size": 300, "d_model": 64})
    assert gru == RecurrentConfig("gru", 300, 3, 3, 64, 0.3)
    assert isinstance(preset_config(small, "transformer", {"vocab_size": 300}), ModelConfig)
    for arch, values, message in (
        ("tree", {}, "arch: expected one of transformer, rnn, lstm, gru, got 'tree'"),
        ("gru", {"heads": 4}, "unknown setting 'heads' for RecurrentConfig"),
        ("gru", {"d_model": 7}, "d_model: expected an even number (two directions), got 7"),
        ("gru", {"batch_first": 1}, "batch_first: expected true or false, got 1"),
    ):
        with pytest.raises(ConfigError) as raised:
            model_config(arch, {"vocab_size": 300, **values})
        assert str(raised.value) == message
