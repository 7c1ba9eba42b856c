"""The attention and norm calls of a running model, as cases for `speed` and `verify`."""

from __future__ import annotations

from .recorder import record

__all__ = ["record"]
