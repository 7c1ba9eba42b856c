"""What `swap` did, site by site, and the way back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Change(Protocol):
    """One thing that a swap changed."""

    def apply(self) -> None: ...

    def undo(self) -> None: ...


@dataclass(frozen=True)
class Site:
    """One module that a swap looked at.

    name: as in `model.named_modules()`, "" for the model itself. kind: "attention", "norm", "layer"
    (a Transformer layer, whose residual, dropout and norm become one call) or "encoder".
    """

    name: str
    class_name: str
    kind: str
    swapped: bool
    reason: str


class SwapReport:
    """Every site that `swap` looked at; `print` shows a table, `restore()` undoes the swap."""

    def __init__(
        self, model_name: str, backend: str, sites: Sequence[Site], changes: Sequence[Change]
    ) -> None:
        self.model_name = model_name
        self.backend = backend
        self.sites = tuple(sites)
        self._changes = list(changes)

    def restore(self) -> None:
        """Undo exactly what this swap changed. A second call does nothing.

        Raises:
            RuntimeError: somebody has given a module another class since. All others are restored;
                once it is set back, a second call restores these.
        """
        errors, kept = [], []
        while self._changes:
            change = self._changes.pop()
            try:
                change.undo()
            except RuntimeError as error:
                errors.append(str(error))
                kept.append(change)
        self._changes = kept[::-1]
        if errors:
            raise RuntimeError(f"restore: {'; '.join(errors)}")

    @property
    def swapped(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.swapped)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.swapped)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: model, backend, and a list of sites."""
        return {
            "model": self.model_name,
            "backend": self.backend,
            "sites": [asdict(site) for site in self.sites],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        head = f"{self.model_name}: {len(self.swapped)} of {len(self.sites)} sites swapped"
        rows = [("", "site", "class", "kind", "why")]
        rows += [
            (
                "swapped" if site.swapped else "left",
                site.name or "(the model)",
                site.class_name,
                site.kind,
                site.reason,
            )
            for site in self.sites
        ]
        return "\n".join([f"{head}, backend {self.backend}", *columns(rows)])

    def __repr__(self) -> str:
        return f"<SwapReport: {len(self.swapped)} of {len(self.sites)} sites swapped>"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words as lines, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
