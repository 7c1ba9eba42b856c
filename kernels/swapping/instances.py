"""Giving one module instance another forward: its class becomes a subclass made for the purpose.

A changed class is all there is to a swap: parameters, buffers, hooks, mode and every attribute stay
in the instance's own dictionary, untouched, and going back is one assignment. The subclass bears
the name of the class that it replaces.

A deep copy of a swapped module is swapped as well. A pickle of it (`torch.save(model)`, a process
that is spawned) holds the original class and no word of rowmax, so that it loads anywhere.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound="Swapped")


@dataclass(frozen=True)
class Options:
    """What a swapped module was asked to do; kept in its class, so that its state has none."""

    backend: str = "auto"
    pack: bool = False


class Swapped(nn.Module):
    """Base of the forms that replace a class: `class Form(Swapped): def forward(...)`."""

    rowmax_original: ClassVar[type[nn.Module]]
    rowmax_options: ClassVar[Options]

    def __deepcopy__(self: _M, memo: dict[int, Any]) -> _M:
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(self.__reduce_ex__(1)[2], memo))
        return duplicate

    def __copy__(self: _M) -> _M:
        duplicate = type(self).__new__(type(self))
        duplicate.__setstate__(dict(self.__reduce_ex__(1)[2]))
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The form of protocol 1 names the class as an argument, where it can be replaced.
        reduced: Any = super().__reduce_ex__(min(int(protocol), 1))
        rebuild, arguments, *state = reduced
        own, original = type(self), self.rowmax_original
        return (rebuild, tuple(original if item is own else item for item in arguments), *state)


@functools.cache
def swapped_class(
    form: type[Swapped], original: type[nn.Module], options: Options
) -> type[Swapped]:
    """The class of instances of `original` that run `form`."""
    names: dict[str, Any] = {
        "rowmax_original": original,
        "rowmax_options": options,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return cast(type[Swapped], type(original.__name__, (form, original), names))


class ClassChange:
    """The swap of one instance, and its undoing."""

    def __init__(self, module: nn.Module, form: type[Swapped], options: Options) -> None:
        self._module = module
        self._original = type(module)
        # mypy takes the class for one of its instances, which are not hashable
        self._swapped = swapped_class(form, self._original, options)  # type: ignore[arg-type]

    def apply(self) -> None:
        self._module.__class__ = self._swapped

    def undo(self) -> None:
        """Back to the original, unless someone else has changed the class since."""
        unchanged = type(self._module) is self._swapped
        if unchanged:
            self._module.__class__ = self._original


def has_own(module: nn.Module, stock: type[nn.Module], *methods: str) -> str | None:
    """The first of `methods` that `module` does not take from `stock`, as a sentence; else None."""
    for name in methods:
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
        if getattr(type(module), name) is not getattr(stock, name):
            return f"{type(module).__name__} has a {name} of its own"
    return None


def is_plain_call(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but its forward: no hook looks on."""
    every = nn.modules.module
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def as_torch_does(*tensors: Tensor) -> bool:
    """Whether the original's forward has to run: autocast or nested tensors decide its types."""
    if torch._C._is_any_autocast_enabled():
        return True
    return any(tensor.is_nested for tensor in tensors)
