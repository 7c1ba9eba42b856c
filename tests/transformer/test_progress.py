"""Progress in a file: a line a minute, each of them whole, and no code of a terminal."""

from __future__ import annotations

import io

import pytest

from rowmax.transformer import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_a_minute_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    with progress.progress_on(stream, "training", "step", total=600, done=100) as bar:
        for step in range(101, 601):
            now += 0.5
            bar.set_postfix_str(f"loss {step / 100}", refresh=False)
            bar.update()
            if step == 300:
                bar.write("saved", file=stream)
    assert stream.getvalue().splitlines() == [
        "training: 220/600 steps, loss 2.2",
        "saved",
        *(f"training: {step}/600 steps, loss {step / 100}" for step in (340, 460, 580, 600)),
    ]
    assert "\r" not in stream.getvalue()


def test_nothing_is_told_twice_or_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with progress.progress_on(stream, "training", "step", total=5, done=5):
        pass
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with progress.progress_on(stream, "training", "step", total=3, done=0) as bar:
        bar.set_postfix_str("loss 1.0", refresh=False)
        bar.update()
    assert "\rtraining:" in stream.getvalue()
    assert "loss 1.0" in stream.getvalue()
