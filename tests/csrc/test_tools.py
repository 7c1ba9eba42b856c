"""The tools beside the tests: a little of the fuzz on the built extension, and what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rowmax.bench.verification.implementations import Backend
from rowmax.kernels.testing.oracle import Kernel, outputs_of

from ..processes import python
from . import draw, fuzz

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return python(*command, cwd=ROOT)


@pytest.mark.usefixtures("extension")
def test_a_hundred_calls_of_the_fuzz() -> None:
    done = run("-m", "tests.csrc.fuzz", "--first-seed", "0", "--calls", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "100 calls from seed 0 on, 0 failures\n"


@pytest.mark.usefixtures("extension", "restored_threads")
def test_in_float64_lse_has_a_rounding_of_its_own() -> None:
    """Tiny scores of many keys: lse is log(keys), and the weights that it gives are no nearer."""
    assert draw.Call(1558).faults(Backend("native")) == []


class Wrong(Backend):
    def kernel(self, op: str) -> Kernel:
        right = super().kernel(op)

        def wrong(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
            out, *others = outputs_of(right(*tensors, **options))
            return out * 1.5, *others

        return wrong


@pytest.mark.usefixtures("extension", "restored_threads")
def test_the_fuzz_notices_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "Backend", Wrong)
    fuzz.make_calls(0, 5)
    printed = capsys.readouterr().out
    assert "fault attention, " in printed
    assert ": out: largest error" in printed


def test_a_crash_has_a_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child dies at seed 3; the next one begins behind it."""
    script = """
import os, sys
first = int(sys.argv[1])
for seed in range(first, 5):
    print("seed", seed, flush=True)
    if seed == 3:
        os._exit(7)
print("end")
"""
    begun = subprocess.Popen

    def dying(command: list[str], **options: Any) -> Any:
        first = command[command.index("--first-seed") + 1]
        return begun([sys.executable, "-c", script, first], **options)

    monkeypatch.setattr(subprocess, "Popen", dying)
    assert fuzz.watch(first=1, calls=4, seconds=60) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "seed 3: the process ended with status 7",
        "    again: python -m tests.csrc.fuzz --first-seed 3 --calls 1",
        "4 calls from seed 1 on, 1 failures",
    ]


# A program that says it has vectors of 128 bits, and answers no call or leaves all memory as it is.
RUNNER = """
import struct, sys
def number():
    return struct.unpack("q", sys.stdin.buffer.read(8))[0]
def say(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
say(struct.pack("3q", 16, 2, 0))
while sys.stdin.buffer.read(1):
    if sys.argv[1] == "ends":
        sys.exit(7)
    buffers = [sys.stdin.buffer.read(number()) for _ in range(number())]
    sys.stdin.buffer.read(32 + 16)
    sys.stdin.buffer.read(number() * 48)
    say(struct.pack("q", -1) + b"".join(buffers))
"""
MAKE_CALLS = """
import sys
from tests.csrc.run_parity import make_calls
print(dict(make_calls([sys.executable, "-c", *sys.argv[1:]], range(3))))
"""


@pytest.mark.parametrize(
    "behaviour, fault",
    [("ends", "the program ended with status 7"), ("idles", "out: NaN or infinity where")],
)
def test_the_parity_notices_a_wrong_kernel(behaviour: str, fault: str) -> None:
    pytest.importorskip("numba")
    done = run("-c", MAKE_CALLS, RUNNER, behaviour)
    assert done.returncode == 0, done.stderr
    *faults, counts = done.stdout.splitlines()
    assert faults[0].startswith("seed 0: vectors of 128 bits: ")
    assert fault in done.stdout
    assert counts == "{'vectors of 128 bits': 3}"


def test_a_missing_compiler_is_named() -> None:
    done = run("-m", "tests.csrc.run_parity", "--compiler", "aarch64-linux-gnu-g++-0")
    assert done.returncode == 2
    assert done.stderr.startswith("aarch64-linux-gnu-g++-0 is missing: ")


def test_a_missing_wheel_is_named() -> None:
    done = run("tests/csrc/try_wheel.py", "dist/none.whl")
    assert done.returncode == 2
    assert "dist/none.whl: no such file; `make wheel` makes one" in done.stderr
