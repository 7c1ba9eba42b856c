"""The command line: what a newcomer types, and what they are told when it can't work."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import BLEU, CHRF

from rowmax.kernels import dispatch
from rowmax.transformer import Trainer, cli, corpus, score
from rowmax.transformer import checkpoint as checkpoints

MULTI30K = Path(__file__).parents[2].parent / "shared" / "data" / "multi30k_en_de"
TINY = (
    *("--preset", "demo", "--vocab-size", "400", "--d-model", "16", "--heads", "2", "--d-ff", "32"),
    *("--batch-tokens", "200", "--steps", "4", "--save-every", "2", "--backend", "reference"),
)


def write_pairs(folder: Path, count: int, name: str = "text") -> tuple[str, ...]:
    """Two files of the built-in corpus; the options that name them."""
    pairs = corpus.generate(count)
    for side, suffix in enumerate(("ko", "en")):
        lines = "".join(f"{pair[side]}\n" for pair in pairs)
        (folder / f"{name}.{suffix}").write_text(lines, "utf-8")
    return "--source", str(folder / f"{name}.ko"), "--target", str(folder / f"{name}.en")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_pairs(folder, 120)
    assert cli.main(["train", *text, "--output", str(folder / "run"), *TINY]) == 0
    return folder / "run"


@pytest.mark.parametrize("arguments", [[], ["train"], ["translate"], ["evaluate"], ["demo"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--help"])
    assert exit_.value.code == 0
    assert "usage: python -m rowmax.transformer" in capsys.readouterr().out


def test_train_translate_evaluate(trained, tmp_path, capsys, monkeypatch):
    assert [path.name[-1] for path in checkpoints.checkpoints(trained)] == ["2", "4"]
    model = ("--model", str(trained), "--backend", "reference")
    capsys.readouterr()

    assert cli.main(["translate", *model, "오늘은 5월 1일이에요.", "구"]) == 0
    from_arguments = capsys.readouterr().out
    assert len(from_arguments.splitlines()) == 2

    monkeypatch.setattr(sys, "stdin", io.StringIO("오늘은 5월 1일이에요.\n\n구\r\n"))
    assert cli.main(["translate", *model]) == 0
    from_input = capsys.readouterr().out.split("\n")
    assert [from_input[0], from_input[2]] == from_arguments.split("\n")[:2]
    assert from_input[1] == ""
    assert len(from_input) == 4

    text = write_pairs(tmp_path, 10)
    written = tmp_path / "out"
    evaluate = ["evaluate", *model, *text, "--average", "2", "--beam", "2"]
    assert cli.main([*evaluate, "--json", "--translations", str(written)]) == 0
    scores = json.loads(capsys.readouterr().out)
    outputs = written.read_text("utf-8").split("\n")[:-1]
    references = [pair.english for pair in corpus.generate(10)]
    assert scores["bleu"] == BLEU().corpus_score(outputs, [references]).score
    assert scores["chrf"] == CHRF().corpus_score(outputs, [references]).score
    assert "tok:13a" in scores["bleu_signature"]
    assert cli.main(evaluate) == 0
    assert "exact match" in capsys.readouterr().out


def test_every_backend_by_name(trained, capsys):
    outputs = []
    for backend in ("reference", "auto"):
        arguments = [
            "translate",
            "--model",
            str(trained),
            "--backend",
            backend,
            "민수는 책을 읽어요.",
        ]
        assert cli.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_resume(trained, tmp_path, capsys):
    """Step 4 after 2 + 2 as after 4, and not without --resume or with other settings."""
    text = write_pairs(tmp_path, 120)
    command = ["train", *text, "--output", str(tmp_path / "run"), *TINY]
    assert cli.main([*command, "--steps", "2"]) == 0
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "already holds checkpoints: add --resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume", "--warmup", "7"]) == 2
    assert "with --warmup 7: it was trained with 150" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert "resuming after step 2" in capsys.readouterr().err
    expected, got = (
        (checkpoints.newest(run) / "model.safetensors").read_bytes()
        for run in (trained, tmp_path / "run")
    )
    assert got == expected


@pytest.mark.parametrize("arch", ["rnn", "lstm", "gru"])
def test_recurrent_architectures(arch, tmp_path, capsys):
    """Train, resume, translate with a beam, evaluate; and what contradicts the checkpoint."""
    text = write_pairs(tmp_path, 60)
    run = tmp_path / "run"
    settings = (*TINY[:6], *TINY[10:], "--encoder-layers", "1", "--decoder-layers", "1")
    command = ["train", "--arch", arch, *text, "--output", str(run), *settings]
    assert cli.main([*command, "--steps", "2"]) == 0
    other = "gru" if arch == "lstm" else "lstm"
    assert f"with --arch {other}: it was trained with {arch}" in fails(
        capsys, *command, "--resume", "--arch", other
    )
    assert cli.main([*command, "--resume", "--no-batch-first"]) == 2
    assert cli.main([*command, "--resume"]) == 0
    model = ("--model", str(run), "--backend", "reference")
    capsys.readouterr()
    assert cli.main(["translate", *model, "--arch", arch, "--beam", "2", "구", "오"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main(["evaluate", *model, *text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sentences"] == 60
    for asked in ("translate", "evaluate"):
        words = ("구",) if asked == "translate" else text
        error = fails(capsys, asked, *model, "--arch", "transformer", *words)
        assert error.endswith(f"checkpoint-00000004 holds a model of --arch {arch}")


def test_settings_of_another_architecture(tmp_path, capsys):
    text = write_pairs(tmp_path, 20)
    command = ("train", *text, "--output", str(tmp_path / "run"))
    for arch, option in (
        ("gru", ("--heads", "2")),
        ("lstm", ("--pre-norm",)),
        ("transformer", ("--no-batch-first",)),
    ):
        name = option[0].replace("--no-", "--")
        error = fails(capsys, *command, "--arch", arch, *option)
        assert f"{name} is no setting of --arch {arch}" in error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_average_of_scores():
    assert score(["a b c d", "x"], ["a b c d", "y"]).exact_match == 50
    for arguments, message in (
        ((["a"], []), "1 translations can't be compared with 0 references"),
        (([], []), "no sentences to score"),
        ((["a"], ["a"], "mecab"), "tokenize: expected one of 13a"),
    ):
        with pytest.raises(ValueError, match=message):
            score(*arguments)


def fails(capsys, *arguments: str) -> str:
    """The error message of a command that must fail with status 2."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    return captured.err.splitlines()[-1]


