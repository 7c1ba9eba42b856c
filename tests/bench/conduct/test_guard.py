"""Clocks, seal and threads: what a candidate does to the process is seen, and put back."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rowmax.bench.conduct import clocks
from rowmax.bench.conduct.clocks import Agreement, ClockError
from rowmax.bench.conduct.guard import Guard
from rowmax.bench.conduct.seal import Seal
from rowmax.bench.conduct.threads import Threads
from rowmax.bench.measure.timing import HostTimer
from rowmax.kernels.testing import tolerance


def test_two_clocks_agree() -> None:
    agreement = Agreement(clocks.host)
    time.sleep(5e-3)
    agreement.check()


@pytest.mark.parametrize("rate", [0.5, 0.9, 1.2, 0.0])
def test_a_clock_that_is_wrong_does_not_agree(rate: float) -> None:
    agreement = Agreement(lambda: rate * perf_counter())
    time.sleep(5e-3)
    with pytest.raises(ClockError, match="two clocks do not agree: "):
        agreement.check()


def test_a_timer_whose_clock_is_replaced_gives_no_time() -> None:
    between = SimpleNamespace(before=lambda **_: None, after=None)
    timer = HostTimer()
    assert timer.sample(lambda: time.sleep(1e-3), 3, between) >= 1e-3
    timer.now = lambda: perf_counter() / 2
    with pytest.raises(ClockError):
        timer.sample(lambda: time.sleep(1e-3), 3, between)


def one_changed_code() -> None:
    def other(*_arguments: object, **_options: object) -> None: ...

    tolerance.histogram.__code__ = other.__code__


CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "clock": (lambda: setattr(time, "monotonic_ns", lambda: 0), "time.monotonic_ns"),
    "function": (lambda: setattr(F, "softmax", F.relu), "torch.nn.functional.softmax"),
    "method": (lambda: setattr(torch.Tensor, "abs", torch.Tensor.neg), "torch.Tensor.abs"),
    "event": (lambda: setattr(torch.cuda.Event, "record", len), "torch.cuda.Event.record"),
    "rule": (
        lambda: setattr(tolerance, "measure", len),
        "rowmax.kernels.testing.tolerance.measure",
    ),
    "code": (one_changed_code, "rowmax.kernels.testing.tolerance.histogram"),
    "class": (lambda: setattr(HostTimer, "sample", len), "measure.timing.HostTimer.sample"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "default dtype"),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "number of threads"),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), "precision"),
    "denormals": (lambda: torch.set_flush_denormal(True), "denormal"),
    "collection": (gc.disable, "garbage collection"),
}


@pytest.fixture
def seal() -> Iterator[Seal]:
    found = Seal()
    yield found
    found.restore()


@pytest.mark.parametrize("name", CHANGES)
def test_a_seal_sees_what_is_changed_and_puts_it_back(name: str, seal: Seal) -> None:
    change, words = CHANGES[name]
    assert seal.broken() is None
    if name == "denormals" and not torch.set_flush_denormal(False):
        pytest.skip("this CPU does not flush denormal numbers")
    change()
    assert words in str(seal.broken())
    seal.restore()
    assert seal.broken() is None


def test_a_clock_replaced_before_the_seal_is_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    assert Seal().broken() == "it replaced time.perf_counter"


def test_a_pool_that_waits_is_no_fault_and_one_that_works_is() -> None:
    threads, waiting, ended = Threads(), threading.Event(), threading.Event()
    pool = threading.Thread(target=waiting.wait)
    pool.start()
    assert threads.alive() == {pool.ident}
    assert threads.fault() is None

    def work() -> None:
        while not ended.is_set():
            sum(range(1000))

    busy = threading.Thread(target=work)
    busy.start()
    try:
        assert threads.fault() == "a thread that it left behind works when it has returned"
    finally:
        ended.set()
        waiting.set()
        busy.join()
        pool.join()
    assert threads.fault() is None


def test_a_thread_that_works_while_others_are_timed() -> None:
    threads, waiting = Threads(), threading.Event()
    pool = threading.Thread(target=waiting.wait)
    pool.start()
    try:
        threads.others(1.0, 0.1)
        assert threads.fault() is None
        threads.others(1.0, 0.9)
        assert "while others are timed" in str(threads.fault())
    finally:
        waiting.set()
        pool.join()


def test_a_guard_puts_back_what_it_finds_changed() -> None:
    guard, before = Guard(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    assert guard.fault() == "it changed torch's default dtype from torch.float32 to torch.float64"
    assert torch.get_default_dtype() is before
    assert guard.fault() is None
