"""Training: the loss, the paper's schedule, one step, and the loop around it.

Everything that a step does follows from the weights, Adam's moments and (seed, step): the batch
by ``Dataset.plan(seed, epoch)``, the dropout masks by the generator's seed, set anew for each
step. A checkpoint therefore needs no generator's state, and a run that was killed and resumed
computes bitwise what an uninterrupted one does. Several processes take a part of every batch each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, CheckpointError
from .config import MAX_STEPS, TrainingConfig
from .data import Batch, Dataset
from .distributed import WorkerLostError, Workers
from .interface import TranslationModel
from .packing import PackedBatch
from .progress import progress_on
from .tokenizer import Tokenizer

# Tokens that each side of a packed batch of bfloat16 has a multiple of. oneDNN compiles a product
# for each number of rows and keeps a thousand of them: gigabytes, where no number comes again.
_MULTIPLE = 128


class TrainingError(Exception):
    """Training that can't go on."""


def schedule(step: int, d_model: int, warmup: int, factor: float = 1.0) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then 1 / sqrt(step) (section 5.3)."""
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one step's dropout masks, unrelated to those of other seeds, steps and ranks."""
    high, low = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32).tolist()
    return (high << 32 | low) >> 1


@dataclass(frozen=True)
class StepResult:
    """``loss`` is the mean over the batch; ``tokens`` counts both sides without padding."""

    loss: float
    tokens: int


class _Loss(nn.Module):
    """A model as DistributedDataParallel takes it: what is called is the loss."""

    def __init__(self, model: TranslationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch | PackedBatch | None, label_smoothing: float) -> Tensor:
        if batch is not None:
            return self.model.loss(batch, label_smoothing)
        # No pair of the batch is this process's: a loss of zero, on which each weight depends.
        return torch.stack([each.sum() for each in self.model.parameters()]).sum() * 0.0


