"""One definition of each operator, from which its schema, fake, checks, vmap and sharding follow.

A problem (problem.py) names its fields once; a tensor's `TensorSpec` names its dimensions:

    B    batch elements                     Bm   the batch in memory: B, or 1 where packed
    Hq   heads of the query                 Hkv  heads of key and value
    Lq, Lk  lengths in memory               D, Dv  head sizes of query and key, of value
    S    sequences + 1                      N    columns of a row
    T    tokens                             V    words of the vocabulary
    ...  any number of dimensions of rows   X|1  X, or 1 where the tensor broadcasts along X

Two tensors have equal sizes where their dimensions have equal names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .layout import empty_heads, saved_lse_dtype, statistics_dtype

Values = tuple[Any, ...]
Named = dict[str, Any]  # arguments by their names in the schema
# (call an operator, arguments and outputs by name, gradients wanted by name, gradients of the
# outputs) -> gradients of the differentiable arguments
Derivative = Callable[[Callable[..., Any], Named, dict[str, bool], Values], Values]

Kind = Literal["same", "float", "int64", "bool", "statistics", "lse"]


class TensorSpec(NamedTuple):
    """The dimensions of a tensor, and its dtype beside the operator's first tensor."""

    dims: str
    kind: Kind = "same"
    grad: bool = False  # whether it has a gradient

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.dims.split())

    def find(self, dims: tuple[str, ...]) -> int | None:
        """Where one of these dimensions stands, broadcast or not."""
        for at, name in enumerate(self.names):
            if name.removesuffix("|1") in dims:
                return at
        return None

    def dtype(self, like: torch.dtype) -> torch.dtype | None:
        """The dtype it has beside tensors of dtype `like`; None where any float will do."""
        if self.kind in ("statistics", "lse"):
            return (statistics_dtype if self.kind == "statistics" else saved_lse_dtype)(like)
        return {"same": like, "int64": torch.int64, "bool": torch.bool}.get(self.kind)


class Argument(NamedTuple):
    name: str
    type: str  # in torch's schema language
    spec: TensorSpec | None = None  # of tensors


class Result(NamedTuple):
    """An output: its dtype follows the argument `like`, whose gradient it is if `is_gradient`.

    Where the argument `when` is None, False or 0.0 there is no such result: an empty tensor.
    """

    name: str
    like: str
    spec: TensorSpec
    is_gradient: bool = False
    when: str | None = None

    def is_present(self, given: Named) -> bool:
        value = True if self.when is None else given[self.when]
        # (a tensor may be one of another kind in its place, which is not compared)
        return not isinstance(value, bool | float | None) or value not in (None, False, 0.0)


_TYPES = {float: "float", int: "SymInt", bool: "bool", Tensor: "Tensor"}


def arguments_of(problem: type) -> tuple[Argument, ...]:
    """The fields of a problem in their order, those of its mask among them."""
    found: list[Argument] = []
    for name, hint in get_type_hints(problem, include_extras=True).items():
        spec = None
        if get_origin(hint) is Annotated:
            hint, spec = get_args(hint)
        if hasattr(hint, "_fields"):
            found.extend(arguments_of(hint))
            continue
        kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        optional = "?" if type(None) in kinds else ""
        found.append(Argument(name, _TYPES[kinds[0]] + optional, spec))
    return tuple(found)


def gradient_of(name: str, argument: Argument, when: str | None = None) -> Result:
    assert argument.spec is not None
    return Result(name, argument.name, argument.spec, is_gradient=True, when=when)


@dataclass(frozen=True)
class Operator:
    """An operator `rowmax::name(*arguments, str backend) -> results`."""

    name: str
    like: str  # the argument that says dtype and device
    arguments: tuple[Argument, ...]
    results: tuple[Result, ...]
    # the flat arguments -> the problem, and what a backend is given beside it
    split: Callable[[Values], tuple[Any, Values]]
    # (backend, problem, the rest) -> the results, which may be None where they are not present
    run: Callable[..., Any]
    # where `run` finds operations that carry tangents of forward mode
    unfused_backend: Any
    # the tensors, arguments or results, that the derivative reads; it is given None for others
    saves: tuple[str, ...]
    derivative: Derivative
    # along which dimensions parts of this call are independent: each may be a call of its own
    independent: Callable[[Named], tuple[str, ...]]
    # what no spec says: numbers in their ranges, arguments that come together
    check: Callable[[Any], None]
    # results that are kept for the derivative alone, which may change them: see autograd.py
    given_away: tuple[str, ...] = ()
    # says how many batch elements there are, where that is not the batch in memory
    bind_batch: Callable[[Any], None] = lambda _: None
    names: tuple[str, ...] = field(init=False)
    differentiable: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(argument.name for argument in self.arguments))
        grads = tuple(each.name for each in self.arguments if each.spec and each.spec.grad)
        object.__setattr__(self, "differentiable", grads)

    @property
    def schema(self) -> str:
        arguments = (f"{argument.type} {argument.name}" for argument in self.arguments)
        results = (f"Tensor {result.name}" for result in self.results)
        return f"({', '.join(arguments)}, str backend) -> ({', '.join(results)})"

    def argument(self, name: str) -> Argument:
        return self.arguments[self.names.index(name)]

    def named(self, arguments: Sequence[Any]) -> Named:
        return dict(zip((*self.names, "backend"), arguments, strict=True))

    def flat(self, given: Named) -> Values:
        """The arguments in the schema's order, the backend behind them."""
        return (*(given[name] for name in self.names), given["backend"])

    def unfused(self, *arguments: Any) -> Any:
        """The results in operations of torch that carry tangents, on whatever backend."""
        problem, rest = self.split(arguments[:-1])
        return self.run(self.unfused_backend, problem, *rest)

    def fake(self, *arguments: Any) -> Any:
        """Results without data: shapes, dtypes and strides."""
        given = self.named(arguments)
        sizes: Named = {}
        for argument in self.arguments:
            if isinstance(given[argument.name], Tensor) and argument.spec is not None:
                bind(sizes, argument.spec, given[argument.name])
        results = tuple(
            _empty(result, given, sizes)
            if result.is_present(given)
            else given[self.like].new_empty(0)
            for result in self.results
        )
        return results if len(results) > 1 else results[0]


def bind(sizes: Named, spec: TensorSpec, tensor: Tensor) -> None:
    """Each dimension that has no size yet gets the tensor's; "..." the shape of rows."""
    names = spec.names
    if names[:1] == ("...",):
        rows = tensor.dim() - len(names) + 1
        sizes.setdefault("...", tuple(tensor.shape[:rows]))
        names, shape = names[1:], tensor.shape[rows:]
    else:
        shape = tensor.shape
    for name, size in zip(names, shape, strict=False):
        if "|" not in name and not name.isdigit():
            sizes.setdefault(name, size)


def full_shape(spec: TensorSpec, sizes: Named) -> tuple[int, ...]:
    """The shape where nothing broadcasts."""
    shape: list[int] = []
    for name in spec.names:
        if name == "...":
            shape.extend(sizes["..."])
        else:
            shape.append(int(name) if name.isdigit() else sizes[name.removesuffix("|1")])
    return tuple(shape)


def _empty(result: Result, given: Named, sizes: Named) -> Tensor:
    like: Tensor = given[result.like]
    if result.spec.names[-1:] in (("D",), ("Dv",)):
        return empty_heads(like, sizes[result.spec.names[-1]])
    shape = like.shape if result.is_gradient else full_shape(result.spec, sizes)
    dtype = like.dtype if result.is_gradient else result.spec.dtype(like.dtype)
    return like.new_empty(shape, dtype=dtype)
