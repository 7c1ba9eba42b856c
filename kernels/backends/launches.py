"""Where a backend's package has each function of `dispatch.Backend`: in the launch of its kind."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable
from typing import Any

_NORMS = ("layer_norm", "add_layer_norm", "rms_norm")
_FUNCTIONS = {
    "attention_launch": ("attention", "attention_out", "attention_backward"),
    "softmax_launch": ("masked_softmax", "masked_softmax_backward"),
    "norm_launch.norms": (*_NORMS, *(f"{name}_backward" for name in _NORMS)),
    "cross_entropy_launch": ("linear_cross_entropy",),
}
PLACES = {name: place for place, names in _FUNCTIONS.items() for name in names}


def on_first_use(package: str, **more: str) -> Callable[[str], Any]:
    """The `__getattr__` of a backend's package: imports what it is asked for, once.

    `more`: functions that this backend has besides, by the place that each stands in.
    """
    places = PLACES | more

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, *inside = places[name].split(".")
        found = importlib.import_module(f".{module}", package)
        function = operator.attrgetter(".".join([*inside, name]))(found)
        setattr(sys.modules[package], name, function)  # found without this detour from now on
        return function

    return find
