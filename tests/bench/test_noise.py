"""Pinning is undone, drift and stolen time are seen, and a noisy run says so."""

from __future__ import annotations

import os
import platform
import sys

import pytest
import torch

from rowmax.bench.measure import noise
from rowmax.bench.measure.noise import Watch, complaints, pinned
from rowmax.kernels.testing.memory import peak_bytes

from ..processes import printed

linux = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no choice of CPUs"
)


@linux
def test_pinned_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[set[int]] = []
    monkeypatch.setattr(noise, "_move", moves.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7})
    monkeypatch.setattr(noise, "_core", lambda cpu: f"core {cpu // 4}")
    with pinned(2) as cpus:
        assert cpus == [2, 5]  # 3 and 2 share a core
        assert moves == [{2, 5}]
    assert moves[1:] == [{2, 3, 5, 7}]
    with pinned(3) as cpus:
        assert cpus == [2, 3, 5]
    with pinned(4) as cpus:
        assert cpus is None  # nothing to spare
    with pinned(1, wanted=False) as cpus:
        assert cpus is None


@linux
def test_the_process_itself_is_moved_back() -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one CPU: there is nothing to choose from")
    with pinned(1) as cpus:
        assert cpus is not None
        assert os.sched_getaffinity(0) == set(cpus)
    assert os.sched_getaffinity(0) == before


def test_a_watch_sees_drift_and_theft() -> None:
    watch = Watch([(1.0, 1.0), (1.2, 1.2)])
    assert watch.drift == pytest.approx(0.2)
    assert watch.stolen == 0.0
    assert Watch([(1.0, 2.0)]).stolen == pytest.approx(0.5)
    probed = Watch()
    probed.probe()
    assert probed.drift == 0.0
    assert probed.probes[0][0] > 0


def test_complaints() -> None:
    quiet = Watch([(1.0, 1.0), (1.01, 1.0)])
    assert complaints(quiet, 1, 10, (0.0, 0.0, 0.0)) == []
    assert complaints(quiet, 1, 10, None) == []
    busy = complaints(Watch([(1.0, 2.0), (1.5, 2.0)]), 9, 10, (99.0, 0.0, 0.0))
    words = ("load average was 99.0", "drifted by 50%", "other programs took", "9 of 10 lines")
    assert len(busy) == len(words)
    for text, word in zip(busy, words, strict=True):
        assert word in text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a peak and resets it")
def test_peak_memory_is_that_of_the_call() -> None:
    size = 64 << 20

    def call() -> torch.Tensor:
        passing = torch.ones(size // 4)
        return passing[:10].clone()

    found = peak_bytes(call, "cpu")
    assert found is not None
    assert size * 0.9 < found < size * 1.5
    small = peak_bytes(lambda: torch.ones(10), "cpu")
    assert small is not None
    assert small < size / 8


_FAULTS = """
import resource, sys, torch
from rowmax.memory import keep_freed_memory

def faults(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(mebibytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

size, limit = int(sys.argv[1]), eval(sys.argv[2])
fresh, kept = faults(size), keep_freed_memory(limit)
for _ in range(4):  # until glibc has holes for as many, whatever lies between them
    faults(size)
print(kept, fresh, faults(size))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is told")
@pytest.mark.parametrize(
    "size, limit, stays", [(40, None, True), (40, 32 << 20, False), (30, 32 << 20, True)]
)
def test_freed_memory_is_kept(size: int, limit: int | None, stays: bool) -> None:
    """In a process of its own, since nothing takes it back."""
    kept, before, after = printed("-c", _FAULTS, str(size), str(limit)).split()
    assert kept == "True"
    assert int(before) > 5 * 7  # with huge pages of 2 MiB 15 to 20 a tensor
    assert (int(after) < int(before) / 5) is stays
