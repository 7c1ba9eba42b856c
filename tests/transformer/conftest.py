"""A trained model, for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rowmax.transformer import Tokenizer, cli

from .commands import TINY, write_pairs


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_pairs(folder, 120)
    assert cli.main(["train", *text, "--output", str(folder / "run"), *TINY]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Of few words."""
    return Tokenizer.train(["하나 둘", "one two"], 300)
