"""Mask tensors as other libraries pass them, in terms of rowmax's masks.

A dense mask that is padding, a causal triangle or a window in disguise is recognised by its values,
so that kernels skip what it rules out: on the CPU, for a look at values on a GPU waits for all work
before it, and ends the recording of a CUDA graph. There a mask is taken as it is, unless the
function that made it says what it made (`remember`).

On the CPU, what a tensor means is a function of its values and of the sizes of the problem that it
broadcasts to, and of nothing else. Its values are read at every call, for nothing in torch tells
that a tensor is unchanged: a write through `.data` or numpy leaves its version as it was. What
values mean is remembered by these values themselves, of larger masks that of the last few alone: a
model's layers share theirs.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..api.masks import Causal, Dense, KeyLengths, Mask, MaskStructure, Window, structure_of
from ..ops.fast_path import are_ordinary
from ..ops.torch_internals import count_dispatch_modes
from ..ops.tracing import is_recorded

Sizes = tuple[int, int, int, int]  # (B, Hq, Lq, Lk) of the problem

_NOT_FOUND = (False, None)
# To look up this many bytes takes less time than to recognise them again.
_SMALL = 1 << 16
# Up to this many, a comparison with a copy of what was recognised takes a fifth of the time.
_LARGE = 1 << 24


def mask_of(allowed: Tensor, sizes: Sizes) -> Mask | None:
    """The mask that a bool tensor (B | 1, Hq | 1, Lq | 1, Lk | 1), True = may attend, stands for.

    None where everything is allowed. On a GPU, and while a graph is traced, values are not looked
    at, and the tensor is taken as it is.
    """
    known = _remembered(allowed, sizes)
    if known is not None:
        return known
    found, mask = _read(allowed, sizes)
    return mask if found else Dense(allowed)


def mask_of_forbidden(forbidden: Tensor, sizes: Sizes) -> Mask | Tensor | None:
    """As `mask_of`, from a bool or additive tensor (B | 1, Hq | 1, Lq | 1, Lk | 1).

    In a bool one True forbids. An additive one of nothing but 0 and -inf is a mask as well; any
    other, and one that wants a gradient, is a bias, and comes back as it is.
    """
    if not forbidden.is_floating_point():
        return mask_of(~forbidden, sizes)
    found, mask = _NOT_FOUND if forbidden.requires_grad else _read(forbidden, sizes)
    return mask if found else forbidden


class _Remembered(NamedTuple):
    structure: MaskStructure
    version: int  # of the tensor: one that was written to since means something else


@dataclass(frozen=True, eq=False)
class _Known(Mask):
    """A mask whose structure is there already."""

    structure: MaskStructure

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        tensors = (field for field in self.structure if isinstance(field, Tensor))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        allowed = self.structure.allowed(Lq, Lk, device)
        allowed = torch.ones((), dtype=torch.bool) if allowed is None else allowed
        return allowed.expand(B, Hq, Lq, Lk)

    def _structure(self, shape: Sizes, like: Tensor) -> MaskStructure:  # noqa: ARG002
        return self.structure


def remember(allowed: Tensor, mask: Mask) -> None:
    """Notes at a bool tensor (B, 1, Lq, Lk) that is not to be read what mask it was made from.

    It counts until torch sees a write to the tensor; a write through `.data` goes unseen.
    """
    if allowed.is_cpu or allowed.is_inference() or torch.compiler.is_compiling():
        return
    batch, heads, query_len, key_len = allowed.shape
    structure = structure_of(mask, (batch, heads, query_len, key_len), allowed)
    allowed._rowmax_made_from = _Remembered(  # type: ignore[attr-defined]
        structure, allowed._version
    )


def _remembered(allowed: Tensor, sizes: Sizes) -> Mask | None:
    note: _Remembered | None = getattr(allowed, "_rowmax_made_from", None)
    if note is None or torch.compiler.is_compiling() or note.version != allowed._version:
        return None
    batch, _, query_len, key_len = sizes
    return _Known(note.structure) if allowed.shape == (batch, 1, query_len, key_len) else None


def is_zero(bias: Tensor) -> bool:
    """Whether the bias is nothing but the zeros that stand for none (T5's cross-attention)."""
    if bias.requires_grad or not _is_readable(bias):
        return False
    return not (bool(bias[:, :, :1].any()) or bool(bias.any()))


def _is_readable(mask: Tensor) -> bool:
    """Whether a decision may depend on the values: on the CPU, but in no trace or transform.

    Only an ordinary tensor has its values in its memory: a subclass says for itself what they are,
    perhaps on several machines (DTensor), and zeros or a negated view have others or none.
    """
    return not (
        is_recorded() or count_dispatch_modes() or not are_ordinary((mask,)) or not mask.is_cpu
    )


def _read(mask: Tensor, sizes: Sizes) -> tuple[bool, Mask | None]:
    """Whether a structure is found in a bool tensor of what is allowed or an additive one."""
    if not _is_readable(mask) or 0 in sizes:
        return _NOT_FOUND
    for dim in range(4):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    mask = mask.detach()
    # a tensor made in inference mode can't be saved for backward outside of it
    key = (mask.dtype, tuple(mask.shape), sizes, torch.is_inference_mode_enabled())
    if mask.numel() * mask.itemsize <= _SMALL:
        return _recognise_values(_bytes_of(mask), *key)
    words = _words_of(mask)
    if words is None:
        return _recognise(mask, sizes)
    for known in tuple(_recent):
        if known.key == key and torch.equal(known.words, words):
            return known.result
    result = _recognise(mask, sizes)
    _recent.append(_Recognised(key, words.clone(), result))
    return result


class _Recognised(NamedTuple):
    key: tuple[object, ...]
    words: Tensor  # a copy of the mask's values
    result: tuple[bool, Mask | None]


_recent: deque[_Recognised] = deque(maxlen=4)


def _words_of(mask: Tensor) -> Tensor | None:
    """The values as int64, which are compared fastest; None where that can't be, or is too much."""
    size = mask.numel() * mask.itemsize
    if size > _LARGE or not mask.is_contiguous():
        return None
    aligned = size % 8 == 0 and mask.storage_offset() * mask.itemsize % 8 == 0
    return mask.view(-1).view(torch.int64) if aligned else None


def _bytes_of(mask: Tensor) -> bytes:
    flat = mask.reshape(-1)
    if flat.stride(0) != 1:  # also that of a single element
        flat = flat.clone(memory_format=torch.contiguous_format).as_strided(flat.shape, (1,))
    return flat.view(torch.uint8).numpy().tobytes()


@functools.lru_cache(maxsize=64)
def _recognise_values(
    values: bytes, dtype: torch.dtype, shape: tuple[int, ...], sizes: Sizes, inference: bool
) -> tuple[bool, Mask | None]:
    return _recognise(torch.frombuffer(bytearray(values), dtype=dtype).view(shape), sizes)


def _recognise(mask: Tensor, sizes: Sizes) -> tuple[bool, Mask | None]:
    if mask.shape[1] > 1:
        return _NOT_FOUND
    plane = mask[:, 0]
    if plane.dtype != torch.bool:
        # few biases get beyond their first row
        if _binary(plane[:, :1]) is None or (binary := _binary(plane)) is None:
            return _NOT_FOUND
        plane = binary
    batch, _, _, key_len = sizes
    if plane.shape[1] == 1:  # the same for all queries
        keys = plane[:, 0].expand(-1, key_len)
        lengths = keys.sum(-1)
        if not torch.equal(keys, _below(lengths, key_len)):
            return _NOT_FOUND
        return True, _key_lengths(lengths, batch, key_len)
    if plane.shape[2] == 1:  # the same for all keys
        return (True, None) if bool(plane.all()) else _NOT_FOUND
    return _banded(plane, batch)


def _binary(bias: Tensor) -> Tensor | None:
    """Where a bias of nothing but 0 and -inf is 0; None for any other."""
    allowed = bias == 0
    return allowed if _same(allowed, bias != -torch.inf) else None


def _banded(plane: Tensor, batch: int) -> tuple[bool, Mask | None]:
    """Whether (B | 1, Lq, Lk) is a causal band, a causal window or lengths, or two of these.

    The candidate comes from a few rows; whether it is right, from all of them.
    """
    _, query_len, key_len = plane.shape
    lengths = _ends(plane[:, -1])  # no query attends a later key than the last one,
    if not bool(lengths.all()):
        lengths = _ends(plane.any(1))  # but a window may have left all keys behind
    at = int(lengths.argmax())
    longest = int(lengths[at])
    offset = int(_ends(plane[at, 0])) - 1  # the last key of query 0
    if not 0 <= offset < longest:
        return _NOT_FOUND
    last = min(query_len, longest - offset) - 1  # the last query whose own key is there
    first = int(plane[at, last].to(torch.uint8).argmax())
    left = last + offset - first if first > 0 else None
    expected = plane.new_ones((query_len, key_len)).tril_(offset)
    if left is not None:
        expected.triu_(offset - left)
    reach = min(key_len, query_len + offset)
    is_cut = not bool((lengths == reach).all())
    if is_cut:
        expected = expected & _below(lengths, key_len).unsqueeze(1)
    if not _same(plane, expected.expand_as(plane)):
        return _NOT_FOUND
    if left is None and offset >= longest - 1:  # the band rules nothing out
        return True, _key_lengths(lengths, batch, key_len)
    band = Causal(align=offset) if left is None else Window(left, 0, align=offset)
    return True, band & KeyLengths(lengths.expand(batch)) if is_cut else band


def _key_lengths(lengths: Tensor, batch: int, key_len: int) -> Mask | None:
    return None if bool((lengths == key_len).all()) else KeyLengths(lengths.expand(batch))


def _below(lengths: Tensor, key_len: int) -> Tensor:
    return torch.arange(key_len, device=lengths.device) < lengths.unsqueeze(-1)


def _ends(keys: Tensor) -> Tensor:
    """One past the last True of each row of (..., Lk); 0 where there is none."""
    numbered = torch.arange(1, keys.shape[-1] + 1, device=keys.device)
    return (keys * numbered).amax(-1)


def _same(a: Tensor, b: Tensor) -> bool:
    """`torch.equal` of bool tensors, eight elements at a time where they allow it."""
    words = [tensor.view(torch.int64) if _holds_words(tensor) else None for tensor in (a, b)]
    if words[0] is None or words[1] is None:
        return torch.equal(a, b)
    return torch.equal(words[0], words[1])


def _holds_words(tensor: Tensor) -> bool:
    return (
        tensor.stride(-1) == 1
        and tensor.storage_offset() % 8 == 0
        and tensor.shape[-1] % 8 == 0
        and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
    )
