"""How close the kernels, or anyone's own, are to float64; start with `verify`."""

from __future__ import annotations

from .model import ModelReport, verify_model
from .outcome import Report
from .suite import verify

__all__ = ["ModelReport", "Report", "verify", "verify_model"]
