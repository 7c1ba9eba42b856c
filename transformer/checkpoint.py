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

The run's directory may hold more than checkpoints of rowmax, and other programs call theirs alike.
What is no real directory with a manifest of this format is never removed, nor taken for a
checkpoint, whatever its name; where it has the name of a checkpoint that is to be saved, that gets
one more zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import from_extra
from .architectures import new_model
from .config import AnyModelConfig, ConfigError, ModelConfig, model_config
from .interface import TranslationModel
from .tokenizer import Tokenizer

FORMAT, VERSION = "rowmax.transformer checkpoint", 1
_MANIFEST, _WHOLE = "checkpoint.json", "checkpoint.json.whole"
_PREFIX, _TEMPORARY = "checkpoint-", ".incomplete-"
_BEGUN = re.compile(rf"{re.escape(_TEMPORARY)}((old-)?{_PREFIX}\d+|probe)(-\d+)?")
_DIGITS = 8
# Bytes of a file that is read whole: of JSON, and of safetensors beyond the tensors themselves.
_MAX_JSON, _MAX_HEADER = 2**26, 2**22


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
    path = _place(run, step)
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
    """The complete checkpoints of a run, oldest first; those with damage inside among them."""
    if not run.is_dir():
        return []
    found = ((_step_of(path), len(path.name), path) for path in run.iterdir())
    return [path for step, _, path in sorted(found) if step >= 0 and _is_ours(path)]


def newest(location: Path) -> Path:
    """The checkpoint at this path, or the newest one of the run at this path."""
    if _has_manifest(location):
        return location
    found = checkpoints(location)
    if not found:
        if (location / _MANIFEST).exists():
            _manifest(location)  # says what it is instead
        what = "no checkpoint in this directory" if location.is_dir() else "no such directory"
        raise CheckpointError(f"{location}: {what}")
    return found[-1]


def folders(location: Path) -> list[Path]:
    """The directories that are read for the model at this path."""
    return checkpoints(location) or [location]


def remove_all(run: Path) -> None:
    """Remove every checkpoint of a run, the newest last."""
    for path in checkpoints(run):
        _remove(path)


