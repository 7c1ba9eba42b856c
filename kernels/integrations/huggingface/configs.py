"""A config that says "rowmax" to the modules of one model while they run, and to nobody else.

Models of transformers ask `config._attn_implementation` at every call, and several models, or a
user's own code, may hold the same config: a new model may be made from it, it may be saved,
compared, set. So the config itself stays as it is, and `module.config` of a swapped model is still
that object. While a module of the model runs, its `config` is an alias: another object over the
same attributes, from which only the answer to that one question differs.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..torch_modules.instances import ClassChange, Form, Options
from .attention import NAME

# The methods of a model in which it attends or makes masks.
_ASKING = ("__call__", "forward", "prepare_inputs_for_generation")


class _Running(threading.local):
    depth = 0


_running = _Running()


class ConfigForm(Form):
    """A module of transformers whose config is the alias while it runs, and the original else."""

    @classmethod
    def rowmax_members(cls, original: type[nn.Module]) -> dict[str, Any]:
        members = {name: _asking(original, name) for name in _ASKING if hasattr(original, name)}
        if hasattr(original, "set_attn_implementation"):
            members["set_attn_implementation"] = _setting(original)
        return members

    @property
    def config(self) -> Any:
        try:
            config = self.__dict__["config"]
        except KeyError:
            raise AttributeError("config") from None
        if not is_alias(config) or _running.depth or torch.compiler.is_compiling():
            return config
        return config.rowmax_config

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    @config.deleter
    def config(self) -> None:
        del self.__dict__["config"]


def _asking(original: type[nn.Module], name: str) -> Callable[..., Any]:
    """The method of `original`, in which the modules' configs are aliases."""

    @functools.wraps(getattr(original, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph has no threads
            return getattr(original, name)(self, *args, **kwargs)
        _running.depth += 1
        try:
            return getattr(original, name)(self, *args, **kwargs)
        finally:
            _running.depth -= 1

    return method


def _setting(original: Any) -> Callable[..., Any]:
    """`set_attn_implementation`, after which the configs that it spoke of have the say again."""

    @functools.wraps(original.set_attn_implementation)
    def method(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        result = original.set_attn_implementation(self, attn_implementation, *args, **kwargs)
        for module in self.modules():
            config = module.__dict__.get("config")
            if is_alias(config) and _speaks_of(attn_implementation, self.config, config):
                config.rowmax_follows = True
        return result

    return method


def _speaks_of(implementation: Any, config: Any, alias: _Alias) -> bool:
    """Whether an implementation that was set for `config` is about the original of `alias`."""
    if not isinstance(implementation, dict):
        return True
    return any(spoken is alias.rowmax_config for spoken in _spoken_of(implementation, config))


def _spoken_of(implementation: Any, config: Any) -> Iterator[Any]:
    """The configs, `config` and those in it, that an implementation or a dict of them names."""
    if config is None:
        return
    names = list(config.sub_configs or ())
    if not isinstance(implementation, dict):
        yield config
        implementation = dict.fromkeys(names, implementation)
    elif "" in implementation:
        yield config
    for name in names:
        if name in implementation:
            yield from _spoken_of(implementation[name], getattr(config, name, None))


class Aliases:
    """The aliases of one model's configs: one for each object, sub-configs included."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._made: dict[int, Any] = {}

    def of(self, config: Any) -> Any:
        if is_alias(config):
            return config
        alias = self._made.get(id(config))
        if alias is None:
            alias = self._made[id(config)] = _alias(config, self, self._options)
        return alias

    def __deepcopy__(self, memo: dict[int, Any]) -> Aliases:
        """Those of a copy of the model, whose configs are copies too."""
        duplicate = memo[id(self)] = Aliases(self._options)
        return duplicate


class ConfigChange:
    """One module's `config` replaced by its alias while it runs, and the undoing."""

    def __init__(self, name: str, module: nn.Module, aliases: Aliases) -> None:
        self._module = module
        self._original = module.__dict__["config"]
        self._alias = aliases.of(self._original)
        self._class = ClassChange(name, module, ConfigForm, Options())

    def apply(self) -> None:
        self._class.apply()
        self._module.__dict__["config"] = self._alias

    def undo(self) -> None:
        """Back to the original, unless someone else has set another config since."""
        self._class.undo()
        if self._module.__dict__.get("config") is self._alias:
            self._module.__dict__["config"] = self._original


def is_alias(config: object) -> bool:
    return isinstance(config, _Alias)


class _Alias:
    """What an alias does differently from the config whose attributes it shares."""

    __slots__ = ("rowmax_aliases", "rowmax_config", "rowmax_follows", "rowmax_options")

    rowmax_original: type
    rowmax_config: Any
    rowmax_options: Options
    rowmax_aliases: Aliases
    rowmax_follows: bool  # an implementation has been set since, and counts from then on

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A config made from the class of an alias (its defaults, say) is no alias."""
        return cls.rowmax_original(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """No word to the original's, which would make a dataclass of the alias's."""

    @property
    def _attn_implementation_internal(self) -> Any:
        return self.__dict__["_attn_implementation_internal"] if self.rowmax_follows else NAME

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: Any) -> None:
        if value != self._attn_implementation_internal:  # a model made from it sets what it read
            self.__dict__["_attn_implementation_internal"] = value
            self.rowmax_follows = True

    def __eq__(self, other: object) -> bool:
        config = other.rowmax_config if isinstance(other, _Alias) else other
        return bool(self.rowmax_config == config)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        aliases = copy.deepcopy(self.rowmax_aliases, memo)
        duplicate = memo[id(self)] = aliases.of(copy.deepcopy(self.rowmax_config, memo))
        duplicate.rowmax_follows = self.rowmax_follows
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.rowmax_config.__reduce_ex__(min(int(protocol), 1))


def _alias(config: Any, aliases: Aliases, options: Options) -> Any:
    alias: Any = object.__new__(_alias_class(type(config)))  # type: ignore[arg-type]
    for name, value in (
        ("__dict__", config.__dict__),
        ("rowmax_config", config),
        ("rowmax_aliases", aliases),
        ("rowmax_options", options),
        ("rowmax_follows", False),
    ):
        object.__setattr__(alias, name, value)
    return alias


@functools.cache
def _alias_class(original: Any) -> Any:
    members: dict[str, Any] = {
        "rowmax_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    for name in original.sub_configs or ():
        members[name] = _sub_config(name)
    return type(original.__name__, (_Alias, original), members)


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
