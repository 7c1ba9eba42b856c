"""rowmax in models that are there already: swapped in by instance, reported, and taken out again."""

from __future__ import annotations

from .models import swap, swapped
from .report import Site, SwapReport

__all__ = ["Site", "SwapReport", "swap", "swapped"]
