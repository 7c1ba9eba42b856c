"""The command line's text, numbers and outputs: what is odd fails alone, in words, and in time."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rowmax.transformer import checkpoint as checkpoints
from rowmax.transformer import cli, corpus

from .commands import TINY, fails, write_pairs


def test_a_sentence_beyond_the_limit_fails_alone(trained, tmp_path, capsys, monkeypatch):
    """An empty line in its place, its number on stderr, and exit status 1 at the end."""
    model = ["--model", str(trained), "--backend", "reference"]
    long = "구 " * 200
    assert cli.main(["translate", *model, "구", "오"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert cli.main(["translate", *model, "구", long, "오"]) == 1
    captured = capsys.readouterr()
    assert captured.out.split("\n") == [short[0], "", short[1], ""]
    told = "has 602 tokens, but this model takes at most 64: not translated"
    assert captured.err.splitlines() == [f"error: sentence 2 {told}"]

    # Counted from the start of the input, not of the chunk.
    monkeypatch.setattr(cli, "_CHUNK", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"구\n\n{long}\n{long}\n오"))
    assert cli.main(["translate", *model]) == 1
    captured = capsys.readouterr()
    assert captured.out.split("\n") == [short[0], "", "", "", short[1], ""]
    assert captured.err.splitlines() == [f"error: line {number} {told}" for number in (3, 4)]

    (tmp_path / "source").write_text(f"구\n{long}\n", "utf-8")
    (tmp_path / "target").write_text("nine\nmany\n")
    text = ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]
    written = tmp_path / "out"
    options = ["--json", "--translations", str(written)]
    assert cli.main(["evaluate", *model, *text, *options]) == 1
    captured = capsys.readouterr()
    assert written.read_text("utf-8") == f"{short[0]}\n\n"
    assert json.loads(captured.out)["sentences"] == 2
    assert captured.err.splitlines() == [f"error: line 2 {told}"]


def test_a_byte_order_mark_and_ends_of_lines(trained):
    """Lines of standard input are those of a file: a mark before them is none of the text, and
    nothing but a line feed ends one."""
    base = [sys.executable, "-m", "rowmax.transformer", "translate", "--model", str(trained)]
    base += ["--backend", "reference"]
    sources = ("구", "\ufeff구\r\n", "\ufeff\n\n구\r오\u2028오\n")
    plain, marked, separators = (
        subprocess.run(base, input=text.encode(), capture_output=True, check=True).stdout.decode()
        for text in sources
    )
    assert marked == plain
    assert separators.count("\n") == 3
    assert separators.startswith("\n\n")


def test_a_translation_is_one_line(trained, capsys, monkeypatch):
    monkeypatch.setattr(cli, "translate", lambda *args, **kwargs: ["two\nlines\r", "one"])
    assert cli.main(["translate", "--model", str(trained), "a", "b"]) == 0
    assert capsys.readouterr().out == "two lines \none\n"


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "-1"])
def test_numbers_that_are_none(number, trained, tmp_path, capsys):
    """Before the model is loaded; an option's own name stands in the message."""
    model = ("--model", str(trained))
    text = write_pairs(tmp_path, 10)
    for command in (
        ("translate", *model, "구", f"--length-penalty={number}"),
        ("evaluate", *model, *text, f"--length-penalty={number}"),
        (
            "attend",
            str(trained),
            "구",
            "--out",
            str(tmp_path / "a.html"),
            f"--length-penalty={number}",
        ),
    ):
        assert f"--length-penalty: expected 0 to 5, got {number}" in fails(capsys, *command)
    train = ("train", *text, "--output", str(tmp_path / "run"), *TINY)
    for option in ("dropout", "attention-dropout", "learning-rate", "label-smoothing", "clip"):
        error = fails(capsys, *train, f"--{option}={number}")
        assert error.startswith(f"error: {option.replace('-', '_')}: expected ")
    assert not checkpoints.checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    "option, message",
    [
        ("--threads", "--threads: expected at least 1, at most 1024"),
        ("--d-model", "d_model: expected at most"),
        ("--max-length", "max_length: expected at most"),
        ("--steps", "steps: expected at most 2,147,483,647"),
        ("--warmup", "warmup: expected at most"),
        ("--seed", "seed: expected an integer from 0"),
        ("--vocab-size", "vocab_size must be at most 16,777,216, got 1000"),
    ],
)
def test_numbers_beyond_all_measure(option, message, tmp_path, capsys):
    command = ("train", *write_pairs(tmp_path, 20), "--output", str(tmp_path / "run"), *TINY)
    assert message in fails(capsys, *command, option, str(10**30))


def test_beams_beyond_the_vocabulary(trained, capsys):
    error = fails(capsys, "translate", "--model", str(trained), "구", "--beam", "1000000")
    assert "--beam: expected at most the 400 tokens" in error


