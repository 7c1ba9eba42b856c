"""`bench configs`, without a compiler; `make compile` runs the real one."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from rowmax.bench import cli
from rowmax.bench.tuning import ahead_of_time, configs
from rowmax.kernels.backends import gpu_triton
from rowmax.kernels.backends.gpu_triton.configs import Config, Key, lookup


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """The keys that are compiled, by a compiler that fails for heads of 64."""
    asked: list[Key] = []

    def compile_config(key: Key, config: Config) -> ahead_of_time.Compiled:
        assert config == lookup(key)
        asked.append(key)
        if key.dim == 64:
            raise RuntimeError("PassManager::run failed\nand more")
        return ahead_of_time.Compiled(99, 8, 65536, 12, False)

    monkeypatch.setattr(ahead_of_time, "compile_config", compile_config)
    monkeypatch.setattr(gpu_triton, "interpreting", lambda: False)
    return asked


def test_a_line_for_each_key(compiles: list[Key], capsys: pytest.CaptureFixture[str]) -> None:
    """A key that does not compile has a line too, and the rest follows."""
    words = ["--arch", "gfx942", "--dtype", "bfloat16", "--dim", "64,128"]
    words += ["--features", "score_mod"]
    assert cli.main(["configs", *words, "--kernel", "forward,backward_dbias"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    lines = captured.out.strip().splitlines()
    assert lines[0] == "gfx942, at most 64 KiB of shared memory a program"
    assert lines[2].split(" | ")[1:4] == list(configs.COLUMNS[1:4])
    found = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [(row[0], int(row[2])) for row in found] == [(key.kernel, key.dim) for key in compiles]
    assert len(found) == 4
    for row in found:
        if row[2] == "128":
            assert row[5:] == ["99", "8", "64", "12"]
        else:
            assert row[5] == "does not compile: RuntimeError: PassManager::run failed"


def test_former_names(compiles: list[Key], capsys: pytest.CaptureFixture[str]) -> None:
    """The command and its names are still understood, each with a message."""
    words = ["--dtype", "bfloat16", "--dim", "128"]
    former = ["--kernel", "key_gradients,forward", "--features", "rich,plain"]
    assert cli.main(["forms", *words, *former]) == 0
    messages = capsys.readouterr().err.splitlines()
    for old, new in (
        ("the command forms", "configs"),
        ("--kernel key_gradients", "backward_dkdv"),
        ("--features rich", "score_mod"),
        ("--features plain", "base"),
    ):
        assert f"rowmax.bench: {old} is deprecated: use {new}" in messages
    assert len(messages) == 4
    assert {(key.kernel, key.features) for key in compiles} == {
        (kernel, features)
        for kernel in ("forward", "backward_dkdv")
        for features in ("base", "score_mod")
    }


@pytest.mark.parametrize("words", [["--arch", "sm_12"], ["--kernel", "all"], ["--dim", "80"]])
def test_wrong_calls(words: list[str], refused: Any) -> None:
    assert f"{words[0]}: expected names of" in refused("configs", *words)


def test_what_is_interpreted_cannot_be_compiled(
    refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_triton, "interpreting", lambda: True)
    assert "TRITON_INTERPRET is set" in refused("configs")
