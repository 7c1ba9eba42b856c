"""rowmax.bench: are the kernels right, and are they fast, here? `verify`, `speed`."""

from __future__ import annotations

from .measure.measurement import Speeds, speed
from .verification import Report, verify

__all__ = ["Report", "Speeds", "speed", "verify"]
