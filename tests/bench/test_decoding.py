"""`python -m rowmax.bench decoding` prints a line an engine, and refuses what is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from rowmax.bench.measure import decoding
from rowmax.transformer.config import ModelConfig

pytest.importorskip("ctranslate2")
HUGGING_FACE = ["Hugging Face"] if importlib.util.find_spec("transformers") else []


def test_prints_tokens_a_second(tmp_path: Path, shown: Any, tiny: ModelConfig) -> None:
    out = tmp_path / "decoding.json"
    options = ["--size", "small", "--sentences", "2", "--beam", "3", "--seconds", "0.05"]
    printed = shown("decoding", *options, "--json", str(out))
    found = json.loads(out.read_text())["tokens_per_second"]
    assert list(found) == ["greedy", "beam 3"]
    for rates in found.values():
        engines = ["CTranslate2 float32", "CTranslate2 int8", *HUGGING_FACE]
        assert list(rates) == ["rowmax", "rowmax int8", *engines]
        for name in rates:
            assert f"\n{name} " in printed


def test_all_write_as_much(tmp_path: Path, tiny: ModelConfig) -> None:
    """Else tokens a second would not be of the same work."""
    given = decoding.Work(tiny, 3, "reference", threads=1)
    given.export(tmp_path)
    names = [name for name in decoding.ENGINES if name != "Hugging Face" or HUGGING_FACE]
    every = {name: decoding.ENGINES[name](given, tmp_path) for name in names}
    for beam in (1, 3):
        lengths = {name: decode(beam) for name, decode in every.items()}
        assert all(length == [24] * 3 for name, length in lengths.items() if "rowmax" not in name)
        assert sum(lengths["rowmax"]) >= 0.5 * 24 * 3


@pytest.mark.parametrize(
    "wrong", [("--sentences", "0"), ("--beam", "0"), ("--seconds", "0")], ids=" ".join
)
def test_what_is_wrong(wrong: tuple[str, str], refused: Any) -> None:
    assert wrong[0] in refused("decoding", *wrong)


def test_an_engine_tells_its_own_error(
    tmp_path: Path, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process knows none of this name; a process that ended would be a BrokenProcessPool."""
    monkeypatch.setitem(decoding.ENGINES, "stranger", decoding.ENGINES["rowmax"])
    given = decoding.Work(tiny, 1, "reference", threads=1)
    with decoding.processes(given, tmp_path) as every, pytest.raises(KeyError, match="stranger"):
        every["stranger"](1)
