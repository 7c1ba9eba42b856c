"""The loss, the schedule, a training step, and the loop."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch

from rowmax.kernels.backends import dispatch
from rowmax.transformer import (
    CheckpointError,
    ConfigError,
    Dataset,
    EncoderDecoder,
    ModelConfig,
    Tokenizer,
    Trainer,
    TrainingConfig,
    TrainingError,
    corpus,
    fit,
    translate,
)
from rowmax.transformer import checkpoint as checkpoints
from rowmax.transformer.tokenizer import PAD
from rowmax.transformer.training import schedule, step_seed

PAIRS = [pair for pair in corpus.generate(400) if len(pair.english) < 40][:60]
TOKENIZER = Tokenizer.train((side for pair in PAIRS for side in pair), 400)
SETTINGS = TrainingConfig(steps=12, warmup=10, batch_tokens=150, seed=3)


def new_trainer(
    backend: str = "reference",
    dropout: float = 0.1,
    pairs=PAIRS,
    pre_norm: bool = False,
    **changes: Any,
) -> Trainer:
    config = dataclasses.replace(SETTINGS, **changes)
    torch.manual_seed(config.seed)
    model = ModelConfig(
        *(TOKENIZER.vocab_size, 1, 1),
        d_model=32,
        heads=2,
        d_ff=64,
        dropout=dropout,
        max_length=40,
        pre_norm=pre_norm,
    )
    return Trainer(EncoderDecoder(model, backend), Dataset(pairs, TOKENIZER, 40), config)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("packed", [True, False])
def test_label_smoothing_is_the_kl_divergence_up_to_a_constant(packed, smoothing):
    trainer = new_trainer(dropout=0.0)
    model, dataset = trainer.model.double(), trainer.dataset
    padded = dataset.batch([3, 0, 9])
    real = padded.target_out != PAD
    logits = model(padded.source, padded.source_lengths, padded.target_in)[real]
    target, vocabulary = padded.target_out[real], logits.shape[1]
    wanted = torch.full((len(target), vocabulary), smoothing / vocabulary, dtype=torch.float64)
    wanted.scatter_add_(1, target[:, None], torch.full((len(target), 1), 1 - smoothing).double())
    entropy = -torch.special.xlogy(wanted, wanted).sum(-1).mean()
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
    loss = model.loss(dataset.packed_batch([3, 0, 9]) if packed else padded, smoothing)
    torch.testing.assert_close(loss, divergence + entropy)
    leaves = tuple(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(divergence, leaves)
    )


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("backend", ["reference", "numba", "native"])
def test_packed_steps_are_padded_ones(backend, pre_norm):
    """The same losses and weights to rounding, for as long as nothing is dropped."""
    if dispatch.unavailable(backend):
        pytest.skip(f"{backend} does not work here")
    runs = []
    for padded in (True, False):
        trainer = new_trainer(backend, dropout=0.0, padded=padded, pre_norm=pre_norm)
        trainer.model.double()
        losses = [trainer.step().loss for _ in range(4)]
        runs.append((torch.tensor([*losses, trainer.validate(trainer.dataset)]), weights(trainer)))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


def test_a_sentence_beyond_the_positions_is_refused_packed():
    trainer = new_trainer()
    batch = trainer.dataset.packed_batch([0])
    trainer.model.embedding.max_length = batch.source_packing.longest - 1
    with pytest.raises(ValueError, match="max_length is"):
        trainer.model.loss(batch, 0.0)


@pytest.mark.parametrize("padded", [True, False])
def test_bfloat16_products_with_float32_weights(padded):
    """Near the losses of float32 and, over forty steps, as low."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = new_trainer("native", dropout=0.0, padded=padded, precision=precision)
        losses[precision] = [trainer.step().loss for _ in range(40)]
        assert all(weight.dtype == torch.float32 for weight in weights(trainer))
        assert all(state.dtype == torch.float32 for state in trainer.optimizer_tensors().values())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"][0] == pytest.approx(losses["float32"][0], rel=0.02)
    assert sum(losses["bfloat16"][-5:]) == pytest.approx(sum(losses["float32"][-5:]), rel=0.1)


@pytest.mark.parametrize("padded", [True, False])
def test_accumulated_batches_are_one_large_batch(padded):
    """The mean is over all their tokens, however they are divided."""
    trainer = new_trainer(dropout=0.0, accumulate=3, clip=1e6, padded=padded)
    trainer.model.double()
    model, plan = trainer.model, trainer.dataset.plan(SETTINGS.batch_tokens, SETTINGS.seed, 0)[:3]
    whole = trainer.dataset.batch([index for indices in plan for index in indices])
    model.loss(whole, SETTINGS.label_smoothing).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    result = trainer.step()
    assert result.tokens == whole.tokens
    assert trainer.position == 3
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_schedule():
    """Equation 3: highest at the end of the warm-up, then falling as 1 / sqrt(step)."""
    rates = [schedule(step, d_model=512, warmup=4000) for step in range(1, 16_001)]
    assert max(rates) == rates[3_999] == pytest.approx(512**-0.5 * 4000**-0.5)
    assert rates[0] == pytest.approx(rates[3_999] / 4000)
    assert rates[1_999] == pytest.approx(rates[3_999] / 2)
    assert rates[15_999] == pytest.approx(rates[3_999] / 2)
    assert schedule(7, 512, 4000, factor=3.0) == pytest.approx(3 * rates[6])


def test_step_seeds_differ():
    seeds = {step_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2_500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_optimiser_follows_the_schedule():
    trainer = new_trainer()
    for step in range(1, 4):
        trainer.step()
        expected = schedule(step, 32, SETTINGS.warmup)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [expected]
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.98)
    assert trainer.optimizer.defaults["eps"] == 1e-9


