"""The kernels of csrc/ without torch: compiled with tests/csrc/parity, and run.

    python tests/csrc/run_parity.py                             each instruction set of this machine
    python tests/csrc/run_parity.py --compiler aarch64-linux-gnu-g++ --emulator qemu-aarch64
    ROWMAX_SANITIZE=thread python tests/csrc/run_parity.py      with ThreadSanitizer

Sources and flags are setup.py's, so that what runs here is what the extension holds. Another
processor's compiler gets the portable form alone. Exit status 1 where results are wrong, 2 where a
tool is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {  # Debian's, by what is missing
    "g++": "g++",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
# A sanitizer's report is a SIGABRT, at which the program says its seed.
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
    ninja = require("ninja", "pip install ninja")
    compiler = require(options.compiler)
    emulator = []
    if options.emulator is not None:
        name, *arguments = shlex.split(options.emulator)
        emulator = [require(name), *arguments]

    target = subprocess.run(
        [compiler, "-dumpmachine"], check=True, capture_output=True, text=True
    ).stdout.strip()
    sanitizers = os.environ.get("ROWMAX_SANITIZE", "")
    build = ROOT / "build" / "-".join(filter(None, ("parity", target, sanitizers)))
    write_build(build, compiler, target.split("-")[0] == platform.machine())
    if subprocess.run([ninja, "--quiet", "-C", str(build)], check=False).returncode != 0:
        sys.exit(1)
    calls = [str(options.calls), str(options.first_seed)]
    failed = False
    for settings in forms([*emulator, str(build / "parity")]):
        done = subprocess.run(
            [*emulator, str(build / "parity"), *calls],
            env={**REPORTS, **os.environ, **settings},
            check=False,
        )
        failed = failed or done.returncode != 0
    sys.exit(1 if failed else 0)


def require(tool: str, advice: str | None = None) -> str:
    """The tool's path; the end of the program, with what to do, where there is none."""
    beside = Path(sys.executable).parent / tool  # an environment that is not activated
    path = shutil.which(tool) or (str(beside) if beside.is_file() else None)
    if path is None:
        package = PACKAGES.get(tool)
        if advice is None:
            advice = f"apt-get install {package}" if package else f"put {tool} on the PATH"
        print(f"{tool} is missing: {advice}", file=sys.stderr)
        sys.exit(2)
    return path


def write_build(build: Path, compiler: str, native: bool) -> None:
    """A ninja file that compiles each kernel source for each instruction set, and the test."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    runpy.run_path(str(ROOT / "csrc" / "write_headers.py"))["write"](build)
    instruction_sets = setup["INSTRUCTION_SETS"]
    if not native:
        instruction_sets = {"portable": instruction_sets["portable"]}
    flags = [*setup["FLAGS"], "-I.", f"-I{ROOT}/csrc", "-pthread"]
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {compiler} $in -o $out -pthread {' '.join(setup['SANITIZE'])}"
        + ("" if native else " -static"),
    ]
    objects = []

    def compile_source(name: str, source: Path, own: list[str]) -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: compile {source}", f"  flags = {' '.join([*flags, *own])}"])

    for isa, (isa_flags, sources) in instruction_sets.items():
        own = [*setup["KERNEL_FLAGS"], *isa_flags, f"-DROWMAX_ISA={isa}"]
        for source in sources:
            compile_source(f"{isa}-{Path(source).stem}", ROOT / "csrc" / source, own)
    compile_source("dispatch", ROOT / "csrc" / "kernels" / "dispatch.cpp", [])
    warnings = ["-Wall", "-Wextra", "-Werror", "-O2"]
    compile_source("main", ROOT / "tests" / "csrc" / "parity" / "main.cpp", warnings)
    lines += [f"build parity: link {' '.join(objects)}", "default parity", ""]
    (build / "build.ninja").write_text("\n".join(lines))


def forms(command: list[str]) -> list[dict[str, str]]:
    """The environment's settings that choose each form that the processor can run."""
    done = subprocess.run([*command, "0"], check=True, capture_output=True, text=True)
    found = re.search(r"vectors of (\d+) bits(, bfloat16)?", done.stdout)
    assert found is not None, done.stdout
    widest = int(found[1])
    settings = [{}, {"ROWMAX_BFLOAT16_DOTS": "0"}] if found[2] else [{}]
    narrower = (bits for bits in (256, 128) if bits < widest)
    return [*settings, *({"ROWMAX_VECTOR_BITS": str(bits)} for bits in narrower)]


if __name__ == "__main__":
    main()
