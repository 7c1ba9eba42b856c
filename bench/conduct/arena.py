"""Tensors that a candidate is called on again and again, never twice with the same values.

Values change in place, so what is kept by the address or the identity of a tensor is out of date;
storage moves, so what is bound to an address is as well. A candidate that computes its result at
every call notices neither.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

NUDGE = 4.0  # added to a few elements: in units of values of order one
NUDGED = 4  # elements
STIRRED = 8  # elements
_PADDING = 1024  # elements that a moved tensor's storage may begin before it
_ALIGNMENT = 64  # elements: no tensor is aligned worse than a fresh one

Region = tuple[slice, ...]


class Arena:
    """Tensors by name, each dense in memory in some order of its dimensions.

    What `renew` puts into one is its first values, rotated.

    So values keep their distribution, whatever it is, and a renewal costs one copy. `key` makes a
    renewal one that can be repeated.
    """

    def __init__(self, tensors: Mapping[str, Tensor], seed: int | None = None) -> None:
        self.tensors = dict(tensors)
        self._random = random.Random(seed)  # None: the system's entropy, which nobody can guess
        self._orders = {name: _order(tensor) for name, tensor in tensors.items()}
        self._first = {name: self._flat(name).clone() for name in tensors}
        self._shift = dict.fromkeys(tensors, 0)
        self._nudges: list[tuple[str, int]] = []
        self._generators: dict[torch.device, torch.Generator] = {}

    def key(self) -> int:
        return self._random.getrandbits(48)

    def renew(self, key: int | None = None, names: tuple[str, ...] | None = None) -> None:
        """Other values in every tensor, or in those of `names`, in place."""
        draw = random.Random(self.key() if key is None else key)
        self._nudges = []
        for name, first in self._first.items():
            size = first.numel()
            shift = draw.randrange(1, size) if size > 1 else 0
            if names is None or name in names:
                self._shift[name] = shift
                _rotate(self._flat(name), first, shift)

    def stir(self, names: tuple[str, ...]) -> None:
        """A few elements of each of `names` get another value of its own, in no time to speak of.

        What `changed` says holds again after the next renewal.
        """
        for name in names:
            first = self._first[name]
            if first.numel() > 1:
                device = first.device
                if device not in self._generators:
                    self._generators[device] = torch.Generator(device).manual_seed(self.key())
                at, of = torch.randint(
                    first.numel(), (2, STIRRED), generator=self._generators[device], device=device
                )
                self._flat(name).index_copy_(0, at, first[of])

    def nudge(self, regions: Mapping[str, Region], key: int | None = None) -> str | None:
        """A few elements of one of the tensors named, within its region; the tensor's name."""
        draw = random.Random(self.key() if key is None else key)
        names = [name for name in regions if self.tensors[name].is_floating_point()]
        if not names:
            return None
        name = draw.choice(names)
        shape, region = self.tensors[name].shape, regions[name]
        for _ in range(NUDGED):
            at = 0
            for axis in self._orders[name]:
                size = shape[axis]
                at = at * size + draw.choice(range(*region[axis].indices(size)))
            self._nudges.append((name, at))
            with torch.no_grad():
                self._flat(name)[at].add_(NUDGE)
        return name

    def move(self, names: tuple[str, ...] | None = None) -> None:
        """Every tensor, or those of `names`, is another one, elsewhere, with the same values."""
        for name in self.tensors if names is None else names:
            tensor = self.tensors[name]
            start = _ALIGNMENT * self._random.randrange(1, _PADDING // _ALIGNMENT + 1)
            buffer = tensor.new_empty(tensor.numel() + _PADDING, requires_grad=False)
            moved = buffer.as_strided(tensor.shape, tensor.stride(), start)
            moved.copy_(tensor.detach())
            self.tensors[name] = moved.requires_grad_(tensor.requires_grad)

    def put_back(self) -> None:
        """What `changed` found to be changed, as it was."""
        for name in self._first:
            self._flat(name).copy_(self._right(name))

    def changed(self) -> str | None:
        """The name of a tensor that holds other bits than were put there."""
        for name in self._first:
            if not torch.equal(_bits(self._right(name)), _bits(self._flat(name))):
                return name
        return None

    def _right(self, name: str) -> Tensor:
        right = torch.empty_like(self._first[name])
        _rotate(right, self._first[name], self._shift[name])
        for nudged, at in self._nudges:
            if nudged == name:
                right[at].add_(NUDGE)
        return right

    def _flat(self, name: str) -> Tensor:
        return self.tensors[name].detach().permute(self._orders[name]).view(-1)


def _order(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the outermost first."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: -strides[axis])


def _rotate(target: Tensor, first: Tensor, shift: int) -> None:
    size = first.numel()
    target[shift:].copy_(first[: size - shift])
    if shift:
        target[:shift].copy_(first[size - shift :])


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])
