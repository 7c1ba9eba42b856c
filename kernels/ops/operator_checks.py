"""What an operator checks before it reads memory, when torch's dispatcher has called it.

By hand or from a serialized graph it may be given anything; the public functions check in their
own terms, and their calls that go past the dispatcher come by here no more. Shapes, dtypes and
devices are checked against the operator's spec; what no spec says, by its own `check`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..api.checks import (
    fail_type,
    fail_value,
    require_device,
    require_float,
    require_like,
    require_number,
    require_probability,
    require_tensor,
    shape_text,
)
from ..backends.dispatch import check_name
from .spec import Named, Operator, TensorSpec, bind, full_shape


class Checks:
    """The checks of one call, by its arguments' names in the schema."""

    def __init__(self, operator: Operator, arguments: tuple[Any, ...]) -> None:
        self.operator, self.function = operator, f"rowmax::{operator.name}"
        self.given: Named = operator.named(arguments)
        self.sizes: Named = {}  # of the dimensions that specs name
        self.like: Tensor = self.given[operator.like]

    def run(self) -> None:
        check_name(self.function, self.given["backend"])
        require_float(self.function, self.operator.like, self.like)
        own = {argument.name: argument.spec for argument in self.operator.arguments}
        optional = {each.name for each in self.operator.arguments if each.type.endswith("?")}
        tensors = [name for name, spec in own.items() if spec is not None]
        # the first tensor says what the others have to be
        tensors.sort(key=self._order)
        for name in tensors:
            tensor, spec = self.given[name], own[name]
            assert spec is not None
            if spec.find(("B",)) is not None and "B" not in self.sizes:
                self.operator.bind_batch(self)
            if tensor is not None or name not in optional:
                self._tensor(name, tensor, spec)
        self.operator.check(self)

    def _order(self, name: str) -> int:
        """The first tensor, then the others of the problem, then what a backward pass reads."""
        names = self.operator.names
        at, first = names.index(name), names.index(self.operator.like)
        return at - len(names) if at >= first else at

    def _tensor(self, name: str, tensor: Tensor, spec: TensorSpec) -> None:
        require_tensor(self.function, name, tensor)
        dtype = spec.dtype(self.like.dtype)
        if spec.kind == "same":
            require_like(self.function, name, tensor, self.operator.like, self.like)
        elif dtype is None:
            require_float(self.function, name, tensor)
        elif tensor.dtype != dtype:
            fail_type(self.function, name, tensor.dtype, f"dtype {dtype}")
        if name != "seed" or tensor.device.type != "cpu":  # a seed may lie on the CPU
            require_device(self.function, name, tensor, self.operator.like, self.like)
        names = spec.names
        if names[:1] == ("...",):
            fits = tensor.dim() >= max(1, len(names) - 1) or names == ("...",)
            expected = f"{len(names) - 1} or more dimensions"
        else:
            fits, expected = tensor.dim() == len(names), f"{len(names)} dimensions"
        if not fits:
            self.fail(name, f"shape {shape_text(tensor.shape)}", f"{expected}, {_text(names)}")
        bind(self.sizes, spec, tensor)
        full = full_shape(spec, self.sizes)
        broadcasts = [each.endswith("|1") for each in names]
        if not (
            tensor.shape == full
            if not any(broadcasts)
            else all(
                size == whole or (may and size == 1)
                for size, whole, may in zip(tensor.shape, full, broadcasts, strict=True)
            )
        ):
            sizes = f"= {shape_text(full)}"
            if any(broadcasts):
                sizes = f"with {_text(tuple(each.removesuffix('|1') for each in names))} {sizes}"
            self.fail(name, f"shape {shape_text(tensor.shape)}", f"{_text(names)} {sizes}")

    def fail(self, argument: str, got: object, expected: str) -> NoReturn:
        fail_value(self.function, argument, got, expected)

    def together(self, one: str, other: str) -> None:
        """Both arguments, or neither."""
        for name, beside in ((one, other), (other, one)):
            if self.given[name] is None and self.given[beside] is not None:
                self.fail(name, "None", f"{one} and {other}, or neither")

    def number(
        self, argument: str, *, above: float | None = None, least: float | None = None
    ) -> None:
        """A finite number in its range, or None where the schema says so."""
        value = self.given[argument]
        if value is None:
            return
        number = require_number(self.function, argument, value)
        if above is not None and not number > above:
            self.fail(argument, value, f"a finite number > {above}, or None")
        if least is not None and not number >= least:
            self.fail(argument, value, f"a finite number >= {least}")

    def dropout(self) -> None:
        """A probability, and a seed where it is not zero, if the operator drops at all."""
        if "dropout_p" not in self.given:
            return
        probability = require_probability(self.function, "dropout_p", self.given["dropout_p"])
        if probability > 0.0 and self.given["seed"] is None:
            self.fail("seed", "None", "a 0-d int64 tensor where dropout_p > 0")

    def starts(self, argument: str, total: int, longest: str) -> None:
        """Of packed sequences: they begin with 0, never fall and end with the total."""
        starts: Tensor = self.given[argument]
        require_tensor(self.function, argument, starts)
        if starts.dtype != torch.int64:
            fail_type(self.function, argument, starts.dtype, "dtype torch.int64")
        expected = f"(n + 1,) that begin with 0, never fall, and end with {total}"
        if starts.dim() != 1 or starts.shape[0] < 1:
            self.fail(argument, f"shape {shape_text(starts.shape)}", expected)
        require_device(self.function, argument, starts, self.operator.like, self.like)
        if starts.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # nothing can be read there while a graph is captured
        values: list[int] = starts.tolist()
        lengths = [end - start for start, end in pairwise(values)]
        if values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
            self.fail(argument, values, expected)
        if self.given[longest] < max(lengths, default=0):
            expected = f"at least {max(lengths)}, the largest length"
            self.fail(longest, self.given[longest], expected)


def _text(names: tuple[str, ...]) -> str:
    """Dimensions as a shape, in the words of the documentation."""
    words = (name.replace("|1", " | 1").replace("Bm", "B") for name in names)
    return f"({', '.join(words)}{',' if len(names) == 1 else ''})"


def checked(operator: Operator, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation` of the operator, behind the checks of its arguments."""

    def kernel(*arguments: Any) -> Any:
        Checks(operator, arguments).run()
        return implementation(*arguments)

    return kernel