def load(path: Path) -> Checkpoint:
    """Read and check one checkpoint."""
    with from_extra("transformer"):
        from safetensors import SafetensorError
    digests = _manifest(path)

    def content(name: str, limit: int = _MAX_JSON) -> bytes:
        if name not in digests:
            raise CheckpointError(f"{path}: {name} is missing")
        return _read(path, name, digests[name], limit)

    try:
        settings = _object(content("model.json"))
        # Before there was a choice, nothing was written of it.
        model = model_config(settings.pop("arch", ModelConfig.arch), settings)
        expected = _parameters(model)
        size = sum(tensor.nbytes for tensor in expected.values())
        training = _object(content("training.json"))
        tokenizer = Tokenizer.from_json(content("tokenizer.json").decode())
        if tokenizer.largest_id >= model.vocab_size:
            raise CheckpointError(
                f"{path}: tokenizer.json has the token {tokenizer.largest_id}, beyond the model's "
                f"vocabulary of {model.vocab_size}"
            )
        # Files as large as the model's own tensors, and Adam's two moments of each.
        weights = _tensors(content("model.safetensors", size + _MAX_HEADER))
        check_tensors(weights, expected, path)
        moments = content("optimizer.safetensors", 2 * size + _MAX_HEADER)
        optimizer = _tensors(moments)
    except (ConfigError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(path, model, weights, optimizer, training, tokenizer)


def load_average(location: Path, count: int = 1) -> Checkpoint:
    """The newest checkpoint with the mean of the newest ``count`` checkpoints' weights.

    The paper averages the last 5 (section 6.1).
    """
    path = newest(location)
    checkpoint = load(path)
    if count == 1:
        return checkpoint
    step = _step_of(path)
    earlier = [other for other in checkpoints(path.parent) if _step_of(other) < step]
    if count > len(earlier) + 1:
        raise CheckpointError(
            f"{location}: the mean of {count} checkpoints was asked for, but there are only "
            f"{len(earlier) + 1}"
        )
    others = [load(other) for other in earlier[1 - count :]]
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
    check_tensors(found, wanted, where)
    for name, tensor in found.items():
        wanted[name].copy_(tensor)


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: Path) -> None:
    """CheckpointError unless these are finite and of the names, shapes and types of ``wanted``."""
    for name in wanted:
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name!r} is missing")
    for name in sorted(found):  # a file's own order differs from reading to reading
        if name not in wanted:
            raise CheckpointError(f"{where}: tensor {name!r} is not part of this model")
    for name, expected in wanted.items():
        tensor = found[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {expected.dtype} of shape {tuple(expected.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinity")


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
            # Whether it can be written to: found out now, not at the first save.
            probe = _free(run / f"{_TEMPORARY}probe")
            probe.mkdir()
            probe.rmdir()
        except BlockingIOError as error:
            raise CheckpointError(f"{run}: another process is training in it") from error
        except OSError as error:
            raise CheckpointError(f"{run}: can't be used: {error.strerror}") from error
        for leftover in run.glob(f"{_TEMPORARY}*"):
            if _is_ours(leftover):
                _discard(leftover)
            elif _is_begun(leftover):
                (leftover / _MANIFEST).unlink(missing_ok=True)
                leftover.rmdir()
        yield
    finally:
        os.close(descriptor)


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    with from_extra("transformer"):
        import safetensors.torch
    return safetensors.torch.save({name: tensor.cpu() for name, tensor in tensors.items()})


def _tensors(content: bytes) -> dict[str, Tensor]:
    with from_extra("transformer"):
        import safetensors.torch
    try:
        return safetensors.torch.load(content)
    except KeyError as error:  # of a type that the library knows and torch does not
        raise ValueError(f"tensors of type {error}") from error


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _parameters(config: AnyModelConfig) -> dict[str, Tensor]:
    """The model's parameters by name, without memory."""
    with torch.device("meta"):
        return dict(new_model(config).named_parameters())


def _step_of(path: Path) -> int:
    """The step that a checkpoint's name says, -1 where it is no such name."""
    digits = path.name.removeprefix(_PREFIX)
    named = path.name.startswith(_PREFIX) and digits.isascii() and digits.isdecimal()
    return int(digits) if named else -1


def _is_ours(path: Path) -> bool:
    """Whether this is a directory, no link to one, with rowmax's manifest."""
    return not path.is_symlink() and _has_manifest(path)


def _has_manifest(path: Path) -> bool:
    manifest = path / _MANIFEST
    try:
        return manifest.is_file() and (
            _object(_limited(manifest, _MAX_JSON)).get("format") == FORMAT
        )
    except (OSError, ValueError):
        return False


def _is_begun(path: Path) -> bool:
    """Whether this is a directory of a name that is given here, with nothing in it but, at most, an
    empty manifest: what a kill leaves between the first steps of a save and the last ones of a
    removal."""
    if not _BEGUN.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return all(each.name == _MANIFEST and not each.stat().st_size for each in path.iterdir())


def _place(run: Path, step: int) -> Path:
    """Where the checkpoint of this step goes: a name that nothing has yet."""
    names = (run / f"{_PREFIX}{step:0{digits}}" for digits in itertools.count(_DIGITS))
    return next(path for path in names if not os.path.lexists(path))


def _free(path: Path) -> Path:
    """This path, or where something has its name, one with a number."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(each for each in itertools.chain((path,), names) if not os.path.lexists(each))


def _write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the files and their manifest as one directory that appears all at once."""
    digests = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    manifest = {"format": FORMAT, "version": VERSION, "files": digests}
    temporary = _free(path.parent / f"{_TEMPORARY}{path.name}")
    temporary.mkdir()
    try:
        # Killed from here on, it is known for rowmax's own.
        (temporary / _MANIFEST).write_bytes(_to_json({**manifest, "files": {}}))
        for name, content in {**files, _WHOLE: _to_json(manifest)}.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        (temporary / _WHOLE).replace(temporary / _MANIFEST)
        _flush_directory(temporary)
        temporary.rename(path)
        _flush_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed halfway, it is no longer one that looks complete."""
    doomed = _free(path.parent / f"{_TEMPORARY}old-{path.name}")
    path.rename(doomed)
    _discard(doomed)


def _discard(path: Path) -> None:
    """Remove a directory of rowmax's; its manifest last, by which it is known after a kill."""
    for each in path.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != _MANIFEST:
            each.unlink()
    (path / _MANIFEST).unlink()
    path.rmdir()


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest(path: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if not (path / _MANIFEST).is_file():
        raise CheckpointError(f"{path}: not a checkpoint of rowmax.transformer (no {_MANIFEST})")
    try:
        manifest = _object(_limited(path / _MANIFEST, _MAX_JSON))
        kind, version = manifest.get("format"), manifest.get("version")
        if kind != FORMAT:
            raise CheckpointError(
                f"{path}: not a checkpoint of rowmax.transformer (its format is {kind!r})"
            )
        if version != VERSION:
            raise CheckpointError(
                f"{path}: checkpoint version {version!r}; this rowmax reads version {VERSION}"
            )
        digests = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {_MANIFEST} is damaged: {error}") from error
    for name in digests:
        # The name is from the file: it must not lead out of the directory.
        if Path(name).name != name:
            raise CheckpointError(f"{path}: {_MANIFEST} is damaged: file name {name!r}")
    return digests


def _read(path: Path, name: str, digest: str, limit: int) -> bytes:
    """A file of a checkpoint, as its manifest describes it."""
    try:
        content = _limited(path / name, limit)
    except OSError as error:
        raise CheckpointError(f"{path}: {name} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} {error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs)")
    return content


def _limited(file: Path, limit: int) -> bytes:
    """The file's content; ValueError, and nothing read, where it is no file or a larger one."""
    if file.exists() and not file.is_file():
        raise ValueError("is no regular file")
    size = file.stat().st_size
    if size > limit:
        raise ValueError(f"is damaged: it has {size:,} bytes, expected at most {limit:,}")
    return file.read_bytes()
