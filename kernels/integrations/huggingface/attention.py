"""rowmax as an `attn_implementation` of Hugging Face transformers, 4.57 to 5.x.

The function that computes attention and the one that makes its mask are registered together: with
the first alone transformers makes no mask at all, and padding would be attended without a word.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...api.attention import attention
from ...api.masks import Causal, Mask, Window
from ...api.varlen import attention_varlen
from ...ops.tracing import untraced
from ..packing import Packing
from ..tensor_masks import is_zero, mask_of, mask_of_forbidden
from ..torch_modules.instances import Options
from . import masks as huggingface_masks

NAME = "rowmax"
_OLDEST, _NEWEST = (4, 57), (5, 999)

# Arguments of some models' attention that change the result and that no mask expresses.
_REFUSED = ("indices", "block_indices", "cache")


def register_huggingface() -> None:
    """Make "rowmax" an attention implementation of transformers, as "sdpa" is one.

    After it, `attn_implementation="rowmax"` works in `from_pretrained` and `from_config`, and
    `model.set_attn_implementation("rowmax")` on a model. It changes no model. `swap` needs no
    call of it, and refuses models that would ignore the setting.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: its version is outside the range that rowmax knows.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'register_huggingface: transformers is not installed: pip install "rowmax[huggingface]"'
        ) from error
    check_version(transformers.__version__)
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, rowmax_attention)
    AttentionMaskInterface.register(NAME, rowmax_mask)


def check_version(version: str) -> None:
    """RuntimeError for a version of transformers outside the range."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not _OLDEST <= numbers <= _NEWEST:
        raise RuntimeError(
            f"rowmax: transformers {version} is outside the range it knows, 4.57 to 5.x; "
            "nothing was changed"
        )


def rowmax_mask(**arguments: Any) -> Tensor | None:
    """The mask function of transformers' interface: a bool mask, True = may attend, as for sdpa.

    Padding alone is the same for all queries, and is made for one: (B, 1, Lq, Lk) with stride 0.
    """
    from transformers import masking_utils

    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)
    mask: Tensor | None
    if bidirectional is None or arguments.get("mask_function") is not bidirectional:
        mask = masking_utils.sdpa_mask(**arguments)
        if mask is not None:
            huggingface_masks.note(mask, arguments)
        return mask
    if "cache_position" in arguments:  # transformers 4
        queries = arguments["cache_position"].shape[0]
        one = {"cache_position": arguments["cache_position"][:1]}
    else:
        queries, one = arguments["q_length"], {"q_length": 1}
    mask = masking_utils.sdpa_mask(**{**arguments, **one})
    if mask is None:
        return None
    mask = mask.expand(-1, -1, queries, -1)
    huggingface_masks.note(mask, arguments)
    return mask


def rowmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packing | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers' interface.

    Args:
        module: the attention that calls; its `is_causal` counts where the argument is None.
        query: (B, Hq, Lq, D). key, value: (B, Hkv, Lk, D), grouped heads as they are.
        attention_mask: (B, 1 | H, Lq, Lk), bool with True = may attend or added to the scores; or
            the packing of a packed encoder. With None, causal modules attend causally.
        sliding_window: counts where there is no mask, for transformers' masks have it in them.
        position_bias: (1 | B, H, Lq, Lk), added to the scores, with a gradient.
        s_aux, sinks: (Hq,), logits that take probability and give no value.
        head_mask: (Hq,), factors of the heads.

    Returns:
        (B, Lq, Hq, Dv), and with `output_attentions` the weights (B, Hq, Lq, Lk) before dropout.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"rowmax: {type(module).__name__} passes `{name}`, which attention_implementation "
                '"rowmax" does not do; expected None. Use "eager" for this model'
            )
    options: Options = getattr(getattr(module, "config", None), "rowmax_options", Options())
    if scaling is None:
        scaling = _own_scale(module, query)
    same: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "dropout_p": float(dropout),
        "sinks": s_aux if s_aux is not None else sinks,
        "backend": options.backend,
    }
    weights: Tensor | None = None
    if isinstance(attention_mask, Packing):
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        starts, bound = attention_mask.cu_seqlens, attention_mask.length
        bounds: dict[str, Any] = {"max_seqlen_q": bound, "max_seqlen_k": bound}
        joined = attention_varlen(q, k, v, starts, starts, **same, **bounds).unsqueeze(0)
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        mask, bias = _mask_and_bias(attention_mask, query, key, bool(is_causal), sliding_window)
        if position_bias is not None and not is_zero(position_bias):
            position_bias = position_bias[..., : key.shape[2]]
            bias = position_bias if bias is None else bias + position_bias
        if output_attentions:
            out, weights = attention(*(query, key, value, mask, bias), **same, return_weights=True)
        else:
            out = attention(query, key, value, mask, bias, **same)
        joined = out.transpose(1, 2)
    if head_mask is not None:
        joined = joined * head_mask.view(1, 1, -1, 1)
    return joined.contiguous(), weights


def _mask_and_bias(
    given: Tensor | None, query: Tensor, key: Tensor, is_causal: bool, sliding_window: int | None
) -> tuple[Mask | None, Tensor | None]:
    """mask and bias of `attention`."""
    sizes = *_, key_len = (*query.shape[:3], key.shape[2])
    if given is None:
        if not is_causal or untraced(query.size, 2) == 1:
            return None, None
        if sliding_window is not None:
            return Window(sliding_window - 1, 0, align="upper_left"), None
        return Causal(align="upper_left"), None
    if given.dim() != 4:
        raise ValueError(
            f"rowmax: `attention_mask`: expected (B, H, Lq, Lk), got {tuple(given.shape)}; it was "
            "made for another attention implementation"
        )
    if untraced(given.size, -1) > untraced(key.size, 2):  # of a static cache, longer than its keys
        given = given[..., :key_len]
    if given.dtype == torch.bool:
        return mask_of(given, sizes), None
    found = mask_of_forbidden(given, sizes)
    return (None, found) if isinstance(found, Tensor) else (found, None)


def _own_scale(module: nn.Module, query: Tensor) -> float:
    """The scale of a module that passes none: 1 / sqrt(D), or what GPT-2's attributes say."""
    scale = float(query.shape[-1]) ** -0.5
    if getattr(module, "scale_attn_weights", True) is False:
        scale = 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scale /= float(module.layer_idx) + 1.0  # type: ignore[arg-type]
    return scale


@functools.cache
def is_registered() -> bool:
    """Registers at the first call."""
    register_huggingface()
    return True
