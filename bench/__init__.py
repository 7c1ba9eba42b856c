"""rowmax.bench: are the kernels right, and are they fast, here? `verify`, `speed`, `record`."""

from __future__ import annotations

from .experiments.divergence import Divergence, diverge
from .measure.measurement import Speeds, speed
from .shapes import record
from .verification import ModelReport, Report, verify, verify_model

__all__ = [
    "Divergence",
    "ModelReport",
    "Report",
    "Speeds",
    "diverge",
    "record",
    "speed",
    "verify",
    "verify_model",
]
