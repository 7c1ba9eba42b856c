"""The options of `verify` and `speed` that say what a stranger's function is."""

from __future__ import annotations

import argparse

from ..options import UsageError
from .interface import LAYOUTS
from .sources import FORMS, Where

__all__ = ["FORMS", "add_foreign_options", "refuse_without_function", "where"]


def add_foreign_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this module, file or folder first: one that registers the op or the "
        "attention that --function names; may be given more than once",
    )
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="of --function's q, k and v: (B, H, L, D), (B, L, H, D), or (tokens, H, D) with "
        "cu_seqlens; default: bhld, packed where it has cu_seqlens_q",
    )
    command.add_argument(
        "--forward-only", action="store_true", help="--function has no gradients: look at none"
    )


def where(options: argparse.Namespace, op: str | None) -> Where:
    """What --function names, by the other options."""
    return Where(
        options.function, op, options.layout, not options.forward_only, tuple(options.imports)
    )


def refuse_without_function(options: argparse.Namespace) -> None:
    for name, given in (
        ("--import", options.imports),
        ("--layout", options.layout),
        ("--forward-only", options.forward_only),
    ):
        if given:
            raise UsageError(f"{name}: only with --function")
