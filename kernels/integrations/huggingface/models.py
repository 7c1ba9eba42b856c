"""Where models of transformers attend, whether through its interface, and what the swap changes."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.torch_internals import tracing_state
from ...ops.tracing import untraced
from ..packing import Packing, may_count
from ..torch_modules.instances import Form, Swapped
from .attention import NAME
from .configs import is_alias

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION_NAME = re.compile(r"(Attention|Attn)(V\d)?$")

# What a model's eager attention may read off its module or take as an argument so that the
# interface's arguments are all there is to it. GPT-2 passes no scale, so rowmax reads it.
_KNOWN_ATTRIBUTES = {"training", "num_key_value_groups", "head_dim", "sinks"}
_GPT2_ATTRIBUTES = {
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "layer_idx"),
    *("is_cross_attention", "attn_dropout", "bias"),
}
_KNOWN_ARGUMENTS = {
    *("module", "query", "key", "value", "query_states", "key_states", "value_states"),
    *("attention_mask", "scaling", "dropout", "head_mask", "softcap", "position_bias"),
    *("sliding_window", "s_aux", "sinks", "output_attentions", "is_causal"),
}

# Encoders without positions in their layers: what a token becomes depends on the other tokens, not
# on where they stand, so padding may be left out.
PACKED_ENCODERS = (
    *("BertEncoder", "RobertaEncoder", "XLMRobertaEncoder", "CamembertEncoder", "ElectraEncoder"),
    *("ErnieEncoder", "BertGenerationEncoder", "Data2VecTextEncoder", "XLMRobertaXLEncoder"),
    *("RobertaPreLayerNormEncoder", "LayoutLMEncoder", "MarkupLMEncoder"),
)


def outermost_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformers models in `model` that are in no other; none where it is not loaded."""
    library = sys.modules.get("transformers")
    if library is None:
        return []
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer, _ in found)
        if not inside and isinstance(module, library.PreTrainedModel):
            found.append((name, module))
    return found


def attends(module: nn.Module) -> bool:
    """Whether `module` asks the interface for its attention function."""
    return "config" in module.__dict__ and _asks_interface(type(module))  # type: ignore[arg-type]


def bypasses(module: nn.Module) -> bool:
    """Whether `module` is an attention by name that neither asks the interface nor holds one."""
    if not _ATTENTION_NAME.search(type(module).__name__) or attends(module):
        return False
    return not any(
        attends(child)
        or isinstance(child, nn.MultiheadAttention)
        or _ATTENTION_NAME.search(type(child).__name__)
        for name, child in module.named_modules()
        if name
    )


def why_not(module: nn.Module) -> str | None:
    """Why an attention that asks the interface can't be swapped all the same; None when it can."""
    return _needs_more(type(module))  # type: ignore[arg-type]


def is_swapped(module: nn.Module) -> bool:
    return is_alias(module.__dict__.get("config"))


@functools.cache
def _asks_interface(cls: type[nn.Module]) -> bool:
    return any(_INTERFACE in function.__code__.co_names for function in _functions(cls))


def _functions(cls: type[nn.Module]) -> Iterator[Any]:
    """The functions that the class and its bases define, below nn.Module and PreTrainedModel."""
    for base in cls.__mro__:
        if base is nn.Module or base.__name__ == "PreTrainedModel":
            return
        for value in vars(base).values():
            function = inspect.unwrap(value) if callable(value) else value
            if inspect.isfunction(function):
                yield function


@functools.cache
def _needs_more(cls: type[nn.Module]) -> str | None:
    """What the eager attention beside the class uses that the interface does not pass."""
    eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
    if eager is None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(eager)))
    except (OSError, SyntaxError):
        return "the source of its eager attention is not there to be checked"
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    read = {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "module"
    }
    if "scale_attn_by_inverse_layer_idx" in read:
        read -= _GPT2_ATTRIBUTES
    unknown = sorted(read - _KNOWN_ATTRIBUTES)
    if unknown:
        return f"its eager attention reads {', '.join(unknown)} off the module"
    unknown = sorted({argument.arg for argument in function.args.args} - _KNOWN_ARGUMENTS)
    if unknown:
        return f"its eager attention takes {', '.join(unknown)}"
    return None


class SwappedBertEncoder(Swapped):
    """A BERT-like stack of layers on the real tokens alone, (1, total, E), zeros where padding was.

    Where hidden states or attentions of all layers are asked for, and where another attention
    implementation has been set since, the batch stays padded.
    """

    config: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(self, Form):
            return type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)
        real = None
        if attention_mask is not None and not args[1:] and not self._is_watched(kwargs):
            real = _real_tokens(attention_mask, hidden_states)
        if real is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if tracing_state() is not None:  # the graph will be given other padding
            outputs = super().forward(hidden_states, attention_mask, *args, **kwargs)
            padding = ~real.unsqueeze(-1)
            return _with_last(outputs, lambda states: states.masked_fill(padding, 0.0))
        packing = Packing.of(real)
        packed = packing.pack(hidden_states).unsqueeze(0)
        kwargs = {name: value for name, value in kwargs.items() if name != "position_ids"}
        outputs = super().forward(packed, packing, *args, **kwargs)
        return _with_last(outputs, lambda states: packing.unpack(states.squeeze(0)))

    def _is_watched(self, kwargs: dict[str, Any]) -> bool:
        """Whether this call has something that needs the padded form."""
        asked = ("output_hidden_states", "output_attentions", "past_key_values", "use_cache")
        given = ("encoder_hidden_states", "encoder_attention_mask")
        return (
            torch.compiler.is_compiling()
            or self.config._attn_implementation != NAME
            or any(kwargs.get(name) for name in asked)
            or any(kwargs.get(name) is not None for name in given)
            or _collects_outputs()
        )


def _with_last(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An encoder's outputs with other last hidden states."""
    if isinstance(outputs, tuple):
        return (change(outputs[0]), *outputs[1:])
    outputs.last_hidden_state = change(outputs.last_hidden_state)
    return outputs


def _real_tokens(attention_mask: Tensor, hidden_states: Tensor) -> Tensor | None:
    """(B, L) bool, from a mask that is the same for all heads and queries; else None."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        return None
    if not may_count(attention_mask):
        return None
    batch, length = hidden_states.shape[:2]
    heads, queries = (untraced(attention_mask.size, at) for at in (1, 2))
    wide = queries > 1 and attention_mask.stride(2) != 0
    if attention_mask.dtype != torch.bool or heads != 1 or wide:
        return None
    return attention_mask[:, 0, 0].expand(batch, length)


def _collects_outputs() -> bool:
    """Whether transformers 5 is collecting the outputs of layers, by hooks on them."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return module is not None and bool(module._active_collector.get())


def why_not_packed(module: nn.Module) -> str | None:
    """Why a BERT-like encoder can't be packed; None when it can."""
    config = module.__dict__.get("config")
    if getattr(config, "is_decoder", False):
        return "it is a decoder"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None
