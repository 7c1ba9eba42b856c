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

from rowmax.kernels.backends import dispatch
from rowmax.transformer import Trainer, cli, corpus, score
from rowmax.transformer import checkpoint as checkpoints

from .commands import TINY, fails, write_pairs

MULTI30K = Path(__file__).parents[2].parent / "shared" / "data" / "multi30k_en_de"


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


def test_n_best_sampling_and_scores(trained, tmp_path, capsys):
    model = ["--model", str(trained), "--backend", "reference"]
    assert cli.main(["translate", *model, "--beam", "3", "--n-best", "2", "구", "", "오"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [number for number, _, _ in lines] == ["1", "1", "3", "3"]
    assert float(lines[0][1]) >= float(lines[1][1])
    assert cli.main(["translate", *model, "--beam", "3", "구"]) == 0
    assert capsys.readouterr().out.strip("\n") == lines[0][2]

    assert cli.main(["translate", *model, "구 오"]) == 0
    greedy = capsys.readouterr().out
    assert cli.main(["translate", *model, "--sample", "--top-k", "1", "구 오"]) == 0
    assert capsys.readouterr().out == greedy

    (tmp_path / "a.tsv").write_text("구\tnine\n\n오\t" + "five " * 99 + "\n오\tfive\n", "utf-8")
    assert cli.main(["score", *model, "--tsv", str(tmp_path / "a.tsv")]) == 1
    captured = capsys.readouterr()
    first, blank, long, last = captured.out.split("\n")[:-1]
    assert blank == long == ""
    for line in (first, last):
        log_p, tokens = line.split("\t")
        assert float(log_p) < 0
        assert int(tokens) > 1
    assert "1 with a blank side (the first is number 2) and 1 too long" in captured.err


def test_lines_are_sampled_one_after_another(trained, capsys, monkeypatch):
    """Whatever is read at a time, the draws go on."""
    command = ["translate", "--model", str(trained), "--backend", "reference", "--sample"]
    monkeypatch.setattr(cli, "_CHUNK", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("구 오\n" * 6))
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) == 6
    assert lines[:2] != lines[2:4]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--n-best", "2"), "--n-best 2: expected at most --beam, which is 1"),
        (("--top-p", "0.5"), "--top-p is for --sample alone"),
        (("--seed", "1"), "--seed is for --sample alone"),
        (("--sample", "--beam", "2"), "--beam 2 is no option of --sample"),
        (("--sample", "--n-best", "1"), "--n-best 1 is no option of --sample"),
        (("--sample", "--top-p", "1.5"), "--top-p: expected 0 < top_p <= 1, got 1.5"),
        (("--sample", "--top-p", "nan"), "--top-p: expected"),
        (("--sample", "--temperature", "0"), "--temperature: expected a number > 0, got 0.0"),
        (("--sample", "--top-k", "0"), "--top-k: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_options_of_decoding_that_contradict(trained, capsys, options, message):
    assert message in fails(capsys, "translate", "--model", str(trained), *options, "구")


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
    refused = translate(trained, "--length-penalty", "-1")
    assert "--length-penalty: expected 0 to 5, got -1.0" in refused
    foreign = tmp_path / "checkpoint-00000001"
    foreign.mkdir()
    (foreign / "checkpoint.json").write_text("{")
    assert "no checkpoint in this directory" in translate(tmp_path)


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


def test_the_demo_replaces_a_demo_alone(tmp_path, capsys, monkeypatch):
    """Not what another program left, and not a model that somebody trained there."""
    monkeypatch.setattr(corpus, "splits", lambda: corpus.Splits(*[corpus.generate(300)] * 3))
    monkeypatch.setattr("rowmax.transformer.comparison.compare", lambda *_: (None, None))
    monkeypatch.setattr("rowmax.transformer.comparison.table", lambda *_: "a table")
    run = tmp_path / "run"
    (run / "checkpoint-500").mkdir(parents=True)
    (run / "checkpoint-500" / "optimizer.pt").write_text("theirs")
    demo = ("demo", "--output", str(run), "--backend", "reference", "--steps")
    for steps in ("2", "1"):
        assert cli.main([*demo, steps]) == 0
        assert [path.name[-1] for path in checkpoints.checkpoints(run)] == [steps]
    assert (run / "checkpoint-500" / "optimizer.pt").read_text() == "theirs"

    trained = tmp_path / "trained"
    train = ["train", *write_pairs(tmp_path, 60), "--output", str(trained), *TINY]
    assert cli.main(train) == 0
    before = checkpoints.checkpoints(trained)
    error = fails(capsys, "demo", "--output", str(trained), "--steps", "1")
    assert error.endswith("holds checkpoints that no demo made; choose another --output")
    assert checkpoints.checkpoints(trained) == before


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
    # which answers before a backend is asked whether it declines
    monkeypatch.setattr(dispatch, "fast_path_attention", lambda _name: None)
    monkeypatch.setattr(dispatch, "fast_path_norm", lambda _name: None)
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
def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rowmax.transformer.comparison.STEPS", 10)
    assert cli.main(["demo", "--output", str(tmp_path / "run"), "--steps", "30"]) == 0
    shown = capsys.readouterr().out
    assert "On 1,000 test pairs, none of them seen in training:" in shown
    assert "naive (reference)" in shown
    assert "largest difference in loss over these 10 steps" in shown