def test_gradients_are_clipped():
    trainer = new_trainer(clip=1e-3)
    trainer.step()
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_learns_a_few_sentences_by_heart():
    few = PAIRS[:8]
    settings: dict[str, Any] = {
        "warmup": 40,
        "learning_rate": 0.5,
        "batch_tokens": 400,
        "label_smoothing": 0.0,
    }
    trainer = new_trainer(dropout=0.0, pairs=few, **settings)
    first = trainer.step().loss
    for _ in range(99):
        last = trainer.step().loss
    assert first > 5
    assert last < 0.1
    outputs = translate(trainer.model, TOKENIZER, [pair.korean for pair in few])
    assert outputs == [pair.english for pair in few]


def test_a_step_follows_from_seed_and_step_alone():
    """Whatever others draw from torch's generator in between."""
    first, second = new_trainer(), new_trainer()
    for _ in range(4):
        first.step()
        torch.rand(17)
        second.step()
    assert all(map(torch.equal, weights(first), weights(second)))
    other = new_trainer(seed=4)
    other.model.load_state_dict(new_trainer().model.state_dict())
    other.step()
    assert not torch.equal(weights(other)[0], weights(new_trainer())[0])


def test_each_step_has_dropout_masks_of_its_own():
    trainer = new_trainer()
    for step in (1, 2, 3):
        trainer.step()
        assert torch.initial_seed() == step_seed(SETTINGS.seed, step)


def test_every_pair_is_used_once_an_epoch():
    trainer = new_trainer()
    batches = len(trainer.dataset.plan(SETTINGS.batch_tokens, SETTINGS.seed, 0))
    for _ in range(batches):
        trainer.step()
    assert (trainer.epoch, trainer.position) == (0, batches)
    trainer.step()
    assert (trainer.epoch, trainer.position) == (1, 1)


def test_backends_train_alike():
    losses = []
    for backend in ("reference", "auto"):
        trainer = new_trainer(backend)
        losses.append([trainer.step().loss for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_not_finite():
    trainer = new_trainer()
    trainer.step()
    before = weights(trainer)
    with torch.no_grad():
        model: Any = trainer.model
        model.decoder[0].feed_forward.w_2.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        trainer.step()
    after = weights(trainer)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == 1  # the one set above


def test_validation_is_the_mean_over_tokens():
    trainer = new_trainer(dropout=0.3)
    trainer.step()  # which leaves the model in training mode
    dataset = trainer.dataset
    loss = trainer.validate(dataset)
    total = tokens = 0.0
    trainer.model.eval()
    with torch.no_grad():
        for index in range(len(dataset)):
            batch = dataset.batch([index])
            logits = trainer.model(batch.source, batch.source_lengths, batch.target_in)
            scores = logits[0].log_softmax(-1).gather(1, batch.target_out[0][:, None])
            total -= scores.sum().item()
            tokens += len(scores)
    assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_resuming_gives_the_same_weights_as_going_on(tmp_path):
    """At any step, within an epoch or at its border."""
    straight = new_trainer()
    batches = len(straight.dataset.plan(SETTINGS.batch_tokens, SETTINGS.seed, 0))
    assert batches < 11  # so that an epoch ends on the way
    for _ in range(12):
        straight.step()
    for cut in sorted({1, batches, batches + 1, 11}):
        first = new_trainer()
        for _ in range(cut):
            first.step()
        path = first.save(tmp_path / str(cut), TOKENIZER)
        second = new_trainer()
        second.restore(checkpoints.load(path))
        while second.steps_done < 12:
            second.step()
        assert all(map(torch.equal, weights(second), weights(straight)))


def test_fit_validates_saves_and_shows_progress(tmp_path):
    trainer = new_trainer()
    stream = io.StringIO()
    throughput = fit(
        trainer, TOKENIZER, tmp_path, trainer.dataset, save_every=5, keep=2, stream=stream
    )
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-00000010",
        "checkpoint-00000012",
    ]
    shown = stream.getvalue()
    for step in (5, 10, 12):
        assert f"step {step}: training loss" in shown
    assert "validation loss" in shown
    assert "12/12" in shown
    assert "tokens/s" in shown
    assert float(throughput) > 0


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("accumulate", [4, 7])
def test_accumulated_training_goes_on_where_it_stood(accumulate, padded, tmp_path):
    """Beyond the batches of an epoch, and over more epochs than steps."""
    changes = {"accumulate": accumulate, "padded": padded, "batch_tokens": 300}
    straight, first, second = (new_trainer(**changes) for _ in range(3))
    for _ in range(9):
        straight.step()
    for _ in range(5):
        first.step()
    path = first.save(tmp_path, TOKENIZER)
    second.restore(checkpoints.load(path))
    for _ in range(4):
        second.step()
    assert all(map(torch.equal, weights(straight), weights(second)))


def test_resuming_with_other_data(tmp_path):
    trainer = new_trainer()
    trainer.step()
    path = trainer.save(tmp_path, TOKENIZER)
    other = Trainer(trainer.model, Dataset(PAIRS[1:], TOKENIZER, 40), SETTINGS)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        other.restore(checkpoints.load(path))


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"steps": 0}, "steps: expected a positive integer, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"clip": float("nan")}, "clip: expected a positive number, got nan"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= value < 1"),
        ({"seed": -1}, "seed: expected an integer from 0"),
        ({"padded": 1}, "padded: expected true or false, got 1"),
        ({"accumulate": 0}, "accumulate: expected a positive integer, got 0"),
        ({"precision": "half"}, "precision: expected one of float32, bfloat16, got"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**setting)
