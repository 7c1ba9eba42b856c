"""Checkpoints: what is saved comes back; what is damaged is told; what was there stays."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rowmax.transformer import (
    CheckpointError,
    EncoderDecoder,
    ModelConfig,
    Tokenizer,
    build_model,
    load_average,
)
from rowmax.transformer import checkpoint as checkpoints

FILES = (
    *("checkpoint.json", "model.json", "model.safetensors", "optimizer.safetensors"),
    *("training.json", "tokenizer.json"),
)


DEEP = b"[" * 100_000


def new_model(seed: int, **changes) -> EncoderDecoder:
    torch.manual_seed(seed)
    config = ModelConfig(300, 1, 1, d_model=8, heads=2, d_ff=16, max_length=20)
    return EncoderDecoder(dataclasses.replace(config, **changes), "reference")


def save(run: Path, step: int, tokenizer: Tokenizer, keep: int = 5, **changes) -> Path:
    """A checkpoint whose weights follow from its step."""
    moments = {"a.exp_avg": torch.full((3,), float(step))}
    return checkpoints.save(
        run, step, new_model(step, **changes), tokenizer, moments, {"step": step}, keep
    )


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "run", step, tokenizer)
    return tmp_path / "run"


def assert_holds(path: Path, step: int) -> None:
    saved = checkpoints.load(path)
    for name, parameter in new_model(step).named_parameters():
        assert torch.equal(saved.weights[name], parameter)


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Change a file and the manifest's account of it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256(content).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(manifest))


def refused(path: Path, message: str) -> None:
    """The checkpoint is refused with this message, at the latest when a model is built of it."""
    with pytest.raises(CheckpointError, match=message):
        build_model(checkpoints.load(path), "reference")


def test_what_is_saved_comes_back(run, tokenizer):
    path = checkpoints.newest(run)
    saved = checkpoints.load(path)
    assert path.name == "checkpoint-00000002"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert_holds(path, 2)
    assert saved.model == new_model(2).config
    assert saved.training == {"step": 2}
    assert torch.equal(saved.optimizer["a.exp_avg"], torch.full((3,), 2.0))
    assert saved.tokenizer.encode(["하나 two"]) == tokenizer.encode(["하나 two"])
    model = build_model(saved, "reference")
    assert all(map(torch.equal, model.parameters(), new_model(2).parameters()))
    assert checkpoints.newest(path) == path  # a checkpoint names itself


def test_no_leftovers(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-00000001",
        "checkpoint-00000002",
    ]


def test_keeps_the_newest(tmp_path, tokenizer):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, tokenizer, keep=2)
    assert [path.name[-2:] for path in checkpoints.checkpoints(tmp_path)] == ["10", "11"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(run, name):
    path = checkpoints.newest(run)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    refused(path, f"checkpoint-00000002: .*{name}.*damaged|missing")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_truncated_file(run, name, part):
    path = checkpoints.newest(run)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(len(content) * part)])
    refused(path, f"checkpoint-00000002: {name} is damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(run, name):
    path = checkpoints.newest(run)
    (path / name).unlink()
    refused(path, f"checkpoint-00000002: .*{name}")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"format": "theirs", "version": 1, "files": {}}, "its format is 'theirs'"),
        ({"format": checkpoints.FORMAT, "version": 99, "files": {}}, "version 99; this rowmax"),
        ({"format": checkpoints.FORMAT, "version": 1}, "checkpoint.json is damaged"),
        ({"format": checkpoints.FORMAT, "version": 1, "files": {}}, "model.json is missing"),
        (
            {"format": checkpoints.FORMAT, "version": 1, "files": {"../x": {"sha256": ""}}},
            r"checkpoint.json is damaged: file name '\.\./x'",
        ),
        ([], "checkpoint.json is damaged"),
        (DEEP, r"checkpoint\.json is damaged: .*too deeply"),
    ],
)
def test_a_foreign_manifest(run, content, message):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = checkpoints.newest(run)
    (path / "checkpoint.json").write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("embedding.weight"), "'embedding.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is not part of this model"),
        (
            lambda t: t.update({"embedding.weight": torch.zeros(8, 300)}),
            r"shape \(8, 300\), expected torch.float32 of shape \(300, 8\)",
        ),
        (
            lambda t: t.update({"embedding.weight": torch.zeros(300, 8).half()}),
            "is torch.float16 of shape",
        ),
        (
            lambda t: t["embedding.weight"][7, 3].fill_(math.nan),
            "'embedding.weight' holds NaN or inf",
        ),
        (
            lambda t: t["embedding.weight"][7, 3].fill_(math.inf),
            "'embedding.weight' holds NaN or inf",
        ),
    ],
)
def test_wrong_tensors(run, change, message):
    path = checkpoints.newest(run)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    rewrite(path, "model.safetensors", safetensors.torch.save(tensors))
    refused(path, message)


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint-00000001").mkdir()
    with pytest.raises(CheckpointError, match="none: no such directory"):
        load_average(tmp_path / "none")
    with pytest.raises(CheckpointError, match="empty: no checkpoint in this directory"):
        load_average(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="00000001: no checkpoint in this directory"):
        load_average(tmp_path / "checkpoint-00000001")


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_full_disk_leaves_the_earlier_checkpoints(run, tokenizer, monkeypatch, call):
    """The error at each of the calls that can meet it."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, call, full)
        with pytest.raises(CheckpointError, match="00003: can't be saved: No space left on device"):
            save(run, 3, tokenizer)
    assert sorted(path.name[-1] for path in run.iterdir()) == ["1", "2"]
    assert_holds(checkpoints.newest(run), 2)
    save(run, 3, tokenizer)  # with space again
    assert_holds(checkpoints.newest(run), 3)


