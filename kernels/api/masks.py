"""Which query may attend which key: small immutable mask values, combined with `&`.

Every mask says what it means by `dense(B, Hq, Lq, Lk)`, a bool tensor in which True = may attend;
that is what the float64 oracle uses. Kernels never see it: `structure_of` reduces any conjunction
to a `MaskStructure`, a band around a diagonal, lengths, document ids and at most one dense tensor,
from which whole blocks can be skipped.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..ops.spec import TensorSpec
from ..ops.tracing import same_sizes, untraced
from .checks import (
    INTEGER_DTYPES,
    as_tensor,
    fail_type,
    fail_value,
    require_broadcastable,
    require_device,
    require_tensor,
    shape_text,
)
from .drawing import Drawn

Align = Literal["upper_left", "lower_right"] | int | Tensor | None


class MaskStructure(NamedTuple):
    """A conjunction of masks in the form that the kernels use; every absent field is None.

    Query i of batch element b may attend key j when all of these hold:

    - `band_lower <= j - i <= band_upper`, and the same with row b of `band` (B, 2) int64, but keys
      `j < prefix_lengths[b]`, (B,) int64, have no upper bound;
    - `j < key_lengths[b]` and `i < query_lengths[b]`, both (B,) int64;
    - `query_documents[b, i] == key_documents[b, j]`, (B, Lq) and (B, Lk) int64;
    - `dense[b, h, i, j]`, bool, each dimension full or 1.
    """

    dense: Annotated[Tensor | None, TensorSpec("B|1 Hq|1 Lq|1 Lk|1", "bool")] = None
    key_lengths: Annotated[Tensor | None, TensorSpec("B", "int64")] = None
    query_lengths: Annotated[Tensor | None, TensorSpec("B", "int64")] = None
    query_documents: Annotated[Tensor | None, TensorSpec("B Lq", "int64")] = None
    key_documents: Annotated[Tensor | None, TensorSpec("B Lk", "int64")] = None
    band: Annotated[Tensor | None, TensorSpec("B 2", "int64")] = None
    prefix_lengths: Annotated[Tensor | None, TensorSpec("B", "int64")] = None
    band_lower: int | None = None
    band_upper: int | None = None

    def rows(self, start: int, count: int) -> MaskStructure:
        """The structure of queries start, ..., start + count - 1 alone."""
        part = slice(start, start + count)
        dense, documents = self.dense, self.query_documents
        if dense is not None and untraced(dense.size, 2) > 1:
            dense = dense[:, :, part]
        return self._replace(
            dense=dense,
            query_documents=None if documents is None else documents[:, part],
            query_lengths=None if self.query_lengths is None else self.query_lengths - start,
            band=None if self.band is None else self.band + start,
            band_lower=None if self.band_lower is None else self.band_lower + start,
            band_upper=None if self.band_upper is None else self.band_upper + start,
        )

    def allowed(self, query_len: int, key_len: int, device: torch.device) -> Tensor | None:
        """The bool tensor, broadcastable to (B, Hq, Lq, Lk), that this structure stands for."""
        i = torch.arange(query_len, device=device).view(-1, 1)
        j = torch.arange(key_len, device=device)
        terms: list[Tensor] = []
        prefix: Tensor | None = None
        if self.prefix_lengths is not None:
            prefix = j < self.prefix_lengths.view(-1, 1, 1, 1)
        if self.band_lower is not None:
            terms.append((j - i >= self.band_lower).view(1, 1, query_len, key_len))
        if self.band_upper is not None:
            below = (j - i <= self.band_upper).view(1, 1, query_len, key_len)
            terms.append(below if prefix is None else below | prefix)
        if self.band is not None:
            lower, upper = self.band.view(-1, 2, 1, 1, 1).unbind(1)
            below = j - i <= upper
            terms += [j - i >= lower, below if prefix is None else below | prefix]
        if self.key_lengths is not None:
            terms.append(j < self.key_lengths.view(-1, 1, 1, 1))
        if self.query_lengths is not None:
            terms.append(i < self.query_lengths.view(-1, 1, 1, 1))
        if self.query_documents is not None and self.key_documents is not None:
            same = self.query_documents.unsqueeze(-1) == self.key_documents.unsqueeze(-2)
            terms.append(same.unsqueeze(1))
        if self.dense is not None:
            terms.append(self.dense)
        return functools.reduce(operator.and_, terms) if terms else None


NO_MASK = MaskStructure()


class Mask(Drawn):
    """Base of all masks. `a & b` allows what both allow."""

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        parts = (*self.parts(), *other.parts())
        upper = [part for part in parts if part.bounds_keys_above()]
        if len(upper) > 1 and any(
            isinstance(part, Causal) and part.prefix is not None for part in upper
        ):
            raise ValueError(
                "Causal: `prefix`: expected no other mask beside it that bounds keys from above, "
                "got a second one (Causal, or Window with `right`); a bool mask can say both"
            )
        return _Conjunction(parts)

    def __bool__(self) -> NoReturn:
        raise TypeError("a mask is neither true nor false: join masks by `&`, not by `and` or `or`")

    def parts(self) -> tuple[Mask, ...]:
        """The masks that were joined by `&` into this one."""
        return (self,)

    def bounds_keys_above(self) -> bool:
        """Whether a query attends no key beyond some distance after its own position."""
        return False

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        """The bool tensor (B, Hq, Lq, Lk) that defines this mask; True = may attend."""
        raise NotImplementedError

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _Conjunction(Mask):
    masks: tuple[Mask, ...]

    def parts(self) -> tuple[Mask, ...]:
        return self.masks

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        return functools.reduce(operator.and_, (mask.dense(B, Hq, Lq, Lk) for mask in self.masks))

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        return functools.reduce(_intersect, (mask._structure(shape, like) for mask in self.masks))


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Query i attends no key after its own position, but for the first `prefix` keys.

    `prefix` (B,) of ints is how many leading keys of each batch element every query may attend: a
    prefix language model (Raffel et al. 2020, section 3.2.1) reads its input both ways and writes
    what follows. It can't be joined by `&` with another mask that bounds keys from above.

    `align` says at which key query 0 stands: "upper_left" (key 0, as torch's `is_causal`),
    "lower_right" (key Lk - Lq, as in flash-attention), an int, or an int tensor (B,). With
    Lq == Lk all of them may be left out; with Lq != Lk a missing `align` raises ValueError.
    """

    align: Align = None
    prefix: Tensor | None = None

    def __post_init__(self) -> None:
        if self.prefix is not None:
            _require_integers("Causal", "prefix", self.prefix, 1)

    def bounds_keys_above(self) -> bool:
        return True

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        allowed = _dense_band(self.align, None, 0, (B, Hq, Lq, Lk))
        if self.prefix is None:
            return allowed
        j = torch.arange(Lk, device=self.prefix.device)
        return allowed.to(self.prefix.device) | (j < self.prefix.view(B, 1, 1, 1))

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        structure = _band(self.align, None, 0, shape, like)
        if self.prefix is None:
            return structure
        return structure._replace(
            prefix_lengths=_per_batch("Causal", "prefix", self.prefix, shape, like)
        )


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """Query i attends keys from i - left to i + right, counted from its own position.

    `left` and `right` are ints >= 0 or None (unbounded on that side); `align` as in `Causal`.
    """

    left: int | None
    right: int | None
    align: Align = None

    def __post_init__(self) -> None:
        for name, size in (("left", self.left), ("right", self.right)):
            if size is not None and (not isinstance(size, int) or size < 0):
                fail_value("Window", name, repr(size), "an int >= 0, or None for no bound")

    def bounds_keys_above(self) -> bool:
        return self.right is not None

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        return _dense_band(self.align, self.left, self.right, (B, Hq, Lq, Lk))

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        return _band(self.align, self.left, self.right, shape, like)


