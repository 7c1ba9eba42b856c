"""Training: the loss, the paper's schedule, one step, and the loop around it.

Everything that a step does follows from the weights, Adam's moments and (seed, step): the batch
by ``Dataset.plan(seed, epoch)``, the dropout masks by the generator's seed, set anew for each
step. A checkpoint therefore needs no generator's state, and a run that was killed and resumed
computes bitwise what an uninterrupted one does.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, CheckpointError
from .config import MAX_STEPS, TrainingConfig
from .data import Batch, Dataset
from .interface import TranslationModel
from .packing import PackedBatch
from .progress import progress_on
from .tokenizer import Tokenizer


class TrainingError(Exception):
    """Training that can't go on."""


def schedule(step: int, d_model: int, warmup: int, factor: float = 1.0) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then 1 / sqrt(step) (section 5.3)."""
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def step_seed(seed: int, step: int) -> int:
    """A seed for the dropout masks of one step, unrelated to those of other seeds and steps."""
    high, low = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32).tolist()
    return (high << 32 | low) >> 1


@dataclass(frozen=True)
class StepResult:
    """``loss`` is the mean over the batch; ``tokens`` counts both sides without padding."""

    loss: float
    tokens: int


class Trainer:
    """A model, its optimiser and the place in the data."""

    def __init__(self, model: TranslationModel, dataset: Dataset, config: TrainingConfig) -> None:
        try:
            model.probe()
        except RuntimeError as error:
            raise TrainingError(str(error)) from error
        self.model = model
        self.dataset = dataset
        self.config = config
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(
            model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True
        )
        self.steps_done = 0
        self.epoch = 0
        self.position = 0  # batches done in this epoch
        self._plan = dataset.plan(config.batch_tokens, config.seed, self.epoch)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        config = self.config
        return schedule(
            self.steps_done + 1, self.model.config.d_model, config.warmup, config.learning_rate
        )

    def step(self) -> StepResult:
        """One batch, or as many as are accumulated, forward and backward, and one update."""
        config = self.config
        batches = [self._next_batch() for _ in range(config.accumulate)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.steps_done += 1

        torch.manual_seed(step_seed(config.seed, self.steps_done))
        self.model.train()
        self.optimizer.zero_grad()
        target_tokens = sum(batch.target_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            share = batch.target_tokens / target_tokens
            with self._autocast():
                loss = self.model.loss(batch, config.label_smoothing) * share
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        result = StepResult(total, sum(batch.tokens for batch in batches))
        if not (math.isfinite(result.loss) and math.isfinite(norm.item())):
            raise TrainingError(
                f"step {self.steps_done}: loss {result.loss}, gradient norm {norm.item()}; this "
                "step is not taken. A lower --learning-rate or a longer --warmup may help"
            )
        self.optimizer.step()
        return result

    def _autocast(self) -> torch.autocast:
        narrow = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=narrow)

    def _next_batch(self) -> Batch | PackedBatch:
        if self.position == len(self._plan):
            self.epoch, self.position = self.epoch + 1, 0
            self._plan = self.dataset.plan(self.config.batch_tokens, self.config.seed, self.epoch)
        self.position += 1
        return self._batch(self.dataset, self._plan[self.position - 1])

    def _batch(self, dataset: Dataset, indices: np.ndarray) -> Batch | PackedBatch:
        """These pairs on the model's device, packed unless padding is asked for."""
        if self.model.takes_packed and not self.config.padded:
            return dataset.packed_batch(indices).to(self.device)
        return dataset.batch(indices).to(self.device)

    def require_finite(self) -> None:
        """TrainingError where a weight or a moment is not: no model nor resumed run takes that."""
        tensors = {**dict(self.model.named_parameters()), **self.optimizer_tensors()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"step {self.steps_done}: {name} is no longer finite, and nothing is "
                    "saved. A lower --learning-rate or a longer --warmup may help"
                )

    @torch.inference_mode()
    def validate(self, dataset: Dataset) -> float:
        """Mean cross entropy for each target token, without smoothing or dropout."""
        self.model.eval()
        total, tokens = 0.0, 0
        for indices in dataset.plan(self.config.batch_tokens):
            batch = self._batch(dataset, indices)
            total += self.model.loss(batch, 0.0, "sum").item()
            tokens += batch.target_tokens
        return total / tokens

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Adam's state, each tensor under its parameter's name."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint's training.json holds."""
        return {
            "training": dataclasses.asdict(self.config),
            "data": self.dataset.fingerprint(),
            "step": self.steps_done,
            "epoch": self.epoch,
            "position": self.position,
        }

    def restore(self, saved: Checkpoint) -> None:
        """Go on where the checkpoint was written."""
        state = saved.training
        if state.get("data") != self.dataset.fingerprint():
            raise CheckpointError(
                f"{saved.path}: was trained on other data, or on these with another tokenizer or "
                "length limit; resume with the same files and settings"
            )
        step: Any = state.get("step")
        epoch: Any = state.get("epoch")
        position: Any = state.get("position")
        plan: list[np.ndarray] = []
        batches = step * self.config.accumulate if _is_count(step, MAX_STEPS) else 0
        if _is_count(step, MAX_STEPS) and _is_count(epoch, batches):
            plan = self.dataset.plan(self.config.batch_tokens, self.config.seed, epoch)
        if not plan or not _is_count(position, min(batches, len(plan))):
            raise CheckpointError(
                f"{saved.path}: training.json is damaged: step {step}, epoch {epoch}, batch "
                f"{position} is no place in this training"
            )
        checkpoints.copy_tensors(saved.weights, dict(self.model.named_parameters()), saved.path)
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        checkpoints.copy_tensors(saved.optimizer, self.optimizer_tensors(), saved.path)
        self.steps_done, self.epoch, self.position = step, epoch, position
        self._plan = plan


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


class Throughput:
    """Tokens a second over the training steps alone: validation and saving don't count."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def __float__(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    trainer: Trainer,
    tokenizer: Tokenizer,
    run: Path,
    validation: Dataset | None = None,
    save_every: int = 500,
    keep: int = 5,
    extra: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Throughput:
    """Train to the configured number of steps, with its progress on ``stream`` (stderr).

    Validates and writes a checkpoint every ``save_every`` steps and at the end, of what is finite
    alone. ``extra`` is put into the checkpoints' training.json.
    """
    stream = sys.stderr if stream is None else stream
    config = trainer.config
    throughput = Throughput()
    loss = math.nan
    with progress_on(stream, "training", "step", config.steps, trainer.steps_done) as bar:
        while trainer.steps_done < config.steps:
            rate = trainer.learning_rate
            start = time.perf_counter()
            result = trainer.step()
            throughput.add(result.tokens, time.perf_counter() - start)
            loss = result.loss if math.isnan(loss) else 0.95 * loss + 0.05 * result.loss
            bar.set_postfix_str(
                f"loss {loss:.3f}, {float(throughput):,.0f} tokens/s, lr {rate:.1e}",
                refresh=False,
            )
            bar.update()
            if trainer.steps_done % save_every == 0 or trainer.steps_done == config.steps:
                trainer.require_finite()
                if validation is not None:
                    bar.write(
                        f"step {trainer.steps_done}: training loss {loss:.4f}, validation loss "
                        f"{trainer.validate(validation):.4f}",
                        file=stream,
                    )
                checkpoints.save(
                    run,
                    trainer.steps_done,
                    trainer.model,
                    tokenizer,
                    trainer.optimizer_tensors(),
                    {**trainer.state(), **(extra or {})},
                    keep,
                )
    return throughput
