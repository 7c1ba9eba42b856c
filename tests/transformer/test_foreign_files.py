"""Of what bears a checkpoint's name, nothing is one but by a manifest of rowmax's own format."""

from __future__ import annotations

from pathlib import Path

import pytest

from rowmax.transformer import CheckpointError, load_average
from rowmax.transformer import checkpoint as checkpoints

from .test_checkpoint import assert_holds, save


def foreign_things(run: Path, elsewhere: Path) -> set[str]:
    """What may bear a checkpoint's name and is none; their names."""
    run.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint-500", ".incomplete-checkpoint-00000003", ".incomplete-theirs"):
        (run / name).mkdir()
        (run / name / "trainer_state.json").write_text("{}")
    for number, text in enumerate(('{"format": "theirs"}', "{}", "[1]", "", "{", "\x00")):
        (run / f"checkpoint-9{number}").mkdir()
        (run / f"checkpoint-9{number}" / "checkpoint.json").write_text(text)
    (run / "checkpoint.json").write_text("{}")
    (run / ".incomplete-emptydir").mkdir()
    (run / "checkpoint-00000003").write_text("a file")
    (run / "checkpoint-00000700").symlink_to(elsewhere)
    (run / "checkpoint-00000800").symlink_to(run / "nowhere")
    (run / ".incomplete-link").symlink_to(elsewhere)
    (run / ".incomplete-file").write_text("a file")
    (run / "checkpoint-").mkdir()
    (run / "checkpoint-٣").mkdir()
    return {path.name for path in run.iterdir()}


def test_what_is_not_rowmaxs_is_left_alone(tmp_path, tokenizer):
    """Neither taken for a checkpoint nor removed; and it neither stops a save nor a resumed run."""
    elsewhere = save(tmp_path / "elsewhere", 5, tokenizer)
    run = tmp_path / "checkpoint-7"  # nor does its own name make it one
    foreign = foreign_things(run, elsewhere)
    contents = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with checkpoints.exclusive(run):
        assert checkpoints.checkpoints(run) == []
        with pytest.raises(CheckpointError, match="checkpoint-7: not a checkpoint of rowmax"):
            checkpoints.newest(run)
        for step in (1, 2, 3, 700, 800):
            save(run, step, tokenizer, keep=2)
        names = [path.name for path in checkpoints.checkpoints(run)]
        assert names == ["checkpoint-000000700", "checkpoint-000000800"]
        assert_holds(checkpoints.newest(run), 800)
        checkpoints.remove_all(run)
    with checkpoints.exclusive(run):
        assert {path.name for path in run.iterdir()} == foreign
    assert {path: path.read_bytes() for path in contents} == contents
    assert_holds(elsewhere, 5)


@pytest.mark.parametrize("content", ["", "[1]", "{", "{}"])
def test_a_manifest_that_is_none_of_ours(tmp_path, tokenizer, content):
    """It stops neither a new run nor a resumed one; who names it is told what it is."""
    theirs = tmp_path / "checkpoint-500"
    theirs.mkdir()
    (theirs / "checkpoint.json").write_text(content)
    assert checkpoints.checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=": no checkpoint in this directory"):
        checkpoints.newest(tmp_path)
    ours = save(tmp_path, 3, tokenizer)
    assert checkpoints.newest(tmp_path) == ours
    with pytest.raises(CheckpointError, match="500: (not a checkpoint|checkpoint.json is damaged)"):
        checkpoints.newest(theirs)


def test_a_manifest_of_ours_that_is_damaged_inside_is_told(tmp_path, tokenizer):
    ours = save(tmp_path, 1, tokenizer)
    (ours / "checkpoint.json").write_text(f'{{"format": "{checkpoints.FORMAT}", "version": 1}}')
    assert checkpoints.newest(tmp_path) == ours
    with pytest.raises(CheckpointError, match=r"00000001: checkpoint\.json is damaged"):
        load_average(tmp_path)
