"""clang-tidy over csrc/, each source with setup.py's flags for the widest instruction set.

    python -m tests.csrc.run_tidy            all sources; exit status 1 where a check fails

The checks stand in .clang-tidy.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    with tempfile.TemporaryDirectory() as headers:
        runpy.run_path(str(ROOT / "csrc" / "write_headers.py"))["write"](Path(headers))
        flags = [
            *("-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{headers}"),
            f"-isystem{setup['PYTHON_HEADERS']}",
        ]
        commands = [[source, *flags] for source in setup["SOURCES"]]
        for source in setup["KERNEL_SOURCES"]:
            sets = setup["INSTRUCTION_SETS"].items()
            name, extra = [(name, own) for name, (own, sources) in sets if source in sources][-1]
            commands.append([source, *flags, *extra, f"-DROWMAX_ISA={name}"])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            passed = list(pool.map(check, commands))
    sys.exit(0 if all(passed) else 1)


def check(command: list[str]) -> bool:
    """Whether a source passes; what fails is printed."""
    source, *flags = command
    done = subprocess.run(
        [
            Path(sys.executable).with_name("clang-tidy"),
            "--quiet",
            ROOT / "csrc" / source,
            "--",
            *flags,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout, done.stderr, sep="", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    main()
