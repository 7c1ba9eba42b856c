"""What `try_wheel.py` runs in a fresh environment: only what the wheel itself requires is there.

Every function of the backend "native", forward and backward, on named cases of the judge, with
vectors of each width that the processor has; and the report of `python -m rowmax.kernels`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import torch

from rowmax import kernels
from rowmax.kernels.testing import DTYPES, OPS, assert_as_accurate_as_naive, named_cases
from rowmax.kernels.testing.suite import ATTENTION_OPS

KINDS = ("none", "window", "joined", "key-lengths", "dropout-causal", "causal", "weight", "dropout")


def compare() -> None:
    for op in OPS:
        more = {"return_lse": True} if op in ATTENTION_OPS else {}
        kernel = partial(getattr(kernels, op), backend="native", **more)
        for dtype in DTYPES:
            for case in named_cases(op, dtype, KINDS, quick=True):
                assert_as_accurate_as_naive(kernel, case)


def main() -> None:
    assert "site-packages" in str(kernels.__file__) or "PYTHONPATH" in os.environ, kernels.__file__
    report = subprocess.run(
        [sys.executable, "-m", "rowmax.kernels"], check=True, capture_output=True, text=True
    ).stdout
    assert "native     works" in report, report
    assert "numba      works" in report, report
    compare()
    if "ROWMAX_VECTOR_BITS" not in os.environ:
        own = torch.ops.rowmax_native.vector_bits()
        for bits in (bits for bits in (256, 128) if bits < own):
            environment = {**os.environ, "ROWMAX_VECTOR_BITS": str(bits)}
            subprocess.run([sys.executable, __file__], check=True, env=environment)


if __name__ == "__main__":
    main()