def test_bad_text(tmp_path, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("one\ntwo\n")
    train = ("train", "--output", str(tmp_path / "run"), "--source", str(good), "--target")
    for content, message in (
        (b"one\n", "good has 2 lines but"),
        (b"", "bad: the file is empty"),
        (b"one\ntw\xf6\n", "bad: line 2 is not UTF-8"),
    ):
        bad.write_bytes(content)
        assert message in fails(capsys, *train, str(bad))
    assert "none: can't be read: No such file" in fails(capsys, *train, str(tmp_path / "none"))
    assert "can't be read: Is a directory" in fails(capsys, *train, str(tmp_path))
    assert "--source and --target go together" in fails(capsys, *train[:-1])
    assert "give either --source" in fails(capsys, *train, str(good), "--tsv", str(good))
    assert "no text to train on" in fails(capsys, *train[:3])
    assert "brings its own text" in fails(capsys, *train, str(good), "--built-in")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--heads", "3"], "d_model: expected a multiple of heads = 3"),
        (["--vocab-size", "10"], "vocab_size must be at least 259"),
        (["--dropout", "1.5"], "dropout: expected 0 <= p < 1, got 1.5"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--max-length", "2"], "none of 20 pairs can be used"),
    ],
)
def test_bad_settings(tmp_path, capsys, options, message):
    text = write_pairs(tmp_path, 20)
    command = ("train", *text, "--output", str(tmp_path / "run"), *TINY, *options)
    assert message in fails(capsys, *command)


