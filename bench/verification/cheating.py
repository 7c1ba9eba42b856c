"""The other check of the check: candidates that cheat, each of which must be found out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch

from . import invariants
from .cheats import CHEATS
from .contracts import CONTRACTS
from .implementations import Foreign
from .mutation import Mutation

DTYPE = torch.float32  # one is enough: what they do is no matter of rounding
_SEEN = {name: cheat for name, cheat in CHEATS.items() if "verify" in cheat.seen_by}


def count() -> int:
    """The number of checks that `check` makes."""
    return len(_SEEN)


def check() -> Iterator[Mutation]:
    """By what torch promises, so that each is found out as the cheat that it is."""
    for name, cheat in _SEEN.items():
        by, done = None, 0
        with ExitStack() as stack:
            candidate = Foreign(cheat.make(stack), name, contract=CONTRACTS["torch"])
            for found in invariants.check(candidate, ("attention",), DTYPE):
                done += 1
                if found.failed:
                    by = f"{found.name}: {found.fault}"
                    break
        yield Mutation(name, cheat.description, DTYPE, by, int(by is not None), done)
