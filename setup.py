"""Build description of rowmax: where the packages lie.

The folders `kernels/`, `transformer/` and `bench/` of the checkout are the packages
`rowmax.kernels`, `rowmax.transformer` and `rowmax.bench`. `rowmax` itself is a PEP 420 namespace
and has no folder. Everything that does not depend on the machine stands in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGE_DIR = {
    "rowmax.kernels": "kernels",
    "rowmax.transformer": "transformer",
    "rowmax.bench": "bench",
}


def all_packages() -> list[str]:
    """The public packages and every subpackage found below their folders."""
    names: list[str] = []
    for package, folder in PACKAGE_DIR.items():
        names.append(package)
        names += [f"{package}.{sub}" for sub in find_packages(str(ROOT / folder))]
    return names


setup(
    package_dir=PACKAGE_DIR,
    packages=all_packages(),
    package_data={package: ["py.typed"] for package in PACKAGE_DIR},
)
