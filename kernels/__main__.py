"""`python -m rowmax.kernels`: what is installed, which backends work here, and why others don't."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from .. import console
from .backends import dispatch

_VECTOR_BITS = {"AVX512": 512, "AVX2": 256, "SVE256": 256, "NEON": 128, "VSX": 128, "ZVECTOR": 128}


def main() -> int:
    """Print the report."""
    for name, text in (*_versions(), *_machine()):
        print(f"{name:<10} {text}")
    print()
    print("backends")
    for name, reason in dispatch.installation().items():
        print(f"  {name:<10} {'works' if reason is None else f'does not work here: {reason}'}")
    print()
    print("backend='auto' takes the first that works and does the job; `explain` tells which:")
    for device, order in dispatch.PREFERENCE.items():
        print(f"  {device:<10} {', '.join(order)}")
    return 0


def _versions() -> list[tuple[str, str]]:
    names = ("rowmax", "torch", "numba", "llvmlite", "triton", "numpy")
    python = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    return [*((name, _version(name)) for name in names), ("python", python)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    bits = _VECTOR_BITS.get(capability)
    simd = f"{capability} ({bits}-bit vectors)" if bits else f"{capability} (vector width unknown)"
    cuda = "none"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        cuda = f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return [
        ("cpu", f"{_cpu_name()}, {os.cpu_count()} logical cores, torch uses {simd}"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"),
        ("gpu", cuda),
    ]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(console.run(main, "rowmax: "))
