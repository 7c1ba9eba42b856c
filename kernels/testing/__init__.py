"""The judge of every kernel here, and of your own: start with `assert_as_accurate_as_naive`.

A float64 oracle, one tolerance rule, named test cases, and the peak of memory of a call. The tests
use it, and so do `rowmax.kernels.compare` and `python -m rowmax.bench verify` and `speed`.
"""

from __future__ import annotations

from .cases import DTYPES, NamedCase, Shape, packed_case
from .cross_entropy import CrossEntropyCase
from .judge import assert_as_accurate_as_naive
from .memory import peak_bytes
from .oracle import AttentionCase, PackedCase
from .rows import RowCase
from .suite import ALL_KINDS, OPS, named_cases
from .tolerance import Accuracy, measure

__all__ = [
    "ALL_KINDS",
    "DTYPES",
    "OPS",
    "Accuracy",
    "AttentionCase",
    "CrossEntropyCase",
    "NamedCase",
    "PackedCase",
    "RowCase",
    "Shape",
    "assert_as_accurate_as_naive",
    "measure",
    "named_cases",
    "packed_case",
    "peak_bytes",
]
