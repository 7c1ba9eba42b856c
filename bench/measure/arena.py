"""The inputs of a case in an arena, and a look at results as soon as they are returned."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conduct.arena import Arena
from .inputs import Inputs, Outputs

EARLY = 64  # elements of a result that are read as soon as the call returns


class CaseArena:
    """The inputs of a case in an arena, and its masks, which stay as they are."""

    def __init__(self, inputs: Inputs, seed: int | None = None) -> None:
        self._inputs = inputs
        named = {name: getattr(inputs, name) for name in inputs.renewed}
        self.arena = Arena({n: tensor for n, tensor in named.items() if tensor is not None}, seed)
        masks = {name: getattr(inputs, name, None) for name in ("allowed", "lengths")}
        self._masks = {n: (mask, mask.clone()) for n, mask in masks.items() if mask is not None}

    @property
    def inputs(self) -> Inputs:
        """They see every renewal; after a move they are others."""
        tensors: dict[str, Any] = self.arena.tensors
        return replace(self._inputs, **tensors)

    def moved(self) -> Inputs:
        """At other addresses; but not a bias, to which FlexAttention's function is bound."""
        self.arena.move(tuple(name for name in self.arena.tensors if name != "bias"))
        return self.inputs

    def changed(self) -> str | None:
        """The name of a tensor that holds other values than were put there; then all are right."""
        found = self.arena.changed()
        if found is not None:
            self.arena.put_back()
        for name, (mask, right) in self._masks.items():
            if not torch.equal(mask, right):
                mask.copy_(right)
                found = found or name
        return found


class Peek(NamedTuple):
    """Some elements of a tensor, at the time that it was returned."""

    tensor: Tensor
    at: Tensor
    found: Tensor

    @property
    def changed(self) -> bool:
        now = self.tensor.detach().reshape(-1)[self.at]
        return not torch.equal(now.nan_to_num(), self.found.nan_to_num())


def peek(outputs: Outputs, draw: Random) -> list[Peek]:
    """Where they are no tensors, that is for the gate to say."""
    found = []
    for tensor in outputs:
        if type(tensor) is Tensor and tensor.numel():
            at = torch.tensor([draw.randrange(tensor.numel()) for _ in range(EARLY)])
            at = at.to(tensor.device)
            found.append(Peek(tensor, at, tensor.detach().reshape(-1)[at].clone()))
    return found
