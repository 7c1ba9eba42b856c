"""What the compiler says of each form, as a table; `make compile` asks the compiler itself."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from rowmax.bench import cli
from rowmax.bench.tuning import ahead_of_time, forms
from rowmax.kernels.backends import gpu_triton
from rowmax.kernels.backends.gpu_triton.configurations import Configuration, Key, lookup


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """What is asked of the compiler, which knows no head of 64."""
    asked: list[Key] = []

    def compile_form(key: Key, form: Configuration) -> ahead_of_time.Compiled:
        assert form == lookup(key)
        asked.append(key)
        if key.dim == 64:
            raise RuntimeError("PassManager::run failed\nand more")
        return ahead_of_time.Compiled(99, 8, 65536, 12, False)

    monkeypatch.setattr(ahead_of_time, "compile_form", compile_form)
    monkeypatch.setattr(gpu_triton, "interpreting", lambda: False)
    return asked


def test_a_line_for_each_key(compiles: list[Key], capsys: pytest.CaptureFixture[str]) -> None:
    """One that does not compile is told, and is no end of it."""
    words = ["--arch", "gfx942", "--dtype", "bfloat16", "--dim", "64,128", "--features", "rich"]
    assert cli.main(["forms", *words, "--kernel", "forward,bias_gradients"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "gfx942, at most 64 KiB of shared memory a program"
    assert lines[2].split(" | ")[1:4] == list(forms.COLUMNS[1:4])
    found = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [(row[0], int(row[2])) for row in found] == [(key.kernel, key.dim) for key in compiles]
    assert len(found) == 4
    for row in found:
        if row[2] == "128":
            assert row[5:] == ["99", "8", "64", "12"]
        else:
            assert row[5] == "does not compile: RuntimeError: PassManager::run failed"


@pytest.mark.parametrize("words", [["--arch", "sm_12"], ["--kernel", "all"], ["--dim", "80"]])
def test_wrong_calls(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["forms", *words])
    assert raised.value.code == 2
    assert f"{words[0]}: expected names of" in capsys.readouterr().err


def test_what_is_interpreted_cannot_be_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_triton, "interpreting", lambda: True)
    with pytest.raises(SystemExit) as raised:
        cli.main(["forms"])
    assert raised.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