def test_a_checkpoint_appears_when_all_of_it_is_on_the_disk(tmp_path, tokenizer, monkeypatch):
    """What a kill between any two flushes leaves behind."""
    seen = []

    def recorded(descriptor: int, flush=os.fsync) -> None:
        flush(descriptor)
        seen.append([path.name for path in checkpoints.checkpoints(tmp_path)])

    monkeypatch.setattr(os, "fsync", recorded)
    path = save(tmp_path, 7, tokenizer)
    # Each file and the directory itself; then, renamed, the directory above.
    assert seen == [[]] * (len(FILES) + 1) + [[path.name]]


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_checkpoint as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
try:
    t.save(Path(sys.argv[1]), 3, t.Tokenizer.train(["a"], 300))
except t.CheckpointError as error:
    print(error)
"""


def test_a_write_that_the_system_cuts_short(run):
    """A real error of write(2): the process may write no file beyond 9,000 bytes."""
    assert (checkpoints.newest(run) / "model.safetensors").stat().st_size > 9_000
    command = [sys.executable, "-c", LIMITED, str(run), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "00000003: can't be saved: File too large; earlier checkpoints" in result.stdout
    assert sorted(path.name[-1] for path in run.iterdir()) == ["1", "2"]
    assert_holds(checkpoints.newest(run), 2)


def test_leftovers_of_a_kill_are_ignored_and_cleared(run, tokenizer):
    """Killed while writing, and while removing an old checkpoint."""
    newest = checkpoints.newest(run)
    shutil.copytree(newest, run / ".incomplete-checkpoint-00000003")
    shutil.copytree(newest, run / ".incomplete-old-checkpoint-00000000")
    (run / ".incomplete-checkpoint-00000003" / "training.json").unlink()
    assert checkpoints.newest(run) == newest
    save(run, 3, tokenizer)  # the same name again
    assert_holds(checkpoints.newest(run), 3)
    with checkpoints.exclusive(run):
        assert sorted(path.name[-1] for path in run.iterdir()) == ["1", "2", "3"]


class Killed(BaseException):
    """As a kill: nothing is cleaned up after it."""


@pytest.mark.parametrize("call", ["mkdir", "write_bytes", "rename", "replace", "unlink", "rmdir"])
def test_a_kill_at_any_step_leaves_nothing_for_long(run, tokenizer, monkeypatch, call):
    """Before and after each step of a save that removes an old checkpoint: the next process goes on
    from a whole checkpoint and clears the rest."""
    step, count = getattr(Path, call), 0
    for number in range(20):
        for after in (False, True):
            count = 0

            def killed(
                path: Path, *args: Any, number: int = number, after: bool = after, **kwargs: Any
            ) -> Any:
                nonlocal count
                count += 1
                if count == number + 1 and not after:
                    raise Killed
                result = step(path, *args, **kwargs)
                if count == number + 1:
                    raise Killed
                return result

            with monkeypatch.context() as patch:
                patch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)
                patch.setattr(Path, call, killed)
                with contextlib.suppress(Killed):
                    save(run, 3 + number, tokenizer, keep=1)
            with checkpoints.exclusive(run):
                names = {path.name for path in run.iterdir()}
                assert names == {path.name for path in checkpoints.checkpoints(run)}
                checkpoints.load(checkpoints.newest(run))
        if count <= number:
            return
    raise AssertionError("the save took more steps than are tried")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.json", b'{"vocab_size": 300, "layers": 3}', "unknown setting 'layers'"),
        ("model.json", b"{}", "setting 'vocab_size' of ModelConfig is missing"),
        ("model.json", b"[]", "expected a JSON object"),
        ("model.safetensors", b"PK\x03\x04 a zip file, as torch.save writes", "checkpoint-0"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\xff", "utf-8"),
        ("model.json", DEEP, "nested too deeply"),
        ("training.json", b'{"a":' + DEEP, "nested too deeply"),
        ("tokenizer.json", b'{"a":' + DEEP, "not a tokenizer"),
        ("model.json", {"vocab_size": 10**30}, "vocab_size: expected at most 16,777,216, got 1000"),
        ("model.json", {"encoder_layers": 10**9}, "encoder_layers: expected at most 256"),
        ("model.json", {"d_model": 2**40}, "d_model: expected at most"),
        ("model.json", {"max_length": 2**20, "d_model": 2**14}, "max_length: expected max_length"),
        # 4 TiB and 17 TiB of weights
        (
            "model.json",
            {"vocab_size": 2**24, "d_model": 2**16, "max_length": 9},
            r"embedding.weight.*expected .*65536",
        ),
        ("model.json", {"encoder_layers": 256, "d_ff": 2**18}, "'encoder.1.self"),
        (
            "model.json",
            {"vocab_size": 270},
            "tokenizer.json has the token 2[67]., beyond the model",
        ),
        ("model.json", {"dropout": float("nan")}, "dropout: expected 0 <= p < 1, got nan"),
    ],
)
def test_a_checkpoint_made_by_hand(run, name, content, message):
    """Refused in a sentence, before memory is taken."""
    path = checkpoints.newest(run)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((path / name).read_text()), **content}).encode()
    rewrite(path, name, content)
    refused(path, message)


@pytest.mark.parametrize("kind, size", [("F4", 4), ("F8_E8M0", 8)])
def test_types_of_tensors_that_torch_has_not(run, kind, size):
    entry = {"dtype": kind, "shape": [8], "data_offsets": [0, size]}
    header = json.dumps({"embedding.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(size)
    path = checkpoints.newest(run)
    rewrite(path, "model.safetensors", content)
    refused(path, f"tensors of type '{kind}'|{kind}")


def test_files_that_are_endless_or_far_too_large(run):
    """As a link to a device, and as a hole of 1 TiB: neither is read."""
    path = checkpoints.newest(run)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to("/dev/zero")
    refused(path, r"tokenizer\.json is no regular file")
    (path / "tokenizer.json").unlink()
    for name in ("tokenizer.json", "model.json", "model.safetensors"):
        with open(path / name, "wb") as file:
            file.truncate(2**40)
        refused(path, rf"{name.split('.')[0]}\.json is damaged: it has")
        if name == "tokenizer.json":
            shutil.copy(run / "checkpoint-00000001" / name, path)


def test_a_tokenizer_of_another_kind(run):
    """Ids that fit are not enough: its tokens are no bytes, or it has a part that adds ids."""
    path = checkpoints.newest(run)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "東京": 3}
    foreign = json.loads((path / "tokenizer.json").read_text("utf-8"))
    foreign["model"].update(vocab=words, merges=[])
    rewrite(path, "tokenizer.json", json.dumps(foreign).encode())
    refused(path, "token '東京' is not of bytes")
    foreign["padding"] = {"strategy": {"Fixed": 10**13}}
    rewrite(path, "tokenizer.json", json.dumps(foreign).encode())
    refused(path, "of rowmax.transformer: its padding is ")


def test_one_training_process_at_a_time(tmp_path):
    with (
        checkpoints.exclusive(tmp_path),
        pytest.raises(CheckpointError, match="another process is training in it"),
        checkpoints.exclusive(tmp_path),
    ):
        pass
    with checkpoints.exclusive(tmp_path):
        pass


@pytest.mark.parametrize("name", ["run", "/proc/self"])  # a file; one that none is written into
def test_output_directory_that_can_not_be_used(tmp_path, name):
    """Found out before the training, not at its first save."""
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(CheckpointError, match=f"{name}: can't be used: "),
        checkpoints.exclusive(tmp_path / name),
    ):
        pass


def test_average(tmp_path, tokenizer):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, tokenizer)
    models = [dict(new_model(step).named_parameters()) for step in (2, 3, 4)]
    saved = load_average(tmp_path, 3)
    for name, weight in saved.weights.items():
        torch.testing.assert_close(weight, sum(model[name] for model in models) / 3)
    # Of those up to the one that is named.
    saved = load_average(tmp_path / "checkpoint-00000003", 2)
    name, weight = next(iter(saved.weights.items()))
    torch.testing.assert_close(weight, (models[0][name] + models[1][name]) / 2)
    with pytest.raises(CheckpointError, match="mean of 5 checkpoints .* there are only 4"):
        load_average(tmp_path, 5)


def test_average_of_different_models(tmp_path, tokenizer):
    save(tmp_path, 1, tokenizer, d_ff=24)
    save(tmp_path, 2, tokenizer)
    with pytest.raises(CheckpointError, match="checkpoint-00000001: holds another model than"):
        load_average(tmp_path, 2)


def test_remove_all(run):
    checkpoints.remove_all(run)
    assert list(run.iterdir()) == []
