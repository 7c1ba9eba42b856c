"""How a command ends: its exit status and its words, whatever happens in it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rowmax import console
from rowmax.bench import cli as bench
from rowmax.console import MissingExtraError, UsageError


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    "error, status, words",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("and so on"), 130, "and so on"),
        (OSError(28, "No space left on device"), 2, "me: [Errno 28] No space left on device"),
        (MissingExtraError("x is not installed"), 2, "me: x is not installed"),
        (UsageError("what?"), 2, "me: what?"),
        (UsageError("caf\udce9"), 2, "me: caf\\udce9"),
    ],
)
def test_errors_are_sentences(
    error: BaseException, status: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert console.run(raising(error), "me: ", (UsageError,)) == status
    assert capfd.readouterr().err == f"{words}\n"


def test_other_errors_are_faults_and_stay_what_they_are() -> None:
    for error in (ValueError("a fault"), ImportError("a fault"), SystemExit(3)):
        with pytest.raises(type(error)):
            console.run(raising(error), "me: ", (UsageError,))
    assert console.run(lambda: 7, "me: ") == 7


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError(28, "full"), 2)])
def test_in_the_middle_of_a_measurement(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stop(_: object) -> None:
        raise error

    monkeypatch.setattr("rowmax.bench.measure.figures.describe", lambda: stop(None))
    assert bench.main(["overhead"]) == status
    assert capfd.readouterr().err.count("\n") == 1


def test_what_an_extra_brings() -> None:
    for extra, wanted in (("bench", '"rowmax[bench]"'), (None, "rowmax")):
        with pytest.raises(MissingExtraError) as caught, console.from_extra(extra):
            importlib.import_module("no_such_package")
        assert str(caught.value) == f"no_such_package is not installed: pip install {wanted}"
        assert caught.value.name == "no_such_package"


def test_a_place_to_write_to(tmp_path: Path) -> None:
    """What is there stays as it is, and what is not there is not made."""
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("earlier")
    for path in (kept, new):
        console.check_writable("--json", path)
    assert kept.read_text() == "earlier"
    assert not new.exists()
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "no" / "x", "No such file")):
        with pytest.raises(UsageError, match=f"--json: can't write {path}: {why}"):
            console.check_writable("--json", path)


def test_outputs_that_are_read_or_written_twice(tmp_path: Path) -> None:
    """By whatever name: a link of either kind, or a way around; and before any is written."""
    source, folder, new = tmp_path / "source", tmp_path / "folder", tmp_path / "new"
    source.write_text("precious")
    folder.mkdir()
    (folder / "part").write_text("precious")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "around").symlink_to(folder)
    for name in ("source", "soft", "hard", "folder/../source"):
        with pytest.raises(UsageError, match="--out: .* is the file that --source names; give"):
            console.check_outputs({"--out": tmp_path / name}, {"--tsv": None, "--source": source})
    for name in ("folder/part", "around/new", "folder/deeper/new"):
        with pytest.raises(UsageError, match="--out: .* lies in .*folder, which --model reads"):
            console.check_outputs({"--out": tmp_path / name}, {}, {"--model": [folder]})
    for path in (new, source):
        with pytest.raises(UsageError, match="--html: .* is the file that --json names; give"):
            console.check_outputs(
                {"--json": path, "--html": tmp_path / "folder" / ".." / path.name}
            )
    null = Path("/dev/null")
    console.check_outputs({"--json": null, "--html": null, "--csv": new}, {"--source": source})
    assert source.read_text() == (folder / "part").read_text() == "precious"
    assert not new.exists()


def test_what_is_said_to_a_closed_error_stream_is_lost(tmp_path: Path) -> None:
    """It came among the output, and a bar of progress raised an AttributeError."""
    (tmp_path / "text.tsv").write_text("one\teins\n")
    options = ["--tsv", "text.tsv", "--output", "run", "--steps", "1"]
    options += ["--encoder-layers", "1", "--decoder-layers", "1", "--d-model", "8", "--heads", "1"]
    call = [sys.executable, "-m", "rowmax.transformer", "train", *options]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *call]
    done = subprocess.run(shell, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "run" / "checkpoint-00000001").is_dir()


@pytest.mark.parametrize("number", [0, 1])
def test_closed_streams(number: int) -> None:
    """As by a shell's `<&-`: no traceback, and no error among the output."""
    call = [sys.executable, "-m", "rowmax.transformer", "translate", "--model", "/none"]
    call += ["x"] if number else []
    shell = ["sh", "-c", f'exec "$@" {number}>&-', "sh", *call]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    words = "/none: no such directory" if number else "no sentence is given, and standard input is"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {words}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**30])
def test_numbers_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UsageError, match="--threads: expected at least 1, at most 1024, got"):
        console.set_threads(threads)
    console.set_threads(None)
    assert torch.get_num_threads() == before
