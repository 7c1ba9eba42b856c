"""What a function calls its arguments: read from its signature, or from a custom op's schema."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from ..peers.packages import UnsupportedError


class DeclinedError(UnsupportedError):
    """The candidate has no way to express or compute this; its text says why."""


# What is handed over, by the names that kernels give it; the first is torch's own.
NAMES: dict[str, tuple[str, ...]] = {
    "mask": ("attn_mask", "attention_mask", "mask"),
    "is_causal": ("is_causal", "causal"),
    "scale": ("scale", "softmax_scale", "sm_scale", "scaling"),
    "dropout_p": ("dropout_p", "dropout"),
    "enable_gqa": ("enable_gqa",),
    "cu_seqlens_q": ("cu_seqlens_q", "cu_seq_q", "cu_seqlens"),
    "cu_seqlens_k": ("cu_seqlens_k", "cu_seq_k", "cu_seqlens_kv"),
    "max_seqlen_q": ("max_seqlen_q", "max_q", "max_seqlen"),
    "max_seqlen_k": ("max_seqlen_k", "max_k", "max_seqlen_kv"),
    "weight": ("weight", "gamma"),
    "bias": ("bias", "beta"),
    "eps": ("eps", "epsilon", "variance_epsilon"),
    "columns": ("normalized_shape",),
    "dim": ("dim", "axis"),
    "out": ("out", "output"),
    "module": ("module",),
}
_KNOWN = {alias: what for what, aliases in NAMES.items() for alias in aliases}
# What a function whose signature can't be read, or that takes any keyword, is taken to know.
OF_SDPA = ("mask", "is_causal", "scale", "dropout_p", "enable_gqa")
OF_ROWS = ("mask", "scale", "weight", "bias", "eps")


class _Parameter(NamedTuple):
    name: str
    required: bool
    by_name: bool  # or else by its place alone


class Binding:
    """How to call `function` on its `tensors` (q, k and v, say) with what else it has names for.

    Raises:
        TypeError: it has too few parameters, or wants one that is none of NAMES.
    """

    def __init__(
        self, function: Callable[..., Any], tensors: int, assumed: tuple[str, ...]
    ) -> None:
        self.function = function
        found = _parameters(function)
        self._any_keyword = found is None or found[1]
        self._assumed = assumed
        parameters = [] if found is None else found[0]
        free = [one for one in parameters if one.name not in _KNOWN]
        self._tensors: tuple[str, ...] | None = None  # by name, where they don't come first
        if found is not None and not found[2]:
            if len(free) < tensors:
                names = ", ".join(one.name for one in parameters)
                raise TypeError(f"expected {tensors} tensors among its parameters, got ({names})")
            if free[:tensors] != parameters[:tensors] and all(one.by_name for one in free):
                self._tensors = tuple(one.name for one in free[:tensors])
        for one in free[tensors:]:
            if one.required:
                raise TypeError(
                    f"its parameter {one.name} has no default, and is none of "
                    f"{', '.join(sorted(_KNOWN))}"
                )
        self._names = {_KNOWN[one.name]: one.name for one in parameters if one.name in _KNOWN}
        self.required = {_KNOWN[p.name] for p in parameters if p.required and p.name in _KNOWN}

    def knows(self, what: str) -> bool:
        return what in self._names or (self._any_keyword and what in self._assumed)

    def is_plain(self, wanted: tuple[str, ...]) -> bool:
        """Whether it takes what is `wanted` by torch's own names, and nothing must be added."""
        same = all(self._names.get(what, NAMES[what][0]) == NAMES[what][0] for what in wanted)
        own = self.required - set(wanted)
        return same and not own and self._tensors is None and all(map(self.knows, wanted))

    def call(self, tensors: tuple[Any, ...], values: dict[str, Any]) -> Any:
        named = {self._names.get(what) or NAMES[what][0]: value for what, value in values.items()}
        if self._tensors is None:
            return self.function(*tensors, **named)
        return self.function(**dict(zip(self._tensors, tensors, strict=True)), **named)


def _parameters(function: Any) -> tuple[list[_Parameter], bool, bool] | None:
    """The parameters, and whether any keyword and any positional argument is taken besides."""
    schema = _schema(function)
    if schema is not None:
        arguments = ((one.name, not one.has_default_value(), True) for one in schema.arguments)
        return list(itertools.starmap(_Parameter, arguments)), False, False
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of builtins
        return None
    kinds = inspect.Parameter
    found = list(signature.parameters.values())
    any_keyword, any_place = (
        any(one.kind == kind for one in found) for kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    )
    named = [
        _Parameter(one.name, one.default is kinds.empty, one.kind != kinds.POSITIONAL_ONLY)
        for one in found
        if one.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    return named, any_keyword, any_place


def _schema(function: Any) -> Any:
    """Of a torch custom op: what torch.ops gives, an overload of it, or what made it."""
    function = getattr(function, "_opoverload", function)
    if hasattr(function, "overloads") and hasattr(function, "_qualified_op_name"):
        function = getattr(function, function.overloads()[0])
    return getattr(function, "_schema", None)
