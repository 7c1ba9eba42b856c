"""Giving one module instance another forward: its class becomes a subclass made for the purpose.

A changed class is all there is to a swap: parameters, buffers, hooks, mode and every attribute stay
in the instance's own dictionary, untouched, and going back is one assignment. The subclass bears
the name of the class that it replaces, and a call of it makes an instance of that class.

A deep copy of a swapped module is swapped as well. A pickle of it (`torch.save(model)`, a process
that is spawned) holds the original class and no word of rowmax, so that it loads anywhere.

Others change classes by the same means: torch's parametrizations and FSDP derive a class of their
own from the instance's. Such classes stay outermost, whoever came first: a form is put beneath
them and taken out from there.
"""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ...ops.torch_internals import any_autocast_enabled


@dataclass(frozen=True)
class Options:
    """What a swapped module was asked to do; kept in its class, so that its state has none."""

    backend: str = "auto"
    pack: bool = False


class _FormType(type):
    rowmax_form: type[Form]
    rowmax_original: type[nn.Module]
    rowmax_options: Options

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(module)(...)` makes a module like any other."""
        return cls.rowmax_original(*args, **kwargs)


class Form(nn.Module, metaclass=_FormType):
    """Base of what replaces a class: `class Some(Form): def forward(...)`.

    A bound method may outlive the swap that it was taken in (a wrapper that somebody set on the
    instance holds it), so a form's forward begins by `if not isinstance(self, Form)`.
    """

    rowmax_form: ClassVar[type[Form]]
    rowmax_original: ClassVar[type[nn.Module]]
    rowmax_options: ClassVar[Options]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """No word to the original's: it would enter the subclass in registers, or ask for more."""

    @classmethod
    def rowmax_members(cls, original: type[nn.Module]) -> dict[str, Any]:  # noqa: ARG003
        """What the class for instances of `original` has besides what the form defines."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = getattr(super(), "__deepcopy__", None)
        return _deep_copy(self, memo) if own is None else own(memo)

    def __copy__(self) -> Any:
        duplicate = type(self).__new__(type(self))
        duplicate.__setstate__(dict(_state(self)))
        return duplicate

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks of every module before it compiles any."""
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} is swapped for rowmax's kernels, which "
            "TorchScript can't compile; expected the model as it was: call `restore()` of the "
            "report first, or take torch.jit.trace, torch.compile or torch.export. Nothing was "
            "changed"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The form of protocol 1 names the class as an argument, where it can be replaced.
        reduced: Any = super().__reduce_ex__(min(int(protocol), 1))
        rebuild, arguments, *state = reduced
        own = type(self)
        arguments = tuple(_unswapped(own) if item is own else item for item in arguments)
        return (rebuild, arguments, *state)


class Swapped(Form):
    """Base of the forms that compute by rowmax's kernels."""


def _state(module: nn.Module) -> dict[str, Any]:
    """What a copy takes over; a parametrized module has it, but refuses to be pickled."""
    if is_parametrized(module):
        return module.__dict__
    reduced: Any = module.__reduce_ex__(1)
    state: dict[str, Any] = reduced[2]
    return state


def _deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    duplicate = type(module).__new__(type(module))
    memo[id(module)] = duplicate
    duplicate.__setstate__(copy.deepcopy(_state(module), memo))
    return duplicate


@functools.cache
def swapped_class(form: type[Form], original: type[nn.Module], options: Options) -> type[Form]:
    """The class of instances of `original` that run `form`."""
    names: dict[str, Any] = {
        "rowmax_form": form,
        "rowmax_original": original,
        "rowmax_options": options,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **form.rowmax_members(original),
    }
    make: Any = type(original)
    if issubclass(_FormType, make):
        make = _FormType
    elif not issubclass(make, _FormType):
        make = type(make.__name__, (_FormType, make), {})
    # a second swap may have the same form again
    bases = (original,) if issubclass(original, form) else (form, original)
    return cast(type[Form], make(original.__name__, bases, names))


def _is_swapped(cls: Any) -> bool:
    """Whether `cls` is a class that `swapped_class` made, not one derived from it."""
    return "rowmax_original" in vars(cls)


def _unswapped(cls: Any) -> Any:
    while _is_swapped(cls):
        cls = cls.rowmax_original
    return cls


def _is_injected(cls: type) -> bool:
    """Whether `cls` was derived by a library for an instance, to add something to its class.

    Such a class is known nowhere by its name. One that defines the forward is somebody's own, and
    one that refers to itself (`super()`) can't be made anew over another base.
    """
    if _is_swapped(cls) or "forward" in vars(cls) or "<locals>" in cls.__qualname__:
        return False
    module = sys.modules.get(cls.__module__)
    if module is None or hasattr(module, cls.__qualname__.partition(".")[0]):
        return False
    values = vars(cls).values()
    functions = [getattr(value, "fget", getattr(value, "__func__", value)) for value in values]
    cells = [
        cell for function in functions for cell in getattr(function, "__closure__", None) or ()
    ]
    return len(_module_bases(cls)) == 1 and not any(_holds(cell, cls) for cell in cells)


def _holds(cell: Any, cls: type) -> bool:
    try:
        return cell.cell_contents is cls
    except ValueError:  # empty
        return False


def _module_bases(cls: type) -> list[type[nn.Module]]:
    return [base for base in cls.__bases__ if issubclass(base, nn.Module)]


def _beneath(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that `cls` is without what libraries have added to it."""
    while _is_injected(cls):
        (cls,) = _module_bases(cls)
    return cls


def _rebased(cls: Any, old: type[nn.Module], new: type[nn.Module]) -> type | None:
    """`cls` over `new` in the place of `old`; None where that class is somebody's own."""
    if cls is old:
        return new
    if _is_swapped(cls):
        beneath = _rebased(cls.rowmax_original, old, new)
        return beneath and swapped_class(cls.rowmax_form, beneath, cls.rowmax_options)
    if not _is_injected(cls):
        return None
    bases = [_rebased(base, old, new) if issubclass(base, old) else base for base in cls.__bases__]
    if None in bases:
        return None
    names = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    if "__getstate__" in names and not hasattr(new, "__deepcopy__"):
        # a parametrized class can't be pickled, and so needs a __deepcopy__: it had the form's
        names.setdefault("__deepcopy__", _deep_copy)
    return type(cls.__name__, cast(tuple[type, ...], tuple(bases)), names)


class ClassChange:
    """The swap of one instance, and its undoing."""

    def __init__(self, name: str, module: nn.Module, form: type[Form], options: Options) -> None:
        self._name = name
        self._module = module
        self._form = form
        self._original = _beneath(type(module))
        self._options = options

    def apply(self) -> None:
        own = type(self._module)
        self._original = _beneath(own)
        # mypy takes the class for one of its instances, which are not hashable
        swapped = swapped_class(self._form, self._original, self._options)  # type: ignore[arg-type]
        self._module.__class__ = _rebased(own, self._original, swapped)  # type: ignore[assignment]

    def undo(self) -> None:
        """Take the form out of the class, beneath what libraries have derived from it since.

        Raises:
            RuntimeError: somebody has set another class since.
        """
        own: Any = type(self._module)
        for cls in own.__mro__:
            if _is_swapped(cls) and cls.rowmax_form is self._form:
                restored = _rebased(own, cls, cls.rowmax_original)
                break
        else:
            # somebody else has taken it out
            restored = own if _beneath(own) is self._original else None
        if restored is None:
            raise RuntimeError(
                f"{self._name or 'the model'}: its class has been set to {own.__module__}."
                f"{own.__qualname__} since the swap; expected the one that swap gave to a "
                f"{self._original.__name__}, or what torch derives from it. Set it back first"
            )
        self._module.__class__ = restored


def has_own(module: nn.Module, stock: type[nn.Module], *methods: str) -> str | None:
    """The first of `methods` that `module` does not take from `stock`, as a sentence; else None."""
    for name in methods:
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
        if getattr(type(module), name) is not getattr(stock, name):
            return f"{type(module).__name__} has a {name} of its own"
    return None


def is_plain_call(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether a call of `module` does nothing but `stock`'s forward, so its caller may do that.

    `stock` is a class of torch's, or a form. Nobody may have set another forward, on the class or
    on the instance, and no hook looks on.
    """
    every, cls, own = nn.modules.module, type(module), module.__dict__
    return not (
        cls.forward is not stock.forward
        or cls.__call__ is not nn.Module.__call__
        or cls._call_impl is not nn.Module._call_impl
        or "forward" in own
        or "_call_impl" in own
        or module._compiled_call_impl is not None
        or module._forward_hooks
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
    if any_autocast_enabled():
        return True
    return any(tensor.is_nested for tensor in tensors)
