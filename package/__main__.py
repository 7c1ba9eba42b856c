"""`python -m rowmax`: what works on this machine, and what the missing extras would bring."""

from __future__ import annotations

import re
import sys
from importlib import metadata

from . import console
from .kernels import __main__ as kernels

# What an extra is for, in the order of the report.
_PURPOSES = {
    "transformer": "python -m rowmax.transformer: train, translate",
    "pictures": "pictures of a model, as PNG and SVG",
    "bench": "python -m rowmax.bench: verify, speed",
    "peers": "the other engines that `bench speed` compares with",
    "huggingface": "models of Hugging Face transformers",
    "triton": "the kernels for GPUs",
}


def main() -> int:
    """Print the report."""
    kernels.main()
    print()
    print("extras")
    for extra, purpose in _PURPOSES.items():
        missing = _missing(extra)
        print(f"  {extra:<12} {'missing' if missing else 'installed':<10} {purpose}")
        if missing:
            print(f'{"":>26}pip install "rowmax[{extra}]" brings {", ".join(missing)}')
    return 0


def _missing(extra: str) -> list[str]:
    """The packages of an extra, as rowmax's own metadata lists them, that are not installed."""
    missing = []
    for requirement in metadata.requires("rowmax") or ():
        name = re.match(r"[\w.-]+", requirement)
        if name is None or not re.search(rf"extra == ['\"]{extra}['\"]", requirement):
            continue
        try:
            metadata.version(name[0])
        except metadata.PackageNotFoundError:
            missing.append(name[0])
    return missing


if __name__ == "__main__":
    sys.exit(console.run(main, "rowmax: "))
