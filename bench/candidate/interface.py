"""A stranger's function behind the judge's interfaces, whatever its own is.

Its arguments are found by their names (`binding.py`), its tensors are laid out as it wants them,
and of what it returns the first tensor is judged. What it has no argument for it declines, which is
no fault. All steps are torch's own operations, so gradients pass through.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import Causal, Mask
from .binding import NAMES, OF_ROWS, OF_SDPA, Binding, DeclinedError

__all__ = ["LAYOUTS", "OPS", "Candidate", "DeclinedError", "op_of"]

# Of q, k, v and out: (B, H, L, D), (B, L, H, D), or (tokens, H, D) with cu_seqlens.
LAYOUTS = ("bhld", "blhd", "packed")
OPS = ("attention", "layer_norm", "rms_norm", "add_layer_norm", "masked_softmax")
_IN_NAMES = (  # the first that a name has in it
    ("add_layer_norm", "add_?layer_?norm|residual_?layer_?norm"),
    ("layer_norm", "layer_?norm"),
    ("rms_norm", "rms"),
    ("masked_softmax", "softmax"),
)


_ATTENTION = (*OF_SDPA, "out", "module", *(n for n in NAMES if "seqlen" in n))
_PASSED = {
    "attention": frozenset(_ATTENTION),
    "rows": frozenset((*OF_ROWS, "columns", "dim", "out")),
}


def op_of(name: str) -> str:
    """What a function of this name is taken to compute."""
    last = re.split(r":|<locals>\.", name)[-1]
    found = (op for op, pattern in _IN_NAMES if re.search(pattern, last, re.IGNORECASE))
    return next(found, "attention")


class Candidate:
    """`attention` has SDPA's signature, `varlen` that of `attention_varlen`, `row` that of its op.

    op: of OPS; by the function's name where it is None. layout: of LAYOUTS; "packed" where the
    function wants cu_seqlens. out_layout: of its result, where that is another. backward: whether
    its results have gradients; what has none gets no tensor that asks for one.

    Raises:
        ValueError: an unknown op or layout.
        TypeError: the function can't be called as one of that op.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        *,
        op: str | None = None,
        layout: str | None = None,
        out_layout: str | None = None,
        backward: bool = True,
    ) -> None:
        if not callable(function):
            raise TypeError(f"function: expected a callable, got {type(function).__name__}")
        self.name = str(name or getattr(function, "__qualname__", type(function).__name__))
        self.op = op or op_of(self.name)
        for argument, value, known in (("op", self.op, OPS), ("layout", layout, (*LAYOUTS, None))):
            if value not in known:
                expected = ", ".join(filter(None, known))
                raise ValueError(f"{argument}: expected one of {expected}, got {value!r}")
        is_attention = self.op == "attention"
        tensors = 3 if is_attention else 2 if self.op == "add_layer_norm" else 1
        self._binding = binding = Binding(function, tensors, OF_SDPA if is_attention else OF_ROWS)
        for what in binding.required - _PASSED["attention" if is_attention else "rows"]:
            raise TypeError(f"a function of {self.op} gets no {what}, which it has no default for")
        self.backward = backward
        if not backward:
            binding.function = function = _detached(function)
        if is_attention and layout is None and binding.knows("cu_seqlens_q"):
            layout = "packed"
        self.layout = layout or "bhld"
        if self.layout == "packed" and not binding.knows("cu_seqlens_q"):
            raise TypeError("layout: packed, but it has no cu_seqlens_q")
        self._out_layout = out_layout or self.layout
        # the function itself where there is nothing to adapt: no call in between costs time
        plain = self.layout == self._out_layout == "bhld" and binding.is_plain(OF_SDPA)
        self.attention: Callable[..., Any] = function if plain else self._attention

    @property
    def ops(self) -> tuple[str, ...]:
        """Of rowmax.kernels, those that it can stand for."""
        return ("attention", "attention_varlen") if self.layout == "packed" else (self.op,)

    @property
    def takes_groups(self) -> bool:
        """Whether query heads may share a key head: other layouts' kernels take it as it is."""
        knows = self._binding.knows
        return self.layout != "bhld" or knows("enable_gqa") or knows("module")

    # --- attention --------------------------------------------------------------------------------

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.layout == "packed":
            return self._by_packing(query, key, value, attn_mask, dropout_p, is_causal, scale)
        binding = self._binding
        if is_causal and not binding.knows("is_causal"):
            lower = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            attn_mask, is_causal = lower.tril(), False
        given: dict[str, Any] = self._options(query, dropout_p, is_causal, scale)
        if attn_mask is not None:
            self._must_know("mask")
        if attn_mask is not None or "mask" in binding.required:
            given["mask"] = attn_mask
        if binding.knows("module"):
            given["module"] = _Module(query.shape[1] // key.shape[1])
        elif enable_gqa and not self.takes_groups:
            self._must_know("enable_gqa")
        if binding.knows("enable_gqa"):
            given["enable_gqa"] = enable_gqa
        tensors = query, key, value
        if self.layout == "blhd":
            tensors = _swapped(query), _swapped(key), _swapped(value)
        out = self._call(tensors, given)
        return out.transpose(1, 2) if self._out_layout == "blhd" and out.dim() == 4 else out

    def _by_packing(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """Each batch element is a sequence; keys that a mask of lengths hides are left out."""
        batch, _, queries, _ = query.shape
        lengths = torch.full((batch,), key.shape[2], device=query.device)
        kept = None
        if mask is not None:
            kept, lengths = _lengths_of(mask, batch, key.shape[2])
        starts = torch.arange(batch + 1, device=query.device) * queries
        q, k, v = (_swapped(tensor).flatten(0, 1) for tensor in (query, key, value))
        if kept is not None:
            k, v = k[kept], v[kept]
        options = self._options(query, dropout_p, is_causal, scale)
        ends = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        out = self._packed_call((q, k, v), starts, ends, options)
        return out.unflatten(0, (batch, queries)).transpose(1, 2) if out.dim() == 3 else out

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        **others: Any,
    ) -> Tensor:
        """As `rowmax.kernels.attention_varlen` is called."""
        if dropout_p > 0.0 or others.keys() - {"seed"}:
            what = "dropout by a seed" if dropout_p > 0.0 else ", ".join(sorted(others))
            raise DeclinedError(f"its interface has no {what}")
        is_causal = isinstance(mask, Causal) and mask.align is mask.prefix
        if mask is not None and not is_causal:
            raise DeclinedError(f"its interface has no {type(mask).__name__} of packed sequences")
        options = self._options(q, 0.0, is_causal, scale)
        return self._packed_call((q, k, v), cu_seqlens_q, cu_seqlens_k, options)

    def _packed_call(
        self, tensors: tuple[Tensor, ...], starts: Tensor, ends: Tensor, options: dict[str, Any]
    ) -> Tensor:
        if options.get("is_causal") is False and not self._binding.knows("is_causal"):
            del options["is_causal"]
        for side, offsets in (("q", starts), ("k", ends)):
            lengths = offsets.diff()
            options[f"cu_seqlens_{side}"] = offsets.to(torch.int32)
            options[f"max_seqlen_{side}"] = int(lengths.max()) if lengths.numel() else 0
        knows = self._binding.knows
        return self._call(tensors, {n: value for n, value in options.items() if knows(n)})

    def _options(
        self, query: Tensor, dropout_p: float, is_causal: bool, scale: float | None
    ) -> dict[str, Any]:
        """Those that it knows; DeclinedError where it must know another."""
        found: dict[str, Any] = {}
        for what, value, is_asked in (
            ("is_causal", is_causal, is_causal),
            ("dropout_p", dropout_p, dropout_p > 0.0),
            ("scale", scale, scale is not None),
        ):
            if is_asked:
                self._must_know(what)
            if self._binding.knows(what) and (is_asked or what != "scale"):
                found[what] = value
        if "scale" in self._binding.required and scale is None:
            found["scale"] = float(query.shape[-1]) ** -0.5
        return found

    # --- row-wise functions -----------------------------------------------------------------------

    def row(self, *tensors: Tensor, **options: Any) -> Any:
        """As the function of rowmax.kernels that `op` names is called."""
        binding, x = self._binding, tensors[0]
        if options.pop("dropout_p", 0.0) > 0.0:
            raise DeclinedError("its interface has no dropout by a seed")
        options.pop("seed", None)
        mask = options.get("mask")
        if isinstance(mask, Mask):
            sizes = (1,) * (4 - x.dim()) + tuple(x.shape)
            options["mask"] = mask.dense(*sizes).to(x.device).expand(sizes).view(x.shape)
        given = {what: value for what, value in options.items() if value is not None}
        for what in given:
            self._must_know(what)
        for what, value in (("columns", tuple(x.shape[-1:])), ("dim", -1)):
            if binding.knows(what):
                given[what] = value
        if self.op != "masked_softmax" and binding.knows("eps"):
            given.setdefault("eps", 1e-6 if self.op == "rms_norm" else 1e-5)  # rowmax's defaults
        if "scale" in binding.required:
            given.setdefault("scale", 1.0)
        for what in binding.required - given.keys() - {"out"}:
            if what not in ("mask", "bias"):
                raise DeclinedError(f"it wants a {what}")
            given[what] = None
        return self._call(tensors, given, every=self.op == "add_layer_norm")

    # --- the call ---------------------------------------------------------------------------------

    def _call(
        self, tensors: tuple[Tensor, ...], given: dict[str, Any], *, every: bool = False
    ) -> Any:
        """The first tensor that it returns, or what it wrote into `out`."""
        binding = self._binding
        if "out" in binding.required:
            shape = (*tensors[0].shape[:-1], tensors[-1].shape[-1])
            given["out"] = tensors[0].new_empty(shape)
        found = binding.call(tensors, given)
        if found is None and "out" in given:
            return given["out"]
        if isinstance(found, tuple | list) and found and not every:
            return found[0]
        return found

    def _must_know(self, what: str) -> None:
        if not self._binding.knows(what):
            raise DeclinedError(f"its interface has no {what}")


class _Module(nn.Module):
    """What functions of transformers' AttentionInterface read of the module that calls them."""

    is_causal = False
    layer_idx = 0

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.eval()


def _detached(function: Callable[..., Any]) -> Callable[..., Any]:
    """So that `tensor.numpy()` works, and nothing is recorded."""

    @functools.wraps(function)
    def call(*tensors: Any, **options: Any) -> Any:
        def plain(value: Any) -> Any:
            return value.detach() if isinstance(value, Tensor) else value

        with torch.no_grad():
            return function(*map(plain, tensors), **{n: plain(v) for n, v in options.items()})

    return call


def _swapped(tensor: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H, D), in an order of memory that any kernel takes."""
    return tensor.transpose(1, 2).contiguous()


def _lengths_of(mask: Tensor, batch: int, keys: int) -> tuple[Tensor, Tensor]:
    """Of a mask that hides keys at the end: which keys of all are left, and how many of each."""
    if mask.dtype == torch.bool:
        rows = mask.expand(batch, *mask.shape[1:3], keys).flatten(1, 2)
        lengths = rows[:, 0].sum(-1)
        kept = torch.arange(keys, device=mask.device) < lengths[:, None]
        if bool((rows == kept[:, None]).all()):
            return kept.flatten(), lengths
    raise DeclinedError("packed sequences have no mask but lengths")