@dataclass(frozen=True, eq=False)
class KeyLengths(Mask):
    """Batch element b has `lengths[b]` keys; later ones are padding. `lengths` (B,) of ints."""

    lengths: Tensor

    def __post_init__(self) -> None:
        _require_integers("KeyLengths", "lengths", self.lengths, 1)

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        j = torch.arange(Lk, device=self.lengths.device)
        return (j < self.lengths.view(B, 1, 1, 1)).expand(B, Hq, Lq, Lk)

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        return MaskStructure(
            key_lengths=_per_batch("KeyLengths", "lengths", self.lengths, shape, like)
        )


@dataclass(frozen=True, eq=False)
class QueryLengths(Mask):
    """Batch element b has `lengths[b]` queries; later rows give zeros. `lengths` (B,) of ints."""

    lengths: Tensor

    def __post_init__(self) -> None:
        _require_integers("QueryLengths", "lengths", self.lengths, 1)

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        i = torch.arange(Lq, device=self.lengths.device).view(Lq, 1)
        return (i < self.lengths.view(B, 1, 1, 1)).expand(B, Hq, Lq, Lk)

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        return MaskStructure(
            query_lengths=_per_batch("QueryLengths", "lengths", self.lengths, shape, like)
        )


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """A query attends the keys of its own document (packed sequences).

    `ids` (B, Lq) of ints names each query's document, `key_ids` (B, Lk) each key's; left out,
    queries and keys share `ids` (then Lq == Lk).
    """

    ids: Tensor
    key_ids: Tensor | None = None

    def __post_init__(self) -> None:
        _require_integers("Documents", "ids", self.ids, 2)
        if self.key_ids is not None:
            _require_integers("Documents", "key_ids", self.key_ids, 2)

    def _keys(self) -> Tensor:
        return self.ids if self.key_ids is None else self.key_ids

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        same = self.ids.view(B, 1, Lq, 1) == self._keys().view(B, 1, 1, Lk)
        return same.expand(B, Hq, Lq, Lk)

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        batch, _, query_len, key_len = shape
        for name, ids, length in (
            ("ids", self.ids, query_len),
            ("ids" if self.key_ids is None else "key_ids", self._keys(), key_len),
        ):
            if not same_sizes(ids.shape, (batch, length)):
                fail_value(
                    "Documents", name, f"shape {shape_text(ids.shape)}", f"({batch}, {length})"
                )
            require_device("Documents", name, ids, "query", like)
        return MaskStructure(
            query_documents=self.ids.to(torch.int64), key_documents=self._keys().to(torch.int64)
        )


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any pattern: a bool tensor broadcastable to (B, Hq, Lq, Lk), True = may attend."""

    tensor: Tensor

    def __post_init__(self) -> None:
        require_tensor("Dense", "tensor", self.tensor)
        if self.tensor.dtype != torch.bool:
            expected = "dtype bool, True = may attend (pass additive float masks as `bias`)"
            fix = "pass tensor == 1 where 1 means may attend, tensor == 0 where it means masked"
            fix = "" if self.tensor.is_floating_point() else fix
            fail_type("Dense", "tensor", self.tensor.dtype, expected, fix)

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        return self.tensor.expand(B, Hq, Lq, Lk)

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        require_device("Dense", "tensor", self.tensor, "query", like)
        return MaskStructure(
            dense=require_broadcastable("Dense", "tensor", self.tensor, shape, "(B, Hq, Lq, Lk)")
        )


def as_mask(function: str, mask: Mask | Tensor | None) -> Mask | None:
    """A bool tensor as `Dense`, masks and None as they are; anything else raises TypeError."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Tensor):
        expected = "None, a bool tensor or a mask object (Causal, Window, KeyLengths, ...)"
        fix = as_tensor("mask", mask)
        if mask is True or (isinstance(mask, str) and mask == "causal"):
            fix = "pass Causal()"
        elif isinstance(mask, type) and issubclass(mask, Mask) and mask is not Mask:
            fix = f"pass an instance, {mask.__name__}(...)"
        fail_type(function, "mask", type(mask).__name__, expected, fix)
    return Dense(mask)


