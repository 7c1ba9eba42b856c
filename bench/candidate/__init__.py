"""A stranger's kernel, wherever it comes from and whatever it is called with, as the judge's own
callable: `load` finds it, `Candidate` adapts it.
"""

from __future__ import annotations

from .interface import Candidate, DeclinedError
from .sources import load

__all__ = ["Candidate", "DeclinedError", "load"]
