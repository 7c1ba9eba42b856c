"""rowmax in models that are there already: swapped in by instance, reported, taken out again."""

from __future__ import annotations

from .comparison import ComparisonReport, compare
from .huggingface.attention import register_huggingface
from .process_wide import SdpaRoute, attention_as_sdpa
from .report import Site, SwapReport
from .sdpa import scaled_dot_product_attention
from .swap import swap, swapped

__all__ = [
    "ComparisonReport",
    "SdpaRoute",
    "Site",
    "SwapReport",
    "attention_as_sdpa",
    "compare",
    "register_huggingface",
    "scaled_dot_product_attention",
    "swap",
    "swapped",
]
