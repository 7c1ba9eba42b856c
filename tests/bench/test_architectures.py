"""`rowmax.bench model`: sizes, sequential steps, a whole small run, and calls that are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from rowmax.bench import cli
from rowmax.bench.experiments import model_runs
from rowmax.bench.experiments.architectures import RESULTS
from rowmax.bench.experiments.model_runs import (
    demo_config,
    matched,
    parameters_of,
    sequential_steps,
)
from rowmax.bench.options import UsageError
from rowmax.transformer import (
    PRESETS,
    ModelConfig,
    RecurrentConfig,
    TrainingConfig,
    TrainingError,
    corpus,
    new_model,
)
from rowmax.transformer.config import RECURRENT, Preset


@pytest.mark.parametrize("arch", RECURRENT)
def test_about_equal_parameters(arch):
    """The nearest width: two units narrower or wider are farther off."""
    like = demo_config(64)
    wanted = parameters_of(like)
    config = matched(arch, like)
    real = sum(parameter.numel() for parameter in new_model(config, "reference").parameters())
    assert parameters_of(config) == real
    # Two units of width are about 2 % of the parameters, so the nearest is within 1 % and a bit.
    assert abs(real - wanted) < 0.02 * wanted
    for other in (config.d_model - 2, config.d_model + 2):
        wider = RecurrentConfig(arch, config.vocab_size, 2, 2, other, 0.0, 64)
        assert abs(parameters_of(wider) - wanted) >= abs(real - wanted)
    assert matched("transformer", like) is like


@torch.no_grad()
def test_sequential_steps_are_counted():
    """Calls of the layers, each of which waits for the one before."""
    source = torch.randint(3, 40, (1, 7))
    target = torch.randint(3, 40, (1, 7))
    lengths = torch.tensor([7])
    calls: list[int] = []

    def count(layers):
        return [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]

    model: Any = new_model(ModelConfig(40, 3, 2, d_model=8, heads=2, d_ff=8), "reference")
    count([*model.encoder, *model.decoder])
    model(source, lengths, target)
    assert len(calls) == sequential_steps(model.config, 7)["training"] == 5
    calls.clear()
    state = model.start(source, lengths)
    for i in range(7):
        model.decode(target[:, i : i + 1], state)
    assert len(calls) == sequential_steps(model.config, 7)["translating"] == 3 + 2 * 7

    recurrent: Any = new_model(RecurrentConfig("gru", 40, 3, 2, d_model=8), "reference")
    calls.clear()
    count([recurrent.decoder])
    recurrent(source, lengths, target)
    # Each call is one step of two layers; the encoder's three run inside one call, step by step.
    expected = 2 * len(calls) + 3 * 7
    assert sequential_steps(recurrent.config, 7) == {"training": expected, "translating": expected}


def test_a_small_run(tmp_path, monkeypatch, capsys):
    """All four architectures on both corpora, end to end."""
    pytest.importorskip("matplotlib")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "heads": 2, "d_ff": 32}
    training = {"steps": 5, "warmup": 2, "batch_tokens": 100}
    tiny = Preset(sizes | {"max_length": 128}, training, vocab_size=300, about="")
    monkeypatch.setitem(PRESETS, "demo", tiny)
    pairs = corpus.generate(60)
    monkeypatch.setattr(corpus, "splits", lambda: corpus.Splits(pairs[20:], pairs[:10], pairs[:20]))
    monkeypatch.setattr(model_runs, "STEP_TOKENS", 32)
    text = tmp_path / "text"
    text.mkdir()
    for name in ("train", "val", "test2016"):
        for side, suffix in enumerate(("de", "en")):
            lines = "".join(f"{pair[side]}\n" for pair in pairs)
            (text / f"{name}.{suffix}").write_text(lines, "utf-8")
    command = ["model", "--seeds", "2", "--steps", "2", "--test-sentences", "3"]
    command += ["--lengths", "4,8", "--backend", "reference", "--multi30k", str(text)]
    monkeypatch.setattr(
        model_runs,
        "multi30k_corpus",
        lambda folder, count, whole=model_runs.multi30k_corpus: dataclasses.replace(
            whole(folder, count), vocab_size=300
        ),
    )
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert sorted(RESULTS) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [each["name"] for each in result["corpora"]] == ["built-in", "multi30k"]
    for each in result["corpora"]:
        assert each["steps"] == 2
        assert set(each["models"]) == {"transformer", "lstm", "gru", "rnn"}
        tokens = {
            tuple(run["tokens"] for run in model["runs"]) for model in each["models"].values()
        }
        assert len(tokens) == 1  # the same batches for all
        assert all(len(model["runs"]) == 2 for model in each["models"].values())
        own = 0.5 if each["name"] == "multi30k" else TrainingConfig().learning_rate
        for model in each["models"].values():
            assert math.log2(model["learning_rate"] / own).is_integer()
    assert all(len(times) == 2 for times in result["step_ms"].values())
    written = (tmp_path / "out" / "comparison.txt").read_text()
    assert written in shown
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_steps_follow_from_minutes(monkeypatch):
    """Three quarters of the time, shared by architectures, seeds and pilots: 3 + 5 / 4 runs."""
    monkeypatch.setattr(model_runs, "_seconds_a_step", lambda *_: 0.5)
    monkeypatch.setattr(model_runs, "_best_rate", lambda *_: (0.25, {}))
    seen = []

    def train(config, dataset, training, *_):
        assert training.learning_rate == 0.25
        seen.append(training.steps)
        return {"bleu": 0, "exact_match": 0, "tokens": 1, "seconds": 1, "tokens_per_second": 1}

    monkeypatch.setattr(model_runs, "_train", train)
    pairs = corpus.generate(30)
    text = model_runs.Corpus(
        "x", pairs, pairs, pairs, 300, PRESETS["demo"].model, TrainingConfig(warmup=10)
    )
    messages: list[str] = []
    model_runs._corpus(text, ["transformer", "gru"], 3, None, 1200.0, "auto", messages.append)
    assert len(set(seen)) == 1
    assert 205 <= seen[0] <= 212
    assert "15 minutes" in messages[0]
    with pytest.raises(UsageError, match=r"--minutes: too few for x: time for 1\d steps"):
        model_runs._corpus(text, ["transformer", "gru"], 1, None, 40.0, "auto", messages.append)


def test_the_best_rate(monkeypatch):
    """The least held-out loss; a rate at which training fails is not chosen."""

    class Pilot:
        def __init__(self, _config, _dataset, training, _backend):
            self.training, self.steps = training, 0

        def step(self):
            self.steps += 1
            if self.rate() > 0.5:
                raise TrainingError("loss nan")

        def rate(self):
            """Of a run whose warm-up is four times as long and ends at the same rate."""
            assert self.training.warmup == 2
            return self.training.learning_rate * 2

        def validate(self, _held_out):
            assert self.steps == 10
            return self.rate()

    monkeypatch.setattr(model_runs, "_new_trainer", Pilot)
    training = TrainingConfig(steps=40, warmup=8, learning_rate=0.5)
    no_data: Any = None
    best, losses = model_runs._best_rate(demo_config(8), no_data, no_data, training, "auto")
    assert best == 0.03125
    fit = (0.03125, 0.0625, 0.125, 0.25, 0.5)
    assert losses == {rate: rate for rate in fit} | dict.fromkeys((1.0, 2.0, 4.0), math.inf)


@pytest.mark.parametrize(
    "best, found, tried",
    [
        (2.0, 2.0, (1.0, 2.0, 4.0)),
        (8.0, 8.0, (1.0, 2.0, 4.0, 8.0, 16.0)),
        (0.5, 0.5, (0.25, 0.5, 1.0, 2.0, 4.0)),
        (1000.0, 32.0, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)),
    ],
)
def test_the_search_goes_on_where_the_best_is_the_last(best, found, tried):
    rate, losses = model_runs.search([1.0, 2.0, 4.0], lambda rate: abs(rate - best))
    assert rate == found
    assert tuple(losses) == tried


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--steps", "-1"], "--steps: expected at least 1, got -1"),
        (["--minutes", "0"], "--minutes: expected a positive number, got 0"),
        (["--lengths", "8,x"], "--lengths: expected numbers like 8,16,32, got 8,x"),
        (["--lengths", "1,8"], "--lengths: expected numbers from 2 to 1024, got 1,8"),
        (["--arch", "tree"], "--arch: expected names of transformer, lstm, gru, rnn; got 'tree'"),
        (["--data", "multi30k", "--multi30k", "nowhere"], "--multi30k: nowhere is no directory"),
        (["--data", "multi30k"], "--multi30k: expected the directory of its text, got none"),
        (["--output", "/dev/null/x"], "--output: can't make /dev/null/x"),
    ],
)
def test_refused(options, message, refused):
    assert message in refused("model", *options)
