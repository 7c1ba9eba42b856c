"""Commands of the command line that several test files give."""

from __future__ import annotations

from pathlib import Path

from rowmax.transformer import cli, corpus

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


def fails(capsys, *arguments: str) -> str:
    """The error message of a command that must fail with status 2."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    return captured.err.splitlines()[-1]
