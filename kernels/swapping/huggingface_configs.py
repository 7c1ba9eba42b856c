"""A config that says "rowmax" to the modules of one model, and shares everything else.

Models of transformers ask `config._attn_implementation` at every call, and several models, or a
user's own code, may hold the same config. So the modules of a swapped model get another object over
the same attributes, in the manner of `instances.py`: what is set on one is seen on the other, a
pickle holds the original, and only the answer to that one question differs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .huggingface import NAME
from .instances import Options


class Aliases:
    """The aliases of one model's configs: one for each object, sub-configs included."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._made: dict[int, Any] = {}

    def of(self, config: Any) -> Any:
        if getattr(config, "rowmax_config", None) is not None:
            return config
        alias = self._made.get(id(config))
        if alias is None:
            alias = self._made[id(config)] = _alias(config, self, self._options)
        return alias


class ConfigChange:
    """One module's `config` replaced by its alias, and put back."""

    def __init__(self, module: nn.Module, aliases: Aliases) -> None:
        self._module = module
        self._original = module.__dict__["config"]
        self._alias = aliases.of(self._original)

    def apply(self) -> None:
        self._module.__dict__["config"] = self._alias

    def undo(self) -> None:
        """Back to the original, unless someone else has set another config since."""
        if self._module.__dict__.get("config") is self._alias:
            self._module.__dict__["config"] = self._original


def is_alias(config: object) -> bool:
    return getattr(config, "rowmax_config", None) is not None


class _Alias:
    """What an alias does differently; the classes made of it name the config and the options."""

    rowmax_config: Any
    rowmax_options: Options
    rowmax_aliases: Aliases
    rowmax_chosen: str | None  # what someone has set since, which counts from then on

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A config made from the class of an alias (its defaults, say) is no alias."""
        return type(cls.rowmax_config)(*args, **kwargs)

    @property
    def _attn_implementation_internal(self) -> str | None:
        return type(self).rowmax_chosen

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        self.__dict__["_attn_implementation_internal"] = value
        type(self).rowmax_chosen = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        original = copy.deepcopy(self.rowmax_config, memo)
        duplicate = _alias(original, Aliases(self.rowmax_options), self.rowmax_options)
        type(duplicate).rowmax_chosen = self.rowmax_chosen
        memo[id(self)] = duplicate
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.rowmax_config.__reduce_ex__(min(int(protocol), 1))


def _alias(config: Any, aliases: Aliases, options: Options) -> Any:
    original = type(config)
    members: dict[str, Any] = {
        "rowmax_config": config,
        "rowmax_options": options,
        "rowmax_aliases": aliases,
        "rowmax_chosen": NAME,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__init__": original.__init__,
    }
    for name in original.sub_configs or ():
        members[name] = _sub_config(name)
    alias: Any = object.__new__(type(original.__name__, (_Alias, original), members))
    object.__setattr__(alias, "__dict__", config.__dict__)
    return alias


def _sub_config(name: str) -> property:
    def read(self: _Alias) -> Any:
        try:
            config = self.__dict__[name]
        except KeyError:
            raise AttributeError(name) from None
        return self.rowmax_aliases.of(config) if hasattr(config, "_attn_implementation") else config

    def write(self: _Alias, value: Any) -> None:
        self.__dict__[name] = value

    return property(read, write)
