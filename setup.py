"""Build description of rowmax: where the packages lie, and the optional C++ extension.

The folders `kernels/`, `transformer/` and `bench/` of the checkout are the packages
`rowmax.kernels`, `rowmax.transformer` and `rowmax.bench`, and `package/` is `rowmax` itself.
Everything that does not depend on the machine stands in pyproject.toml.

The extension `rowmax.kernels._C` is built where a C++20 compiler is found; CXX names another one.
It needs no torch: csrc/binding/libtorch.h declares the C functions of torch that it uses, and finds
them when it is loaded. For pip builds a package before it installs what the package depends on, in
an environment of its own; a build that wanted torch would download one of several gigabytes there,
with CUDA, to read a few headers. The environment variable ROWMAX_EXTENSION says what happens
without a compiler:

    auto      (default) build it if that works; if not, install the pure Python package
    require   fail where it can't be built
    skip      don't try

Without it the package holds missing_extension.txt with the reason, which the first call on a CPU
and `python -m rowmax.kernels` show. ROWMAX_SANITIZE=address,undefined builds it with these
sanitizers (`make sanitize`).
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE_DIR = {
    "rowmax": "package",
    "rowmax.kernels": "kernels",
    "rowmax.transformer": "transformer",
    "rowmax.bench": "bench",
}
CHOICES = ("auto", "require", "skip")
MISSING = "missing_extension.txt"
COMPILE = runpy.run_path(str(ROOT / "csrc" / "compile.py"))
COMPILER: list[str] = COMPILE["compiler"]()
MACHINE: str = COMPILE["target_machine"](COMPILER) or platform.machine()
PYTHON_HEADERS = sysconfig.get_paths()["include"]
# Compiled once: the binding. Its headers, and those that the build writes, are in here.
SOURCES = [
    "binding/attention_launch.cpp",
    "binding/attention_plan.cpp",
    "kernels/dispatch.cpp",
    "binding/module.cpp",
    "binding/fast_path_attention.cpp",
    "binding/fast_path.cpp",
    "binding/fast_path_norm.cpp",
    "binding/libtorch.cpp",
    "binding/rows_launch.cpp",
    "binding/threads.cpp",
]
# Compiled once for each instruction set, which is chosen at run time (csrc/kernels/dispatch.cpp).
KERNEL_SOURCES = [
    "kernels/attention_decode.cpp",
    "kernels/attention_forward.cpp",
    "kernels/attention_backward_kernels.cpp",
    "kernels/norm_forward.cpp",
    "kernels/norm_backward.cpp",
    "kernels/softmax.cpp",
    "kernels/cross_entropy.cpp",
]
# Name -> its flags, and what is compiled for it.
INSTRUCTION_SETS: dict[str, tuple[list[str], list[str]]] = {"portable": ([], KERNEL_SOURCES)}
if MACHINE == "x86_64":
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = [*AVX2, "-mprfchw", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]
    INSTRUCTION_SETS |= {
        "avx2": (AVX2, KERNEL_SOURCES),
        "avx512": (AVX512, KERNEL_SOURCES),
        "avx512_bf16": (
            [*AVX512, "-mavx512bf16"],
            ["kernels/attention_forward.cpp", "kernels/attention_backward_kernels.cpp"],
        ),
    }
FLAGS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
# Products and sums are fused where the source says so, and nowhere else: the same bits in every
# tile shape. No kernel looks at the flags that a floating-point operation may raise. GCC's own
# header of AVX-512 makes it warn of variables that are left undefined on purpose.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-trapping-math", "-Wno-psabi", "-Wno-uninitialized"]
# What a compiler must know: C++20, vectors, and where Python's headers are.
PROBE = """
#include <Python.h>
#include <concepts>
typedef int V __attribute__((vector_size(16)));
V turned(V v) { return __builtin_shufflevector(v, v, 3, 2, 1, 0); }
"""
# Sanitizers end the process at the first fault, and scratch memory starts as NaN.
SANITIZE: list[str] = []
if os.environ.get("ROWMAX_SANITIZE"):
    SANITIZE = [f"-fsanitize={os.environ['ROWMAX_SANITIZE']}", "-fno-sanitize-recover=all"]
    FLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer", "-DROWMAX_POISON"]


def all_packages() -> list[str]:
    """The public packages and every subpackage found below their folders."""
    names: list[str] = []
    for package, folder in PACKAGE_DIR.items():
        names.append(package)
        names += [f"{package}.{sub}" for sub in find_packages(str(ROOT / folder))]
    return names


def report_absence(reason: object, folder: Path = ROOT / "kernels") -> None:
    """Say on standard error, and in the package, why this build goes on without the extension."""
    print(
        f"rowmax: building without the C++ extension rowmax.kernels._C: {reason}", file=sys.stderr
    )
    (folder / MISSING).write_text(f"{reason}\n")


def compiler_fault(compiler: list[str]) -> str | None:
    """Why `compiler` can't build the extension, found with a small program; or None."""
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler: {compiler[0]} is not on the PATH"
    done = subprocess.run(
        [*compiler, *FLAGS, "-fsyntax-only", "-x", "c++", f"-I{PYTHON_HEADERS}", "-"],
        input=PROBE,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    error = next((line for line in lines if "error" in line), lines[0])
    return f"{shlex.join(compiler)} can't compile it; GCC >= 12 with Python's headers can: {error}"


def extension_arguments() -> dict[str, Any]:
    """The arguments of `setup` that build the extension; none where it can't or shan't be."""
    choice = os.environ.get("ROWMAX_EXTENSION", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"ROWMAX_EXTENSION: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "skip":
        report_absence("ROWMAX_EXTENSION=skip")
        return {}
    fault = compiler_fault(COMPILER)
    if fault is not None:
        if choice == "require":
            raise SystemExit(f"rowmax: {fault}")
        report_absence(fault)
        return {}
    (ROOT / "kernels" / MISSING).unlink(missing_ok=True)
    extension = Extension(
        "rowmax.kernels._C",
        sources=[f"csrc/{source}" for source in SOURCES],
        py_limited_api=True,
    )
    # An optional extension may be missing from the build folder when files are collected.
    extension.optional = choice == "auto"
    wheel = {"py_limited_api": "cp310"}
    if platform.machine() != MACHINE and MACHINE in ("x86_64", "aarch64"):  # cross-compiled
        wheel["plat_name"] = f"linux_{MACHINE}"
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": wheel},
    }


class BuildExtension(build_ext):
    """Compiles and links the extension; under `auto` a failure is reported, not raised."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_and_link(Path(self.get_ext_fullpath(ext.name)))
        except (OSError, COMPILE["CompileError"]) as error:
            if not ext.optional:
                raise
            inside = ROOT if self.inplace or self.editable_mode else Path(self.build_lib, "rowmax")
            report_absence(error, inside / "kernels")

    def compile_and_link(self, library: Path) -> None:
        # An editable install's own folder is a new one each time.
        build = (
            ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        )
        runpy.run_path(str(ROOT / "csrc" / "write_headers.py"))["write"](build)
        common = [*FLAGS, "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{build}"]
        binding = [*common, "-DPy_LIMITED_API=0x030a0000", f"-I{PYTHON_HEADERS}"]
        csrc = ROOT / "csrc"
        steps = [(csrc / name, build / f"{Path(name).stem}.o", binding) for name in SOURCES]
        for isa, (flags, names) in INSTRUCTION_SETS.items():
            own = [*common, *KERNEL_FLAGS, *flags, f"-DROWMAX_ISA={isa}"]
            steps += [(csrc / name, build / isa / f"{Path(name).stem}.o", own) for name in names]
        COMPILE["compile_sources"](COMPILER, steps)
        objects = [made for _, made, _ in steps]
        COMPILE["link"](COMPILER, objects, library, ["-shared", "-pthread", "-ldl", *SANITIZE])


# (tests/csrc/run_parity.py reads the tables above.)
if __name__ == "__main__":
    setup(
        package_dir=PACKAGE_DIR,
        packages=all_packages(),
        package_data={
            **{package: ["py.typed"] for package in PACKAGE_DIR},
            "rowmax.kernels": ["py.typed", MISSING],
            "rowmax.kernels.backends.gpu_triton": ["configs.json"],
            "rowmax.bench.render": ["page.html"],
            "rowmax.transformer": ["py.typed", "attention_page.html"],
        },
        **extension_arguments(),
    )
