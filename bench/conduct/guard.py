"""What is taken before a stranger's candidate is imported, and what was found of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from .seal import Seal
from .threads import Threads


@dataclass
class Guard:
    seal: Seal = field(default_factory=Seal)
    threads: Threads = field(default_factory=Threads)
    examined: dict[object, str | None] = field(default_factory=dict)  # by what was asked

    def fault(self) -> str | None:
        """What it replaced or left running; what it replaced is then put back."""
        found = self.seal.broken()
        if found is not None:
            self.seal.restore()
        return found or self.threads.fault()