class Trainer:
    """A model, its optimiser and the place in the data."""

    def __init__(
        self,
        model: TranslationModel,
        dataset: Dataset,
        config: TrainingConfig,
        workers: Workers | None = None,
    ) -> None:
        try:
            model.probe()
        except RuntimeError as error:
            raise TrainingError(str(error)) from error
        self.model = model
        self.dataset = dataset
        self.config = config
        self.workers = Workers() if workers is None else workers
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(
            model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True
        )
        self.steps_done = 0
        self.epoch = 0
        self.position = 0  # batches done in this epoch
        self._plan = self._planned(self.epoch)
        most = max(map(len, self._plan))
        if most < self.workers.count:
            raise TrainingError(
                f"{self.workers.count} processes, but no batch has more than {most} pairs: start "
                "fewer, or give a larger --batch-tokens"
            )
        self._loss = self.workers.parallel(_Loss(model))

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        config = self.config
        return schedule(
            self.steps_done + 1, self.model.config.d_model, config.warmup, config.learning_rate
        )

    def step(self) -> StepResult:
        """One batch, or as many as are accumulated, forward and backward, and one update.

        A step that raises an error leaves weights, moments and place as they were.
        """
        config, workers = self.config, self.workers
        number = self.steps_done + 1
        batches, place = self._next_batches()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

        torch.manual_seed(step_seed(config.seed, number, workers.rank))
        self.model.train()
        self.optimizer.zero_grad()
        target_tokens = self.dataset.target_tokens(np.concatenate(batches))
        total = 0.0
        for at, indices in enumerate(batches, start=1):
            part = indices[workers.part(self.dataset.tokens(indices))]
            batch = self._batch(self.dataset, part) if len(part) else None
            share = self.dataset.target_tokens(part) / target_tokens * workers.count
            with self._sums_alone(at < len(batches)), workers.told():
                with self._autocast():
                    loss = self._loss(batch, config.label_smoothing) * share
                loss.backward()
            total += loss.item() / workers.count
        (total,) = workers.sums(total)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not (math.isfinite(total) and math.isfinite(norm.item())):
            raise TrainingError(
                f"step {number}: loss {total}, gradient norm {norm.item()}; this "
                "step is not taken. A lower --learning-rate or a longer --warmup may help"
            )
        self.optimizer.step()
        self.steps_done = number
        self.epoch, self.position, self._plan = place
        return StepResult(total, int(self.dataset.tokens(np.concatenate(batches)).sum()))

    def _autocast(self) -> torch.autocast:
        narrow = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=narrow)

    def _sums_alone(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Within it gradients are summed here, and not yet over the processes."""
        if wanted and isinstance(self._loss, DistributedDataParallel):
            return self._loss.no_sync()
        return contextlib.nullcontext()

    def _planned(self, epoch: int) -> list[np.ndarray]:
        return self.dataset.plan(self.config.batch_tokens, self.config.seed, epoch)

    def _next_batches(self) -> tuple[list[np.ndarray], tuple[int, int, list[np.ndarray]]]:
        """The pairs of the next update's batches, and the epoch, position and plan after them."""
        epoch, position, plan = self.epoch, self.position, self._plan
        batches = []
        for _ in range(self.config.accumulate):
            if position == len(plan):
                epoch, position = epoch + 1, 0
                plan = self._planned(epoch)
            batches.append(plan[position])
            position += 1
        return batches, (epoch, position, plan)

    def _batch(self, dataset: Dataset, indices: np.ndarray) -> Batch | PackedBatch:
        """These pairs on the model's device, packed unless padding is asked for."""
        if self.model.takes_packed and not self.config.padded:
            multiple = _MULTIPLE if self.config.precision == "bfloat16" else 1
            return dataset.packed_batch(indices, multiple).to(self.device)
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
        plan = dataset.plan(self.config.batch_tokens)
        for indices in plan[self.workers.rank :: self.workers.count]:
            batch = self._batch(dataset, indices)
            total += self.model.loss(batch, 0.0, "sum").item()
            tokens += batch.target_tokens
        total, all_tokens = self.workers.sums(total, tokens)
        return total / all_tokens

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
            plan = self._planned(epoch)
        if not plan or not _is_count(position, min(batches, len(plan))):
            raise CheckpointError(
                f"{saved.path}: training.json is damaged: step {step}, epoch {epoch}, batch "
                f"{position} is no place in this training"
            )
        checkpoints.copy_tensors(saved.weights, dict(self.model.named_parameters()), saved.path)
        self._create_moments()
        checkpoints.copy_tensors(saved.optimizer, self.optimizer_tensors(), saved.path)
        self.steps_done, self.epoch, self.position = step, epoch, position
        self._plan = plan

    def save(self, run: Path, tokenizer: Tokenizer, keep: int = 5, **extra: Any) -> Path:
        """A checkpoint of where training stands, with ``extra`` in its training.json."""
        state, moments = {**self.state(), **extra}, self.optimizer_tensors()
        return checkpoints.save(run, self.steps_done, self.model, tokenizer, moments, state, keep)

    def _create_moments(self) -> None:
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def follow_first(self) -> None:
        """Go on where the first process does, which alone reads checkpoints."""
        if self.workers.count == 1:
            return
        place = json.dumps([self.steps_done, self.epoch, self.position])
        self.steps_done, self.epoch, self.position = json.loads(self.workers.share("place", place))
        if self.steps_done == 0:
            return
        if not self.workers.first:
            self._create_moments()
            self._plan = self._planned(self.epoch)
        self.workers.spread([*self.model.parameters(), *self.optimizer_tensors().values()])


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
    alone. ``extra`` is put into the checkpoints' training.json. Where another process of several is
    lost, the first one still writes a checkpoint of the last step that was taken.
    """
    config, workers = trainer.config, trainer.workers
    if not workers.first:
        stream = io.StringIO()
    stream = sys.stderr if stream is None else stream
    throughput = Throughput()
    loss = math.nan
    saved = trainer.steps_done

    def save() -> None:
        nonlocal saved
        if workers.first and saved < trainer.steps_done:
            trainer.save(run, tokenizer, keep, **(extra or {}))
            saved = trainer.steps_done

    with progress_on(stream, "training", "step", config.steps, trainer.steps_done) as bar:
        try:
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
                    save()
                elif workers.terminated.is_set():
                    raise WorkerLostError("ended by SIGTERM")
        except WorkerLostError:
            trainer.require_finite()
            save()
            raise
    return throughput
