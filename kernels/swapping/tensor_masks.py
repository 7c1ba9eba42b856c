"""Mask tensors as other libraries pass them, in terms of rowmax's masks.

A dense mask that is padding, a causal triangle or a window in disguise is recognised by its values,
so that kernels skip what it rules out. That reads the mask once; the answer is kept for as long as
the tensor lives unchanged, since all layers of a model are given the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..masks import Causal, Dense, KeyLengths, Mask, Window

_T = TypeVar("_T")

# tensor -> (its version, {what was asked: answer}); answers hold no reference to the tensor
_answers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mask_of(allowed: Tensor, batch: int) -> Mask | None:
    """The mask that a bool tensor (B | 1, H | 1, Lq | 1, Lk), True = may attend, stands for.

    None where everything is allowed. While a graph is traced values can't be looked at, and the
    tensor is taken as it is.
    """
    if not _is_readable(allowed):
        return Dense(allowed)
    found, mask = remember(allowed, batch, lambda tensor: _recognise(tensor, batch))
    return mask if found else Dense(allowed)


def mask_of_forbidden(forbidden: Tensor, shape: tuple[int, int, int, int]) -> Mask | Tensor | None:
    """As `mask_of`, from a bool or additive tensor that `shape` (B | 1, H | 1, Lq | 1, Lk) views.

    In a bool one True forbids. An additive one of nothing but 0 and -inf is a mask as well; any
    other, and one that wants a gradient, is a bias, and comes back as a tensor of that shape.
    """
    if not forbidden.is_floating_point():
        if not _is_readable(forbidden):
            return Dense(~forbidden.view(shape))
        return remember(forbidden, shape, lambda tensor: _or_dense(~tensor.view(shape)))
    if forbidden.requires_grad or not _is_readable(forbidden):
        return forbidden.view(shape)

    def binary(bias: Tensor) -> tuple[bool, Mask | None]:
        allowed = bias == 0
        if not bool((allowed | (bias == -torch.inf)).all()):
            return False, None
        return True, _or_dense(allowed.view(shape))

    is_mask, mask = remember(forbidden, shape, binary)
    return mask if is_mask else forbidden.view(shape)


def remember(tensor: Tensor, question: Hashable, answer: Callable[[Tensor], _T]) -> _T:
    """`answer(tensor)`, computed once for a tensor that is not written to in between."""
    version = 0 if tensor.is_inference() else tensor._version
    known = _answers.get(tensor)
    if known is None or known[0] != version:
        known = (version, {})
        _answers[tensor] = known
    if question not in known[1]:
        known[1][question] = answer(tensor)
    result: _T = known[1][question]
    return result


def _is_readable(mask: Tensor) -> bool:
    """Whether a decision may depend on the values: not while tracing, nor inside a transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(mask)
        or torch._C._len_torch_dispatch_stack()
        or mask.is_meta
    )


def _or_dense(allowed: Tensor) -> Mask | None:
    found, mask = _recognise(allowed, allowed.shape[0])
    return mask if found else Dense(allowed)


_NOT_FOUND = (False, None)


def _recognise(allowed: Tensor, batch: int) -> tuple[bool, Mask | None]:
    """Whether the mask has a structure, and which; None allows everything."""
    if allowed.numel() == 0 or (allowed.shape[1] > 1 and allowed.stride(1) != 0):
        return _NOT_FOUND
    plane = allowed[:, 0]
    if plane.shape[1] > 1 and plane.stride(1) != 0:
        return _banded(plane, batch)
    keys, key_len = plane[:, 0], plane.shape[2]  # the same for all queries
    lengths = keys.sum(-1)
    if not torch.equal(keys, _below(lengths, key_len)):
        return _NOT_FOUND
    full = bool((lengths == key_len).all())
    return True, None if full else KeyLengths(lengths.expand(batch))


def _banded(plane: Tensor, batch: int) -> tuple[bool, Mask | None]:
    """`Causal` or a causal `Window`, with or without `KeyLengths`, if (B | 1, Lq, Lk) is one."""
    _, query_len, key_len = plane.shape
    lengths = _ends(plane.any(1))  # of the keys that some query attends
    longest = int(lengths.argmax())
    offset = int(_ends(plane[longest, 0])) - 1  # the last key of query 0
    last = min(query_len - 1, key_len - 1 - offset)  # the last query whose own key is there
    if offset < 0 or last < 0:
        return _NOT_FOUND
    first = int(plane[longest, last].to(torch.uint8).argmax())
    left = last + offset - first if first > 0 else None
    position = torch.arange(query_len, device=plane.device).view(-1, 1) + offset
    j = torch.arange(key_len, device=plane.device)
    band = j <= position
    if left is not None:
        band = band & (j >= position - left)
    if not torch.equal(plane, (band & _below(lengths, key_len).unsqueeze(1)).expand_as(plane)):
        return _NOT_FOUND
    mask: Mask = Causal(align=offset) if left is None else Window(left, 0, align=offset)
    if bool((lengths == min(key_len, query_len + offset)).all()):
        return True, mask
    return True, mask & KeyLengths(lengths.expand(batch))


def _below(lengths: Tensor, key_len: int) -> Tensor:
    return torch.arange(key_len, device=lengths.device) < lengths.unsqueeze(-1)


def _ends(keys: Tensor) -> Tensor:
    """One past the last True of each row of (..., Lk); 0 where there is none."""
    numbered = torch.arange(1, keys.shape[-1] + 1, device=keys.device)
    return (keys * numbered).amax(-1)
