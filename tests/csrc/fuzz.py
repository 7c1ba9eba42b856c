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
import random
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rowmax.bench.verification.implementations import Backend
from rowmax.kernels import ALiBi, Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window
from rowmax.kernels.backends import dispatch
from rowmax.kernels.testing.cases import Draw, Shape, packed_case
from rowmax.kernels.testing.oracle import (
    AttentionCase,
    Results,
    TestCase,
    random_gradients,
)
from rowmax.kernels.testing.rows import RowCase, norm_case
from rowmax.kernels.testing.tolerance import faults_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FAR = (2**40, 2**61)  # beyond every position, and near what could overflow
LONGEST_CALL = 120.0  # seconds; longer is a hang
MOST_FAILURES = 10


class Call:
    """The call that follows from a seed: a test case, and a line that describes it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.dtype = self.random.choice(DTYPES)
        self.draw = Draw(seed, self.dtype)
        self.threads = self.random.randint(1, 4)
        self.text = f"{self.dtype}, {self.threads} threads"

    def faults(self) -> list[str]:
        """What is wrong with the backend's results."""
        kind = self.random.choices(("attention", "packed", "norm", "softmax"), (6, 2, 2, 2))[0]
        self.text = f"{kind}, {self.text}"
        torch.set_num_threads(self.threads)
        if kind == "attention":
            return self._attention()
        make = {"packed": self._packed, "norm": self._norm, "softmax": self._softmax}[kind]
        case = make()
        return _faults(_run(case), case)

    # --- attention --------------------------------------------------------------------------------

    def _attention(self) -> list[str]:
        """The oracle sees clean tensors; the backend gets NaN in keys that nothing attends."""
        arguments = self._arguments(self._sizes())
        mask = arguments.mask
        if isinstance(mask, Mask) and self._now_and_then():
            met = mask.dense(*arguments.shape).expand(arguments.shape).any(2).any(1)  # (B, Lk)
            given: dict[str, Any] = {
                name: tensor.masked_fill(~met[:, None, :, None], torch.nan)
                for name, tensor in (("k", arguments.k), ("v", arguments.v))
            }
            self.text += ", NaN in padding"
        else:
            given = {}
        return _faults(_run(replace(arguments, **given)), arguments)

    def _arguments(self, sizes: Shape) -> AttentionCase:
        factor = self.random.choice((1.0, 1.0, 1e-3, 20.0))
        heads = (sizes.B, sizes.Hq, sizes.Lq), (sizes.B, sizes.Hkv, sizes.Lk)
        arguments = AttentionCase(
            q=self._laid_out(self.draw.normal(*heads[0], sizes.D) * factor),
            k=self._laid_out(self.draw.normal(*heads[1], sizes.D)),
            v=self._laid_out(self.draw.normal(*heads[1], sizes.Dv)),
            mask=self._mask(sizes) if self._now_and_then(0.7) else None,
            bias=self._bias(sizes),
            sinks=self.draw.normal(sizes.Hq) if self._now_and_then() else None,
            options=self._options(),
        )
        arguments = random_gradients(arguments, self.draw.generator)
        assert arguments.grad_out is not None  # random_gradients draws it
        return replace(arguments, grad_out=self._laid_out(arguments.grad_out))

    def _sizes(self, least_batch: int = 0) -> Shape:
        pick = self.random
        key_heads = pick.choice((1, 1, 2, 2, 3))
        sizes = Shape(
            B=max(least_batch, pick.choice((0, 1, 1, 2, 2, 3))),
            Hq=key_heads * pick.choice((1, 1, 2, 3)),
            Hkv=key_heads,
            Lq=self._length(),
            Lk=self._length(),
            D=self._width(),
            Dv=self._width(),
        )
        self.text += f", {tuple(sizes)}"
        return sizes

    def _length(self) -> int:
        pick = self.random
        common = pick.randint(0, 40), pick.choice((63, 64, 65, 127, 128, 129, 257)), 520
        return pick.choices(common, (12, 4, 1))[0]

    def _width(self) -> int:
        pick = self.random
        return pick.choices((pick.randint(0, 24), pick.choice((32, 64, 65, 128, 200))), (3, 1))[0]

    def _options(self) -> dict[str, Any]:
        pick, options = self.random, {}
        if self._now_and_then(0.4):
            options["scale"] = pick.choice((0.0, pick.uniform(-1, 1)))
        if self._now_and_then(0.15):
            options["softcap"] = pick.uniform(0.1, 10)
        if self._now_and_then():
            options["dropout_p"] = pick.choice((1.0, 2.0**-33, pick.random()))
            options["seed"] = pick.randint(-(2**63), 2**63 - 1)
        self.text += "".join(f", {name}={value}" for name, value in options.items())
        return options

    def _bias(self, sizes: Shape) -> Tensor | ALiBi | None:
        kind = self.random.choices(("none", "tensor", "alibi"), (6, 2, 1))[0]
        if kind == "none":
            return None
        if kind == "alibi":
            per_batch = (sizes.B,) if self._now_and_then(0.5) else ()
            self.text += ", ALiBi"
            return ALiBi(self.draw.normal(*per_batch, sizes.Hq).abs(), self._align(sizes.B, 0))
        shape = self._broadcast(sizes.scores)
        self.text += f", bias {shape}"
        bias = self.draw.normal(*shape)
        if self._now_and_then():
            bias = bias.masked_fill(self.draw.coins(0.2, *shape), -torch.inf)
        return self._laid_out(bias)

    def _mask(self, sizes: Shape) -> Mask:
        classes = Causal, Window, KeyLengths, QueryLengths, Dense, Documents
        kinds = self.random.choices(classes, k=self.random.randint(1, 3))
        self.text += f", {' & '.join(kind.__name__ for kind in kinds)}"
        parts = [self._one_mask(kind, sizes) for kind in kinds]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part
        return joined

    def _one_mask(self, kind: type[Mask], sizes: Shape) -> Mask:
        pick = self.random
        if kind is Causal:
            return Causal(self._align(sizes.B))
        if kind is Window:
            far = pick.choice(FAR)
            left, right = (pick.choice((None, 0, pick.randint(0, 300), far)) for _ in range(2))
            return Window(left, right, self._align(sizes.B))
        if kind is KeyLengths:
            return KeyLengths(self.draw.lengths(sizes.Lk + 3, sizes.B))
        if kind is QueryLengths:
            return QueryLengths(self.draw.lengths(sizes.Lq + 3, sizes.B))
        if kind is Dense:
            shape = self._broadcast(sizes.scores)
            allowed = self.draw.coins(pick.choice((0.05, 0.7, 0.98)), *shape)
            return Dense(self._laid_out(allowed))
        ids = [self._ids(sizes.B, length) for length in (sizes.Lq, sizes.Lk)]
        return Documents(*ids)

    def _ids(self, batch: int, length: int) -> Tensor:
        ids = torch.randint(3, (batch, length), generator=self.draw.generator)
        return ids.sort(dim=1).values if self._now_and_then(0.7) else ids

    def _align(self, batch: int, far_share: int = 1) -> Any:
        pick = self.random
        far = pick.choice((1, -1)) * pick.choice(FAR)
        kinds = "upper_left", "lower_right", pick.randint(-300, 300), far, None
        align = pick.choices(kinds, (3, 3, 3, far_share, 2))[0]
        if align is not None:
            return align
        return torch.randint(-40, 40, (batch,), generator=self.draw.generator)

    def _packed(self) -> TestCase:
        """Sequences of any lengths; the oracle sees them padded, the lengths as masks."""
        sizes = self._sizes(least_batch=1)
        queries, keys = self.draw.lengths(sizes.Lq, sizes.B), self.draw.lengths(sizes.Lk, sizes.B)
        mask: Mask | None = None
        if self._now_and_then(0.6):  # positions from the sequence's start: padding moves none
            left, right = (self.random.choice((None, 0, 7, 200)) for _ in range(2))
            shift: Any = self.random.choice(("upper_left", self.random.randint(-20, 40)))
            mask = self.random.choice((Causal(shift), Window(left, right, shift)))
        slopes = self.draw.normal(sizes.Hq).abs()
        arguments = random_gradients(
            AttentionCase(
                q=self.draw.normal(sizes.B, sizes.Hq, sizes.Lq, sizes.D),
                k=self.draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.D),
                v=self.draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.Dv),
                mask=mask,
                bias=ALiBi(slopes, "upper_left") if self._now_and_then(0.2) else None,
                sinks=self.draw.normal(sizes.Hq) if self._now_and_then() else None,
                options=self._options(),
            ),
            self.draw.generator,
        )
        self.text += f", {mask}"
        return packed_case(arguments, queries, keys)

    # --- rows -------------------------------------------------------------------------------------

    def _norm(self) -> TestCase:
        pick = self.random
        op = pick.choice(("layer_norm", "add_layer_norm", "rms_norm"))
        columns = (pick.randint(1, 70), pick.choice((256, 515, 1536, 1601, 4096)))
        shape = pick.choice((0, 1, 5, 33, 150)), pick.choices(columns, (3, 1))[0]
        options: dict[str, Any] = {"eps": pick.choice((1e-5, 0.5))}
        if op == "add_layer_norm" and self._now_and_then(0.5):
            options |= {"dropout_p": pick.random(), "seed": pick.randint(-(2**63), 2**63 - 1)}
        parameters = pick.choice(((), ("weight",), ("weight", "bias")))
        self.text += f", {op} {shape} {parameters} {options}"
        x = self._laid_out(self.draw.normal(*shape) + pick.choice((0.0, 0.0, 30.0)))
        return norm_case(op, x, self.draw, parameters, options)

    def _softmax(self) -> TestCase:
        sizes = self._sizes()
        mask = self._mask(sizes) if self._now_and_then(0.8) else None
        options = {"scale": self.random.uniform(-2, 2)} if self._now_and_then() else {}
        self.text += f" {options}"
        scores = self._laid_out(self.draw.normal(*sizes.scores))
        grad = self._laid_out(self.draw.normal(*sizes.scores))
        return RowCase("masked_softmax", {"scores": scores}, (grad,), mask, options)

    # --- drawing ----------------------------------------------------------------------------------

    def _now_and_then(self, share: float = 0.25) -> bool:
        return self.random.random() < share

    def _broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(1 if self._now_and_then(0.4) else size for size in shape)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """The values in memory with dimensions in any order, and NaN between and around them."""
        if self._now_and_then(0.4):
            return tensor
        order = list(range(tensor.dim()))
        if self._now_and_then(0.3):
            self.random.shuffle(order)
        else:  # the last stays last, as kernels read it without a copy
            leading = order[:-1]
            self.random.shuffle(leading)
            order[:-1] = leading
        moved = tensor.permute(order)
        before = [self.random.choice((0, 0, 1, 3)) for _ in order]
        after = [self.random.choice((0, 0, 1, 5)) for _ in order]
        room = [sum(sizes) for sizes in zip(before, moved.shape, after, strict=True)]
        filling = torch.nan if tensor.is_floating_point() else 1
        storage = torch.full(room, filling, dtype=tensor.dtype)
        for dimension, start in enumerate(before):
            storage = storage.narrow(dimension, start, moved.shape[dimension])
        storage.copy_(moved)
        return storage.permute([order.index(dimension) for dimension in range(len(order))])


def _run(case: TestCase) -> Results:
    return case.run(Backend("native").kernel(case.op))


def _faults(results: Results, case: TestCase) -> list[str]:
    return faults_of(results, case.expected, case.sum_dtype)


# --- the child, and the parent that watches it ----------------------------------------------------


def make_calls(first: int, calls: int) -> None:
    """Say each seed before its call, and what came of it behind it."""
    for seed in range(first, first + calls):
        print(f"seed {seed}", flush=True)
        call = Call(seed)
        try:
            faults = call.faults()
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
