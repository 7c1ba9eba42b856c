"""What is faster than this machine can be: it did not do the work."""

from __future__ import annotations

from collections.abc import Mapping

from ..machine.gpu import Limits
from .cases import FORWARD, Case
from .timing import Timing

# Above the limits: of a rate that is measured by its best try, on a clock that may rise. A copy
# reads as much as it writes, and a call may read only.
MARGIN, COPY_MARGIN = 1.2, 2.5
# Of the products that a rate counts, those that a backward pass can do without: it may keep the
# weights that flash attention computes anew.
_LEAST = {FORWARD: 1.0}
_WITHOUT_WEIGHTS = 0.8


def too_fast(
    case: Case, timings: Mapping[str, Timing], flops: int | None, moved: int | None, limits: Limits
) -> dict[str, str]:
    """Name -> why its time is none: more operations or bytes a second than the machine can do."""
    most = limits.most_flops(case.dtype) if case.suite.attention else None
    found: dict[str, str] = {}
    for name, timing in timings.items():
        if flops is not None and most is not None:
            rate = _LEAST.get(case.step, _WITHOUT_WEIGHTS) * flops / timing.median
            if rate > MARGIN * most:
                found[name] = _text(rate, most, "GFLOP/s")
                continue
        if moved is not None:
            rate = moved / timing.median
            if rate > COPY_MARGIN * (copied := limits.most_copied(moved)):
                found[name] = _text(rate, copied, "GB/s")
    return found


def _text(rate: float, limit: float, unit: str) -> str:
    return f"{rate / 1e9:.3g} {unit}, and this machine does {limit / 1e9:.3g}"
