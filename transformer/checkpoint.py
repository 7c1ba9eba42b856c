"""Checkpoints: directories that are whole or not there, and that nothing is unpickled from.

A run's directory holds ``checkpoint-00001000`` and so on, each with

    checkpoint.json        format, and the size and SHA-256 of every other file
    model.json             the architecture and its ModelConfig or RecurrentConfig
    model.safetensors      the weights
    optimizer.safetensors  Adam's moments and step counts
    training.json          TrainingConfig and where training stood
    tokenizer.json         the vocabulary, as the tokenizers library writes it

A checkpoint is written to a temporary directory beside its place, flushed to the disk, and
renamed. So a kill or a full disk at any moment leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .architectures import new_model
from .config import AnyModelConfig, ConfigError, ModelConfig, model_config
from .interface import TranslationModel
from .tokenizer import Tokenizer

FORMAT, VERSION = "rowmax.transformer checkpoint", 1
_MANIFEST = "checkpoint.json"
_PREFIX, _TEMPORARY = "checkpoint-", ".incomplete-"


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, foreign, or could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds. ``training`` is the JSON object that the trainer wrote."""

    path: Path
    model: AnyModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    training: dict[str, Any]
    tokenizer: Tokenizer


def save(
    run: Path,
    step: int,
    model: TranslationModel,
    tokenizer: Tokenizer,
    optimizer: Mapping[str, Tensor],
    training: Mapping[str, Any],
    keep: int = 5,
) -> Path:
    """Write the checkpoint of this step, then remove all but the newest ``keep``."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    files = {
        "model.json": _to_json({"arch": model.config.arch, **dataclasses.asdict(model.config)}),
        "model.safetensors": _to_safetensors(weights),
        "optimizer.safetensors": _to_safetensors(optimizer),
        "training.json": _to_json(training),
        "tokenizer.json": tokenizer.to_json().encode(),
    }
    path = run / f"{_PREFIX}{step:08}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        _write_directory(path, files)
        for old in checkpoints(run)[:-keep]:
            _remove(old)
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be saved: {error.strerror or error}; earlier checkpoints are untouched"
        ) from error
    return path


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    names = sorted(
        (path for path in run.iterdir() if path.name[len(_PREFIX) :].isdecimal()),
        key=lambda path: int(path.name[len(_PREFIX) :]),
    )
    return [path for path in names if path.name.startswith(_PREFIX)]


def newest(location: Path) -> Path:
    """The checkpoint at this path, or the newest one of the run at this path."""
    if (location / _MANIFEST).exists() or location.name.startswith(_PREFIX):
        return location
    found = checkpoints(location)
    if not found:
        what = "no checkpoint in this directory" if location.is_dir() else "no such directory"
        raise CheckpointError(f"{location}: {what}")
    return found[-1]


def remove_all(run: Path) -> None:
    """Remove every checkpoint of a run, the newest last."""
    for path in checkpoints(run):
        _remove(path)


def load(path: Path) -> Checkpoint:
    """Read and check one checkpoint."""
    files = _read_directory(path)
    try:
        settings = _object(files["model.json"])
        # Before there was a choice, nothing was written of it.
        model = model_config(settings.pop("arch", ModelConfig.arch), settings)
        training = _object(files["training.json"])
        weights = safetensors.torch.load(files["model.safetensors"])
        optimizer = safetensors.torch.load(files["optimizer.safetensors"])
        tokenizer = Tokenizer.from_json(files["tokenizer.json"].decode())
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from error
    except (ConfigError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(path, model, weights, optimizer, training, tokenizer)


def load_average(location: Path, count: int = 1) -> Checkpoint:
    """The newest checkpoint with the mean of the newest ``count`` checkpoints' weights.

    The paper averages the last 5 (section 6.1).
    """
    path = newest(location)
    checkpoint = load(path)
    siblings = [other for other in checkpoints(path.parent) if other.name <= path.name]
    if count > len(siblings):
        raise CheckpointError(
            f"{location}: the mean of {count} checkpoints was asked for, but there are only "
            f"{len(siblings)}"
        )
    if count == 1:
        return checkpoint
    others = [load(other) for other in siblings[-count:-1]]
    for other in others:
        if other.model != checkpoint.model:
            raise CheckpointError(f"{other.path}: holds another model than {path}")
    mean = {
        name: torch.stack([each.weights[name] for each in (*others, checkpoint)]).mean(0)
        for name in checkpoint.weights
    }
    return dataclasses.replace(checkpoint, weights=mean)


def build_model(checkpoint: Checkpoint, backend: str = "auto") -> TranslationModel:
    """A model with the checkpoint's weights."""
    model = new_model(checkpoint.model, backend)
    copy_tensors(checkpoint.weights, dict(model.named_parameters()), checkpoint.path)
    return model


@torch.no_grad()
def copy_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors of the same names, shapes and types into those of ``wanted``."""
    for name in wanted:
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name!r} is missing")
    for name, tensor in found.items():
        if name not in wanted:
            raise CheckpointError(f"{where}: tensor {name!r} is not part of this model")
        expected = wanted[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {expected.dtype} of shape {tuple(expected.shape)}"
            )
        expected.copy_(tensor)


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the run's directory for one training process, and clear what a killed one left."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{run}: can't be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{run}: another process is training in it") from error
        for leftover in run.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        yield
    finally:
        os.close(descriptor)


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.cpu() for name, tensor in tensors.items()})


def _object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the files and their manifest as one directory that appears all at once."""
    digests = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    manifest = _to_json({"format": FORMAT, "version": VERSION, "files": digests})
    temporary = path.parent / f"{_TEMPORARY}{path.name}"
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir()
        for name, content in {**files, _MANIFEST: manifest}.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _flush_directory(temporary)
        temporary.rename(path)
        _flush_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed halfway, it is no longer one that looks complete."""
    doomed = path.parent / f"{_TEMPORARY}old-{path.name}"
    path.rename(doomed)
    shutil.rmtree(doomed)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_directory(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each as its manifest describes it."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if not (path / _MANIFEST).is_file():
        raise CheckpointError(f"{path}: not a checkpoint of rowmax.transformer (no {_MANIFEST})")
    try:
        manifest = _object((path / _MANIFEST).read_bytes())
        kind, version = manifest.get("format"), manifest.get("version")
        if kind != FORMAT:
            raise CheckpointError(
                f"{path}: not a checkpoint of rowmax.transformer (its format is {kind!r})"
            )
        if version != VERSION:
            raise CheckpointError(
                f"{path}: checkpoint version {version!r}; this rowmax reads version {VERSION}"
            )
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {_MANIFEST} is damaged: {error}") from error
    files = {}
    for name, digest in digests.items():
        # The name is from the file: it must not lead out of the directory.
        if Path(name).name != name:
            raise CheckpointError(f"{path}: {_MANIFEST} is damaged: file name {name!r}")
        try:
            files[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {name} can't be read: {error.strerror}") from error
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs)")
    return files
