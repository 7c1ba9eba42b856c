"""Commands of bench that must be refused, and machines that need not be measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rowmax.bench import cli
from rowmax.bench.machine.host import CpuLimits
from rowmax.bench.measure import training
from rowmax.transformer.config import ModelConfig


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit status 2 and print nothing; returns its message."""

    def run(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return run


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with this exit status; returns what it prints."""

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert cli.main(list(words)) == status
        return capsys.readouterr().out

    return run


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """What `--size small` of `training` and `decoding` is then."""
    config = ModelConfig(50, 1, 1, d_model=16, heads=2, d_ff=32, max_length=64)
    monkeypatch.setitem(training.SIZES, "small", config)
    return config


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine so fast that nothing is impossible on it."""
    limits = CpuLimits(1, 1e15, 1e15)
    for module in ("cli", "measure.measurement"):
        monkeypatch.setattr(f"rowmax.bench.{module}.measure_limits", lambda: limits)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limits are measured on little memory."""
    monkeypatch.setattr("rowmax.bench.machine.host._LARGE", 1 << 14)