def structure_of(
    mask: Mask | None, shape: tuple[int, int, int, int], like: Tensor
) -> MaskStructure:
    """The kernels' form of `mask` for a problem of `shape` (B, Hq, Lq, Lk) on `like`'s device."""
    return NO_MASK if mask is None else mask._structure(shape, like)


def offset_of(
    function: str, align: Align, shape: tuple[int, int, int, int], like: Tensor
) -> int | Tensor:
    """The key at which query 0 stands: an int, or an int64 tensor (B,)."""
    query_len, key_len = shape[2:]
    if align is None:
        if not same_sizes((query_len,), (key_len,)):
            raise ValueError(
                f"{function}: `align` is needed because Lq = {query_len} differs from Lk = "
                f'{key_len}: expected "upper_left" (query 0 at key 0), "lower_right" (the last '
                "query at the last key), an int, or an int tensor (B,)"
            )
        return 0
    if isinstance(align, Tensor):
        _require_integers(function, "align", align, 1)
        return _per_batch(function, "align", align, shape, like)
    if align == "upper_left":
        return 0
    if align == "lower_right":
        offset = key_len - query_len
        # in a trace lengths are tensors: the offset follows them as one of each batch element
        return offset.to(like.device).expand(shape[0]) if isinstance(offset, Tensor) else offset
    if not isinstance(align, int) or isinstance(align, bool):
        expected = '"upper_left", "lower_right", an int or an int tensor (B,)'
        fail_value(function, "align", repr(align), expected)
    return align