def test_arguments_that_are_not_utf8(trained, tmp_path):
    """The bytes of a Latin-1 terminal: a sentence is refused, a file name is taken as it is."""
    base = [sys.executable, "-m", "rowmax.transformer"]
    cases: tuple[tuple[list[Any], bytes], ...] = (
        (["translate", "--model", str(trained), "구", b"caf\xe9"], b"sentence 2 is not UTF-8: "),
        (
            ["attend", str(trained), b"caf\xe9", "--out", str(tmp_path / "a.html")],
            b"the sentence is not UTF-8: ",
        ),
        (["translate", "--model", b"caf\xe9", "x"], b"caf\\udce9: no such directory"),
    )
    for arguments, error in cases:
        done = subprocess.run([*base, *arguments], capture_output=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: " + error)
        assert done.stderr.count(b"\n") == 1
    named = bytes(tmp_path) + b"/caf\xe9"
    pairs = "".join(f"{pair.korean}\t{pair.english}\n" for pair in corpus.generate(3))
    (tmp_path / "text.tsv").write_text(pairs, "utf-8")
    evaluate = ["evaluate", "--model", str(trained), "--tsv", str(tmp_path / "text.tsv")]
    done = subprocess.run([*base, *evaluate, "--translations", named], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Path(os.fsdecode(named)).read_bytes().count(b"\n") == 3


def test_blank_lines_of_a_table(trained, tmp_path, capsys):
    """Left out, and said so, with the numbers of the lines."""
    rows = [f"{pair.korean}\t{pair.english}" for pair in corpus.generate(40)]
    table = tmp_path / "text.tsv"
    table.write_text("\n".join(["\ufeff" + rows[0], "", "  ", *rows[1:], "\t", "\r", ""]), "utf-8")
    train = ["train", "--tsv", str(table), "--output", str(tmp_path / "run"), *TINY]
    assert cli.main(train) == 0
    told = capsys.readouterr().err
    assert "training on 40 pairs" in told
    assert "left out 4 with a blank side (the first is number 2)" in told
    model = ["--model", str(trained), "--backend", "reference"]
    written = tmp_path / "out"
    evaluate = ["evaluate", *model, "--tsv", str(table), "--json", "--translations", str(written)]
    assert cli.main(evaluate) == 0
    captured = capsys.readouterr()
    assert captured.err == "left out 4 blank lines\n"
    assert json.loads(captured.out)["sentences"] == 40
    assert len(written.read_text("utf-8").split("\n")) == 44 + 1  # a line for each of the table's


def test_outputs_are_opened_before_the_work(trained, tmp_path, capsys, monkeypatch):
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the work has begun")

    text = write_pairs(tmp_path, 10)
    for name in ("load_average", "load"):
        monkeypatch.setattr(checkpoints, name, never)
    monkeypatch.setattr(corpus, "splits", never)
    nowhere = str(tmp_path / "none" / "out")
    evaluate = ("evaluate", "--model", str(trained), *text, "--translations")
    assert f"--translations: can't write {nowhere}: No such file" in fails(
        capsys, *evaluate, nowhere
    )
    assert "--translations: can't write" in fails(capsys, *evaluate, str(tmp_path))
    picture = ("attend", str(trained), "구", "--out")
    assert "is no directory" in fails(capsys, *picture, f"{nowhere}.html")
    assert "--out: can't write" in fails(capsys, *picture, str(tmp_path / ("x" * 250 + ".html")))
    assert "can't be used" in fails(capsys, "demo", "--output", str(tmp_path / "text.ko"))
    for command in (("demo",), ("train", "--built-in")):
        assert "can't be used" in fails(capsys, *command, "--output", "/proc/self")
    # What was there is not lost by a call that fails later.
    kept = tmp_path / "kept"
    kept.write_text("earlier")
    monkeypatch.setattr(cli, "_load", lambda args: never())
    for path in (kept, tmp_path / "new"):
        with pytest.raises(AssertionError, match="the work has begun"):
            cli.main([*evaluate, str(path)])
    assert kept.read_text() == "earlier"
    assert not (tmp_path / "new").exists()


def test_outputs_are_no_inputs(trained, tmp_path, capsys, monkeypatch):
    """Found out before the model is loaded, and nothing is overwritten."""
    monkeypatch.setattr(cli, "_load", lambda args: pytest.fail("the work has begun"))
    text = write_pairs(tmp_path, 10)
    source, part = tmp_path / "text.ko", checkpoints.newest(trained) / "model.html"
    link = tmp_path / "link"
    link.symlink_to(source)
    before = source.read_bytes()
    evaluate = ("evaluate", "--model", str(trained), *text, "--translations")
    for path in (source, link):
        error = fails(capsys, *evaluate, str(path))
        assert f"--translations: {path} is the file that --source names" in error
    for path in (part, part.with_name("model.json")):
        error = fails(capsys, *evaluate, str(path))
        assert f"--translations: {path} lies in {part.parent}, which --model reads" in error
    error = fails(capsys, "attend", str(trained), "구", "--out", str(part))
    assert f"--out: {part} lies in {part.parent}, which MODEL reads" in error
    assert source.read_bytes() == before
    assert checkpoints.load(part.parent)


@pytest.mark.parametrize(
    "every, said", [(1, "step 1: .* finite, and nothing"), (2, "step 2: loss")]
)
def test_training_that_diverges(every, said, tmp_path, capsys):
    """It ends with what went wrong, and no checkpoint is left that nothing could read."""
    run = tmp_path / "run"
    train = ["train", *write_pairs(tmp_path, 20), "--output", str(run), *TINY]
    assert cli.main([*train, "--learning-rate", "1e308", "--save-every", str(every)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: {said}", last)
    assert "A lower --learning-rate" in last
    assert checkpoints.checkpoints(run) == []
