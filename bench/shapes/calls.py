"""A recorded call: sizes, dtype, strides and mask, and no values; and the case that it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..measure.cases import FORWARD, FORWARD_BACKWARD, MAX_DECODE_QUERIES, Case, suite_of
from ..options import UsageError

SCHEMA = "rowmax-shapes-1"
MASKS = ("none", "causal", "padded", "dense", "bias")


@dataclass(frozen=True)
class Call:
    """What distinguishes a call from others."""

    op: str  # "attention", "layer_norm" or "rms_norm"
    shape: tuple[int, ...]  # (B, Hq, Hkv, Lq, Lk, D, Dv), or (rows, columns)
    dtype: str
    device: str
    strides: tuple[tuple[int, ...], ...]  # of q, k and v, or of x
    mask: str  # of MASKS
    dropout: bool
    gradients: bool

    def case(self, dtypes: Mapping[str, Any]) -> Case | str:
        """What `speed` measures for it, or why it does not."""
        suite = suite_of(self.device, attention=self.op == "attention")
        if suite is None or self.dtype not in dtypes:
            return f"no suite has {self.op} in {self.dtype} on {self.device}"
        dtype = dtypes[self.dtype]
        suite = replace(suite, dtypes=(dtype,))
        step = FORWARD_BACKWARD if self.gradients else FORWARD
        if self.op != "attention":
            return Case(suite, dtype, self.op, self.shape, step)
        batch, heads, key_heads, queries, keys, size, value_size = self.shape
        if size != value_size:
            return "head sizes of keys and values that differ are not timed"
        if self.mask in ("causal", "dense") and queries != keys:
            return f"a {self.mask} mask of {queries} queries and {keys} keys is not timed"
        parts = [self.mask]
        if self.mask == "none":
            few = queries <= MAX_DECODE_QUERIES and queries < keys
            parts = ["full" if queries == keys else "decode" if few else "cross"]
        kind = "+".join([*parts, *(["dropout"] if self.dropout else [])])
        return Case(suite, dtype, kind, (batch, heads, key_heads, queries, keys, size), step)


def write(path: Path, calls: Mapping[Call, int]) -> None:
    """The calls that came most often first."""
    rows = sorted(calls.items(), key=lambda item: -item[1])
    document = {"schema": SCHEMA, "calls": [{**asdict(c), "count": count} for c, count in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Counter[Call]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(document["schema"])
        found: Counter[Call] = Counter()
        for row in document["calls"]:
            fields = dict(row)
            count = fields.pop("count")
            fields["shape"] = tuple(fields["shape"])
            fields["strides"] = tuple(map(tuple, fields["strides"]))
            found[Call(**fields)] += count
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--shapes: expected a file of {SCHEMA}, got {path}: {error}") from error
