"""Random calls of the backend "native", forward and backward, held to the rule of `bench verify`.

    python -m tests.csrc.fuzz --seconds 600                ten minutes, from a random seed on
    python -m tests.csrc.fuzz --first-seed 7 --calls 1     one call again

Each call follows from its seed alone: the function, the dtype, shapes, strides (with NaN in the
gaps), masks, features and the number of threads. Calls are made in a child process, so that a crash
or a hang has a seed too. `make fuzz` runs this on an extension built with AddressSanitizer and
UndefinedBehaviorSanitizer, whose reports end the child. Exit status 1 after any failure.
"""

from __future__ import annotations

import argparse
import queue
import secrets
import subprocess
import sys
import threading
import time

import torch

from rowmax.bench.verification.implementations import Backend
from rowmax.kernels.backends import dispatch

from .draw import Call

LONGEST_CALL = 120.0  # seconds; longer is a hang
MOST_FAILURES = 10


# --- the child, and the parent that watches it ----------------------------------------------------


def make_calls(first: int, calls: int) -> None:
    """Say each seed before its call, and what came of it behind it."""
    for seed in range(first, first + calls):
        print(f"seed {seed}", flush=True)
        call = Call(seed)
        torch.set_num_threads(call.threads)
        try:
            faults = call.faults(Backend("native"))
        except Exception as error:
            faults = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        for fault in faults:
            print(f"fault {call.text}: {fault}", flush=True)
    print("end", flush=True)


class Child:
    """A process that makes calls, line by line."""

    def __init__(self, first: int, calls: int) -> None:
        options = ["--worker", "--first-seed", str(first), "--calls", str(calls)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.csrc.fuzz", *options], stdout=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def line(self) -> str | None:
        """The next line, or None at the end. Raises queue.Empty after a hang."""
        return self.lines.get(timeout=LONGEST_CALL)

    def stop(self) -> int:
        self.process.kill()
        return self.process.wait()


def watch(first: int, calls: int, seconds: float) -> int:
    """Make calls until there were so many, or so long; the number of failures."""
    end, failures, seed, made = time.monotonic() + seconds, 0, first - 1, 0
    child = Child(first, calls)
    last_report = time.monotonic()
    while time.monotonic() < end and failures < MOST_FAILURES:
        fault: str | None = None
        try:
            line = child.line()
        except queue.Empty:
            line, fault = None, f"no answer for {LONGEST_CALL:.0f} s"
        if line == "end":
            made += 1
            break
        if line is None:
            status = child.stop() if fault else child.process.wait()
            fault = fault or f"the process ended with status {status}"
            child = Child(seed + 1, first + calls - seed - 1)
        elif line.startswith("seed "):
            made += seed >= first
            seed = int(line.removeprefix("seed "))
        elif line.startswith("fault "):
            fault = line.removeprefix("fault ")
        if fault is not None:
            failures += 1
            print(f"seed {seed}: {fault}", flush=True)
            print(f"    again: python -m tests.csrc.fuzz --first-seed {seed} --calls 1", flush=True)
        if time.monotonic() - last_report > 60:
            last_report = time.monotonic()
            print(f"{made} calls, {failures} failures", flush=True)
    child.stop()
    print(f"{made} calls from seed {first} on, {failures} failures")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="at most (default: 600)")
    parser.add_argument("--calls", type=int, default=2**31, help="at most (default: no limit)")
    parser.add_argument("--first-seed", type=int, help="(default: a random one)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    first = options.first_seed
    if first is None:
        first = secrets.randbelow(2**31)
    reason = dispatch.installation()["native"]
    if reason is not None:
        parser.error(reason)
    if options.worker:
        make_calls(first, options.calls)
    else:
        sys.exit(1 if watch(first, options.calls, options.seconds) else 0)


if __name__ == "__main__":
    main()
