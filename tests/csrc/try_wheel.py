"""The wheel, installed where nothing else is: with several torch versions and several Pythons.

    python tests/csrc/try_wheel.py dist/rowmax-0.1.0-cp310-abi3-manylinux_2_34_x86_64.whl \
        --torch 2.13.0 --torch 2.12.0 --python python3.11 --python python3.13

Each pair of a Python and a torch gets a fresh environment, in which one pip command installs the
wheel and that torch, and `wheel_sample.py` runs. Two more ways, where pip can't get a pair:

    --environment PYTHON    a Python that has torch already: the wheel goes before its packages
    --bare PYTHON           a Python without torch: the extension is loaded beside the libtorch of
                            this Python, and one of its operators called

Environments are made below build/wheels and removed after use. Exit status 1 after any failure, 2
where the wheel or a Python is missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "build" / "wheels"
SAMPLE = Path(__file__).with_name("wheel_sample.py")
BARE = Path(__file__).with_name("wheel_bare.py")
# What a wheel holds: the packages, their data, the extension, and its own description.
SUFFIXES = {".py", ".typed", ".json", ".html", ".so", ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", action="append", default=[], help="a version that pip can get")
    parser.add_argument("--python", action="append", default=[], help="(default: this one)")
    parser.add_argument("--environment", action="append", default=[], help="a Python with torch")
    parser.add_argument("--bare", action="append", default=[], help="a Python without torch")
    options = parser.parse_args()
    if not options.wheel.is_file():
        parser.error(f"{options.wheel}: no such file; `make wheel` makes one")
    pythons = [found(name, parser) for name in options.python] or [sys.executable]
    environments = [found(name, parser) for name in options.environment]
    bare = [found(name, parser) for name in options.bare]

    failures = wrong_contents(options.wheel)
    trials: list[tuple[str, Callable[..., str | None], tuple[Any, ...]]] = [
        (f"{version(python)}, torch {torch}", fresh_environment, (options.wheel, python, torch))
        for python in pythons
        for torch in options.torch
    ]
    trials += [
        (f"{version(python)} of {python}", existing_environment, (options.wheel, python))
        for python in environments
    ]
    trials += [
        (f"{version(python)} without torch's package", without_torch, (options.wheel, python))
        for python in bare
    ]
    for name, attempt, arguments in trials:
        shutil.rmtree(ROOM, ignore_errors=True)
        ROOM.mkdir(parents=True)
        fault = attempt(*arguments)
        print(f"{name}: {'works' if fault is None else 'FAILS'}", flush=True)
        if fault is not None:
            failures.append(f"{name}: {fault}")
    shutil.rmtree(ROOM, ignore_errors=True)
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)


def found(python: str, parser: argparse.ArgumentParser) -> str:
    path = shutil.which(python)
    if path is None:
        parser.error(f"{python}: no such Python here")
    return os.path.abspath(path)


def version(python: str) -> str:
    script = "import platform; print(platform.python_version())"
    output = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return f"Python {output.stdout.strip()}"


def wrong_contents(wheel: Path) -> list[str]:
    """Files that a user of the packages has no use for: sources of csrc, tests, caches."""
    with zipfile.ZipFile(wheel) as archive:
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    described = wheel.name.split("-")
    info = f"{described[0]}-{described[1]}.dist-info/"
    packages = {"rowmax", "rowmax/kernels", "rowmax/transformer", "rowmax/bench"}
    strange = [
        name
        for name in names
        if not name.startswith(info)
        and not (packages & set(map(str, Path(name).parents)) and Path(name).suffix in SUFFIXES)
    ]
    faults = [f"{wheel.name}: holds {name}" for name in strange]
    if "rowmax/kernels/_C.abi3.so" not in names:
        faults.append(f"{wheel.name}: no rowmax/kernels/_C.abi3.so")
    return faults


# Each of these returns what went wrong, or None.


def fresh_environment(wheel: Path, python: str, torch: str) -> str | None:
    interpreter = str(ROOM / "bin" / "python")
    extra = shlex.split(os.environ.get("PIP_ARGS", ""))
    install = [interpreter, "-m", "pip", "install", "-q", *extra, str(wheel.resolve())]
    return (
        run([python, "-m", "venv", str(ROOM)])
        or run([*install, f"torch=={torch}"])
        or run([interpreter, str(SAMPLE)])
    )


def existing_environment(wheel: Path, python: str) -> str | None:
    return unpack(wheel) or run([python, str(SAMPLE)], PYTHONPATH=str(ROOM / "rowmax"))


def without_torch(wheel: Path, python: str) -> str | None:
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    extension = ROOM / "rowmax" / "rowmax" / "kernels" / "_C.abi3.so"
    return unpack(wheel) or run([python, "-I", str(BARE), str(libraries), str(extension)])


def unpack(wheel: Path) -> str | None:
    target = str(ROOM / "rowmax")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    return run([*install, "--target", target, str(wheel)])


def run(command: list[str], **variables: str) -> str | None:
    """In an empty folder, so that nothing of the checkout can be imported."""
    empty = ROOM / "empty"
    empty.mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=empty if "pip" not in command else None,
        env={**os.environ, **variables},
    )
    if done.returncode == 0:
        return None
    return f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"


if __name__ == "__main__":
    main()
