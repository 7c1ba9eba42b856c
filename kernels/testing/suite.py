"""All named cases, by function, kind, shape and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import adversarial, cross_entropy
from .cases import (
    DTYPES,
    KINDS,
    PACKED_SHAPES,
    QUICK_SHAPES,
    SHAPES,
    NamedCase,
    Shape,
    attention_cases,
    packed_cases,
)
from .rows import NORM_KINDS, NORMS, SOFTMAX_KINDS, row_cases

ATTENTION_OPS = ("attention", "attention_varlen")
OPS = (*ATTENTION_OPS, *NORMS, "masked_softmax", "linear_cross_entropy")
ALL_KINDS = tuple(
    dict.fromkeys((*KINDS, *NORM_KINDS, *SOFTMAX_KINDS, *cross_entropy.KINDS, *adversarial.KINDS))
)


def named_cases(
    ops: str | Sequence[str],
    dtype: torch.dtype,
    kinds: Sequence[str] | None = None,
    *,
    shapes: tuple[Shape, ...] = (),
    quick: bool = False,
) -> list[NamedCase]:
    """The cases of the functions `ops`, which are names of OPS, in one dtype.

    Args:
        kinds: of ALL_KINDS; all of them when None. shapes: of attention, in place of its own.
        quick: at fewer shapes.
    """
    ops = (ops,) if isinstance(ops, str) else tuple(ops)
    chosen = ALL_KINDS if kinds is None else tuple(kinds)
    for argument, names, known in (("ops", ops, OPS), ("kinds", chosen, ALL_KINDS)):
        for name in names:
            if name not in known:
                raise ValueError(f"named_cases: `{argument}`: expected of {known}, got {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"named_cases: `dtype`: expected one of {DTYPES}, got {dtype}")
    found: list[NamedCase] = []
    attention_kinds = tuple(kind for kind in chosen if kind in KINDS)
    if "attention" in ops:
        sizes = shapes or (QUICK_SHAPES if quick else SHAPES)
        found += attention_cases(dtype, sizes, attention_kinds, empty=not shapes)
    if "attention_varlen" in ops:
        found += packed_cases(dtype, shapes or PACKED_SHAPES, attention_kinds)
    found += row_cases(
        tuple(op for op in ops if op not in ATTENTION_OPS), dtype, chosen, quick=quick
    )
    if "linear_cross_entropy" in ops:
        found += cross_entropy.cross_entropy_cases(dtype, chosen, quick=quick)
    found += adversarial.adversarial_cases(ops, dtype, chosen)
    return found
