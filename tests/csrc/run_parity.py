"""The kernels of csrc/ without torch: compiled into a program, which random calls are sent to.

    python -m tests.csrc.run_parity                     each instruction set of this machine
    python -m tests.csrc.run_parity --compiler aarch64-linux-gnu-g++ --emulator qemu-aarch64
    ROWMAX_SANITIZE=thread python -m tests.csrc.run_parity              with ThreadSanitizer
    python -m tests.csrc.run_parity --first-seed 7 --calls 1            one call again

Sources and flags are setup.py's, so that what runs here is what the extension holds. Another
processor's compiler gets the portable form alone. Calls are those of the fuzz (`draw.py`), only
smaller, and what judges them is the rule of `rowmax.kernels.testing`; `runner.py` takes them to the
kernels. Exit status 1 where results are wrong, 2 where a tool is missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from rowmax.kernels.backends.reference import attention_keep
from rowmax.kernels.testing.oracle import AttentionCase, TestCase

from .draw import Call
from .runner import Launches, Runner, RunnerError

ROOT = Path(__file__).resolve().parents[2]
MOST_STEPS = 1_500_000  # of a call, so that an emulated processor is not busy with it for long
PACKAGES = {  # Debian's, by what is missing
    "g++": "g++",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
# A sanitizer's report ends the program.
REPORTS = {
    "ASAN_OPTIONS": "abort_on_error=1:handle_segv=2",
    "TSAN_OPTIONS": "abort_on_error=1:halt_on_error=1",
    "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"), help="(default: g++)")
    parser.add_argument("--emulator", help="a command that runs the program, as qemu-aarch64 does")
    parser.add_argument("--calls", type=int, default=1000, help="random calls (default: 1000)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the calls (default: 0)")
    options = parser.parse_args()
    compiler = require(options.compiler)
    emulator = []
    if options.emulator is not None:
        name, *arguments = shlex.split(options.emulator)
        emulator = [require(name), *arguments]

    target = subprocess.run(
        [compiler, "-dumpmachine"], check=True, capture_output=True, text=True
    ).stdout.strip()
    sanitizers = os.environ.get("ROWMAX_SANITIZE", "")
    folder = ROOT / "build" / "-".join(filter(None, ("parity", target, sanitizers)))
    program = build(folder, compiler, target.split("-")[0] == platform.machine())

    command = [*emulator, str(program)]
    seeds = range(options.first_seed, options.first_seed + options.calls)
    workers = max(1, min(os.cpu_count() or 1, len(seeds)))
    faulty: Counter[str] = Counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        parts = [seeds[first::workers] for first in range(workers)]
        for found in pool.map(make_calls, [command] * workers, parts):
            faulty.update(found)
    for form, count in faulty.items():
        print(f"{len(seeds) - count} of {len(seeds)} calls are as accurate as naive: {form}")
    sys.exit(1 if faulty.total() else 0)


def make_calls(command: list[str], seeds: range) -> Counter[str]:
    """The calls of these seeds in each form of the program: how many of each have faults."""
    torch.set_num_threads(1)
    runners, backend = forms(command), Launches()
    faulty = Counter({str(runner): 0 for runner in runners})
    for seed in seeds:
        call = Call(seed, MOST_STEPS)
        batch_start = call.random.choice((0, 0, 5)) if isinstance(call.case, AttentionCase) else 0
        call.case = dropped_from(call.case, batch_start)
        for runner in runners:
            backend.use(runner, seed, batch_start)
            try:
                faults = call.faults(backend)
            except AssertionError as error:
                faults = [str(error)]
            except RunnerError as error:
                faults = [str(error)]
                runner.start()
            for fault in faults:
                print(f"seed {seed}: {runner}: {call.text}: {fault}", flush=True)
            faulty[str(runner)] += bool(faults)
    for runner in runners:
        runner.stop()
    return faulty


def dropped_from(case: TestCase, batch_start: int) -> TestCase:
    """The case with what is kept by dropout that counts batch elements from `batch_start`."""
    if not isinstance(case, AttentionCase) or case.options.get("dropout_p", 0.0) == 0.0:
        return case
    seed = torch.tensor(case.options["seed"])
    kept = attention_keep(seed, case.options["dropout_p"], case.shape, batch_start)
    return replace(case, kept=kept)


def forms(command: list[str]) -> list[Runner]:
    """The program in each form that the processor can run."""
    environment = REPORTS | dict(os.environ)
    widest = Runner(command, environment)
    settings = [{"ROWMAX_BFLOAT16_DOTS": "0"}] if widest.pairs else []
    narrower = (bits for bits in (256, 128) if bits < 8 * widest.vector_bytes)
    settings += [{"ROWMAX_VECTOR_BITS": str(bits)} for bits in narrower]
    return [widest, *(Runner(command, environment | each) for each in settings)]


def require(tool: str) -> str:
    """The tool's path; the end of the program, with what to do, where there is none."""
    path = shutil.which(tool)
    if path is None:
        package = PACKAGES.get(tool)
        advice = f"apt-get install {package}" if package else f"put {tool} on the PATH"
        print(f"{tool} is missing: {advice}", file=sys.stderr)
        sys.exit(2)
    return path


def build(folder: Path, compiler: str, native: bool) -> Path:
    """The program, with each kernel source compiled for each instruction set."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    write_headers = runpy.run_path(str(ROOT / "csrc" / "write_headers.py"))
    write_headers["write"](folder)
    write_headers["write_fields"](folder)
    instruction_sets = setup["INSTRUCTION_SETS"]
    if not native:
        instruction_sets = {"portable": instruction_sets["portable"]}
    common = [*setup["FLAGS"], f"-I{folder}", f"-I{ROOT / 'csrc'}", "-pthread"]
    steps = [
        (ROOT / "csrc" / source, folder / f"{isa}-{Path(source).stem}.o", [*common, *own])
        for isa, (flags, sources) in instruction_sets.items()
        for own in [[*setup["KERNEL_FLAGS"], *flags, f"-DROWMAX_ISA={isa}"]]
        for source in sources
    ]
    steps.append((ROOT / "csrc" / "kernels" / "dispatch.cpp", folder / "dispatch.o", common))
    strict = [*common, "-Wall", "-Wextra", "-Werror", "-O2"]
    steps.append((ROOT / "tests" / "csrc" / "runner.cpp", folder / "runner.o", strict))
    setup["COMPILE"]["compile_sources"]([compiler], steps)
    flags = ["-pthread", *setup["SANITIZE"], *([] if native else ["-static"])]
    setup["COMPILE"]["link"]([compiler], [made for _, made, _ in steps], folder / "runner", flags)
    return folder / "runner"


if __name__ == "__main__":
    main()