def test_bad_models(trained, tmp_path, capsys):
    def translate(model, *options):
        return fails(capsys, "translate", "--model", str(model), *options, "구")

    assert "none: no such directory" in translate(tmp_path / "none")
    assert "no checkpoint in this directory" in translate(tmp_path)
    assert "there are only 2" in translate(trained, "--average", "3")
    assert "--length-penalty must not be negative," in translate(trained, "--length-penalty", "-1")
    damaged = tmp_path / "checkpoint-00000001"
    damaged.mkdir()
    (damaged / "checkpoint.json").write_text("{")
    assert "checkpoint.json is damaged" in translate(tmp_path)


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
        assert f"--length-penalty must not be negative, nor infinite or NaN, got {number}" in fails(
            capsys, *command
        )
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
    assert "can't be used" in fails(capsys, "demo", "--output", "/proc/self")
    # What was there is not lost by a call that fails later.
    kept = tmp_path / "kept"
    kept.write_text("earlier")
    monkeypatch.setattr(cli, "_load", lambda args: never())
    for path in (kept, tmp_path / "new"):
        with pytest.raises(AssertionError, match="the work has begun"):
            cli.main([*evaluate, str(path)])
    assert kept.read_text() == "earlier"
    assert not (tmp_path / "new").exists()


def test_interrupted(tmp_path, capsys, monkeypatch):
    """Before the first checkpoint there is nothing to go on from; after it, the command says."""
    step = Trainer.step

    def interrupted_at(last: int) -> Any:
        def step_or_stop(trainer: Trainer) -> Any:
            if trainer.steps_done == last:
                raise KeyboardInterrupt
            return step(trainer)

        return step_or_stop

    run = tmp_path / "run"
    train = ["train", *write_pairs(tmp_path, 120), "--output", str(run), *TINY, "--resume"]
    for last, words in (
        (1, "interrupted before the first checkpoint (--save-every): nothing was kept"),
        (3, f"interrupted; the same command with --resume goes on from {run}/checkpoint-00000002"),
    ):
        monkeypatch.setattr(Trainer, "step", interrupted_at(last))
        capsys.readouterr()
        assert cli.main(train) == 130
        assert capsys.readouterr().err.splitlines()[-1] == words

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    assert cli.main(["translate", "--model", str(run), "구"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_is_not_a_checkpoint_does_not_wedge_a_run(tmp_path, capsys):
    """Another program's folder, a file and a link of a checkpoint's name, from the first start to
    the last step; `--keep` removes none of them."""
    text = write_pairs(tmp_path, 120)
    run = tmp_path / "run"
    (run / "checkpoint-500").mkdir(parents=True)
    (run / "checkpoint-500" / "optimizer.pt").write_text("theirs")
    (run / "checkpoint-00000002").write_text("a file")
    (run / "checkpoint-00000004").symlink_to(tmp_path)
    (run / ".incomplete-checkpoint-00000002").write_text("a file")
    command = ["train", *text, "--output", str(run), *TINY, "--keep", "1"]
    assert cli.main([*command, "--steps", "2"]) == 0
    assert cli.main([*command, "--resume"]) == 0
    assert "resuming after step 2" in capsys.readouterr().err
    assert [path.name for path in checkpoints.checkpoints(run)] == ["checkpoint-000000004"]
    assert (run / "checkpoint-500" / "optimizer.pt").read_text() == "theirs"
    assert (run / "checkpoint-00000002").is_file()
    assert (run / "checkpoint-00000004").is_symlink()


def test_settings_made_by_hand(trained, tmp_path, capsys):
    """A training.json that says what can't be."""
    text = write_pairs(tmp_path, 120)
    run = tmp_path / "run"
    command = ("train", *text, "--output", str(run), *TINY)
    assert cli.main([*command, "--steps", "2"]) == 0
    path = checkpoints.newest(run)
    state = json.loads((path / "training.json").read_text())
    for change, message in (
        ({"step": 10**30}, "training.json is damaged: step 1000"),
        ({"step": -1}, "training.json is damaged: step -1"),
        ({"step": 1.5}, "training.json is damaged: step 1.5"),
        ({"step": True}, "training.json is damaged: step True"),
        ({"epoch": 10**30}, "training.json is damaged: step 2, epoch 1000"),
        ({"position": 10**30}, "is no place in this training"),
        ({"training": 5}, "training.json is damaged: its settings are no object"),
    ):
        content = json.dumps({**state, **change}).encode()
        (path / "training.json").write_bytes(content)
        manifest = json.loads((path / "checkpoint.json").read_text())
        manifest["files"]["training.json"]["sha256"] = hashlib.sha256(content).hexdigest()
        (path / "checkpoint.json").write_text(json.dumps(manifest))
        assert message in fails(capsys, *command, "--resume")


def test_a_backend_that_can_not(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "splits", lambda: corpus.Splits(*[corpus.generate(300)] * 3))
    # The Triton backend has no CPU but in its interpreter.
    monkeypatch.setattr(dispatch.load("native"), "declines", lambda problem: "a full moon")
    refusing = ("native",) if dispatch.unavailable("triton") is None else ("native", "triton")
    for backend in refusing:
        for command in (
            ("translate", "--model", str(trained), "구"),
            ("train", *write_pairs(tmp_path, 20), "--output", str(tmp_path / "run"), *TINY),
            ("demo", "--output", str(tmp_path / "run")),
        ):
            error = fails(capsys, *command, "--backend", backend)
            assert f"'{backend}' can't do this" in error


def test_a_real_process(trained):
    """No traceback, status 2; and where the reader leaves early, a sentence, as SIGPIPE ends it."""
    base = [sys.executable, "-m", "rowmax.transformer", "translate", "--model"]
    failed = subprocess.run([*base, "nowhere"], capture_output=True, text=True, input="")
    assert (failed.returncode, failed.stderr) == (2, "error: nowhere: no such directory\n")
    not_utf8 = subprocess.run(
        [*base, str(trained), "--backend", "reference"], capture_output=True, input=b"caf\xe9\n"
    )
    assert not_utf8.returncode == 2
    assert b"error: standard input is not UTF-8" in not_utf8.stderr
    assert b"Traceback" not in not_utf8.stderr
    for arguments in (["translate", "--model", str(trained), *["구"] * 3], ["train", "--help"]):
        with subprocess.Popen(
            [*base[:3], *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": ""},  # argparse ignores an error of its own write
        ) as process:
            process.stdout.close()
            told = process.stderr.read()
        assert told == b"error: the output was closed before all of it was written\n"
        assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"the Multi30k text is not at {MULTI30K}")
def test_trains_on_multi30k(tmp_path, capsys):
    text = []
    for option, name in (("source", "train.en"), ("target", "train.de")):
        text += [f"--{option}", str(MULTI30K / name)]
    tiny = (*TINY, "--preset", "small", "--encoder-layers", "1", "--decoder-layers", "1")
    command = ["train", *text, "--output", str(tmp_path), *tiny]
    assert cli.main(command) == 0
    shown = capsys.readouterr().err
    assert "training on 29,000 pairs" in shown
    assert "left out" not in shown


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    assert cli.main(["demo", "--output", str(tmp_path / "run"), "--steps", "30"]) == 0
    shown = capsys.readouterr().out
    assert "On 1,000 test pairs, none of them seen in training:" in shown
    assert "naive (reference)" in shown
    assert "largest difference in loss over these 100 steps" in shown