def _dense_band(
    align: Align, left: int | None, right: int | None, shape: tuple[int, int, int, int]
) -> Tensor:
    batch, _, query_len, key_len = shape
    device = align.device if isinstance(align, Tensor) else None
    offset = offset_of("mask", align, shape, torch.empty(0, device=device))
    position = torch.arange(query_len, device=device).view(1, query_len, 1)
    position = position + (offset.view(batch, 1, 1) if isinstance(offset, Tensor) else offset)
    j = torch.arange(key_len, device=device)
    allowed = torch.ones(1, query_len, key_len, dtype=torch.bool, device=device)
    if left is not None:
        allowed = allowed & (j >= position - left)
    if right is not None:
        allowed = allowed & (j <= position + right)
    return allowed.unsqueeze(1).expand(shape)


def _band(
    align: Align,
    left: int | None,
    right: int | None,
    shape: tuple[int, int, int, int],
    like: Tensor,
) -> MaskStructure:
    offset = offset_of("mask", align, shape, like)
    if isinstance(offset, Tensor):
        reach = shape[2] + shape[3]  # no |j - i| is larger: "no bound"
        lower = torch.full_like(offset, -reach) if left is None else offset - left
        upper = torch.full_like(offset, reach) if right is None else offset + right
        return MaskStructure(band=torch.stack((lower, upper), dim=-1))
    return MaskStructure(
        band_lower=None if left is None else offset - left,
        band_upper=None if right is None else offset + right,
    )


def _intersect(a: MaskStructure, b: MaskStructure) -> MaskStructure:
    query_documents, key_documents = a.query_documents, a.key_documents
    if b.query_documents is not None and b.key_documents is not None:
        if query_documents is None or key_documents is None:
            query_documents, key_documents = b.query_documents, b.key_documents
        else:
            query_documents, key_documents = _pair_documents(
                query_documents, key_documents, b.query_documents, b.key_documents
            )
    band = a.band if b.band is None else b.band
    if a.band is not None and b.band is not None:
        lower = torch.maximum(a.band[:, 0], b.band[:, 0])
        upper = torch.minimum(a.band[:, 1], b.band[:, 1])
        band = torch.stack((lower, upper), dim=-1)
    dense = a.dense if b.dense is None else b.dense
    if a.dense is not None and b.dense is not None:
        dense = a.dense & b.dense
    return MaskStructure(
        dense=dense,
        key_lengths=_least(a.key_lengths, b.key_lengths),
        query_lengths=_least(a.query_lengths, b.query_lengths),
        query_documents=query_documents,
        key_documents=key_documents,
        band=band,
        prefix_lengths=a.prefix_lengths if b.prefix_lengths is None else b.prefix_lengths,
        band_lower=_tightest(a.band_lower, b.band_lower, max),
        band_upper=_tightest(a.band_upper, b.band_upper, min),
    )


def _tightest(a: int | None, b: int | None, pick: Callable[[int, int], int]) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return pick(a, b)


def _least(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return torch.minimum(a, b)


def _pair_documents(
    query_a: Tensor, key_a: Tensor, query_b: Tensor, key_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids that agree exactly where both given pairs of ids agree."""
    ids_a, ids_b = torch.cat((query_a, key_a), 1), torch.cat((query_b, key_b), 1)
    ids = _rank(ids_a) * ids_a.shape[1] + _rank(ids_b)
    return ids[:, : query_a.shape[1]].contiguous(), ids[:, query_a.shape[1] :].contiguous()


def _rank(ids: Tensor) -> Tensor:
    """Each id as the number of smaller ones in its row: ids of any size become small ones.

    `torch.unique` would do the same, but its result's shape depends on the data, and a compiled
    graph must not.
    """
    return torch.searchsorted(ids.sort(dim=-1).values, ids)


def _require_integers(function: str, argument: str, value: object, dimensions: int) -> None:
    tensor = require_tensor(function, argument, value)
    if tensor.dtype not in INTEGER_DTYPES:
        fix = f"pass {argument}.long()" if tensor.dtype != torch.bool else ""
        if tensor.dtype == torch.bool and tensor.dim() == 2:
            fix = f"of a padding mask, True = a token, pass {argument}.sum(-1)"
        fail_type(function, argument, tensor.dtype, "an integer dtype", fix)
    if tensor.dim() != dimensions:
        names = "(B,)" if dimensions == 1 else "(B, L)"
        fix = f"pass {argument}[None] for a batch of one" if tensor.dim() == dimensions - 1 else ""
        fail_value(function, argument, f"shape {shape_text(tensor.shape)}", f"shape {names}", fix)


def _per_batch(
    function: str, argument: str, value: Tensor, shape: tuple[int, int, int, int], like: Tensor
) -> Tensor:
    if not same_sizes(value.shape[:1], shape[:1]):
        fail_value(
            function, argument, f"shape {shape_text(value.shape)}", f"shape (B,) = ({shape[0]},)"
        )
    require_device(function, argument, value, "query", like)
    return value.to(torch.int64)
