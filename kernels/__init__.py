"""Fused attention and layer normalisation for PyTorch; start with `attention` and `explain`."""

from __future__ import annotations

from typing import Any

if __name__ == "kernels":
    # Python was started in the checkout, and transformers has looked for Hugging Face's package
    # of this name. It sees that this is none by the missing version.
    def __getattr__(name: str) -> Any:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}: import rowmax.kernels")
else:
    from .api.attention import attention, explain
    from .api.biases import ALiBi
    from .api.cross_entropy import linear_cross_entropy
    from .api.masks import Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window
    from .api.norms import add_layer_norm, layer_norm, rms_norm
    from .api.softmax import masked_softmax
    from .api.varlen import attention_varlen
    from .backends.dispatch import MissingBackendWarning
    from .integrations import (
        attention_as_sdpa,
        compare,
        register_huggingface,
        scaled_dot_product_attention,
        swap,
        swapped,
    )

__all__ = [
    "ALiBi",
    "Causal",
    "Dense",
    "Documents",
    "KeyLengths",
    "Mask",
    "MissingBackendWarning",
    "QueryLengths",
    "Window",
    "add_layer_norm",
    "attention",
    "attention_as_sdpa",
    "attention_varlen",
    "compare",
    "explain",
    "layer_norm",
    "linear_cross_entropy",
    "masked_softmax",
    "register_huggingface",
    "rms_norm",
    "scaled_dot_product_attention",
    "swap",
    "swapped",
]
