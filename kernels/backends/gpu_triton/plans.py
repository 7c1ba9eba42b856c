"""What the kernels of a call are launched with, found once for all calls of the same signature.

The first call of a signature takes its arguments apart (strides, grids, constants), finds the forms
that fit the GPU, and compiles its kernels before it launches the first of them. What it found is
kept; later calls allocate, fill addresses in and launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import TritonError

from ...ops.torch_internals import empty_strided_on
from . import interpreting
from .arguments import on_device

# How many programs there are, and the arguments of a kernel that make them so many.
Form = tuple[int, dict[str, Any]]
# (kernel, forms in the order in which to try them, all other arguments)
Launch = Callable[[Any, Iterable[Form], dict[str, Any]], None]
# (*arguments, launch=) -> what the kernels write
Build = Callable[..., tuple[Tensor, ...]]
# (tensors, constants) -> the arguments of a Build, in forms that kernels can read
Prepare = Callable[[Sequence[Tensor | None], tuple[Any, ...]], tuple[Any, ...]]

_MOST_PLANS = 1024
# What says that a form does not suit: resources, Triton's compiler or ptxas; LLVM's and MLIR's
# passes, and the driver that loads the result, raise RuntimeError.
_UNFIT = (TritonError, CompilationError, RuntimeError)
_ALIGNMENT = 512  # of torch's own memory on a GPU


class Compiled(NamedTuple):
    """A kernel in a form that the device of the call has loaded."""

    kernel: Any
    run: Callable[..., None]  # Triton's launcher
    grid: tuple[int, int, int]
    handles: tuple[Any, Any]  # of the kernel
    arguments: tuple[Any, ...]

    def launch(self, stream: int, arguments: Sequence[Any], profiled: bool) -> None:
        kernel, run, grid, handles, _ = self
        if profiled:
            hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
            metadata = kernel.launch_metadata(grid, stream, *arguments)
            run(*grid, stream, *handles, metadata, *hooks, *arguments)
        else:
            run(*grid, stream, *handles, None, None, None, *arguments)


def _is_profiled() -> bool:
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def at_once(kernel: Any, forms: Iterable[Form], arguments: dict[str, Any]) -> None:
    """A `Launch` of the first form, through Triton's own way."""
    programs, form = next(iter(forms))
    tensor = next(_tensors_in(tuple(arguments.values())))
    if programs > 0:
        with on_device(tensor):
            kernel[(programs,)](**arguments, **form)


def compiled(kernel: Any, forms: Iterable[Form], arguments: dict[str, Any]) -> Compiled | None:
    """The kernel in the first form that fits the device; None where there is nothing to compute.

    Raises:
        RuntimeError: no form does; says which were tried and what came.
    """
    tried: list[str] = []
    name = kernel.fn.__name__
    for programs, form in forms:
        if programs == 0:
            return None
        every = arguments | form
        try:
            found = kernel.warmup(grid=(programs,), **every)
            run = found.run  # loads it: what the device lacks shows here
        except _UNFIT as error:
            tried.append(f"{_text(form)}: {' '.join(str(error).split())[:200]}")
            continue
        if tried:
            warnings.warn(
                f"rowmax: {name} runs in the form ({_text(form)}), because others do not fit this "
                f"GPU: {'; '.join(tried)}",
                RuntimeWarning,
                stacklevel=2,
            )
        handles = (found.function, found.packed_metadata)
        in_order = tuple(every[part] for part in kernel.arg_names)
        return Compiled(found, run, (programs, 1, 1), handles, in_order)
    raise RuntimeError(
        f"rowmax: no form of the Triton kernel {name} fits this GPU and nothing was launched; "
        "tried " + "; ".join(tried)
    )


def _text(form: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in form.items())


class _Address(NamedTuple):
    """Stands for the address of a tensor, the one of this number."""

    of: int


# (where in the arguments, of which tensor, None or what follows it in a tuple)
_Plain = list[tuple[int, int, tuple[Any, ...] | None]]
_Nested = list[tuple[int, tuple[Any, ...]]]  # the same for tuples of several tensors


class Plan(NamedTuple):
    steps: list[tuple[Compiled, _Plain, _Nested]]
    # what a call returns of its own: sizes, strides and dtypes
    new: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    results: list[int]  # which of them are returned, in order
    # what it needs in between, all in one piece of memory: bytes, and where each begins
    between: int
    starts: list[int]
    empty: Callable[..., Tensor]

    def run(self, addresses: list[int | None], device: int) -> tuple[Tensor, ...]:
        """What the kernels write; `addresses` are those of the tensors that they are given."""
        steps, new, results, between, starts, empty = self
        made = [empty(size, stride, dtype) for size, stride, dtype in new]
        addresses += [tensor.data_ptr() for tensor in made]
        if between:
            memory = empty((between,), (1,), torch.uint8)
            base = memory.data_ptr()
            addresses += [base + start for start in starts]
        stream = triton.runtime.driver.active.get_current_stream(device)
        profiled = _is_profiled()
        for compiled, plain, nested in steps:
            arguments = list(compiled.arguments)
            for at, which, rest in plain:
                arguments[at] = addresses[which] if rest is None else (addresses[which], *rest)
            for at, value in nested:
                arguments[at] = _filled(value, addresses)
            compiled.launch(stream, arguments, profiled)
        return tuple([made[at] for at in results])


kept: dict[Any, Plan] = {}


def _as_given(given: Sequence[Tensor | None], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*given, *rest)


def run(
    build: Build,
    given: list[Tensor | None],
    rest: tuple[Any, ...],
    setting: Any = None,
    prepare: Prepare = _as_given,
) -> Any:
    """What `build` returns, by kernels that are compiled before the first of them is launched.

    Its arguments are what `prepare` makes of the tensors, of which the first says the device, and
    of constants. `setting` is whatever else it depends on. It may allocate and launch, no more.
    """
    if interpreting():
        return build(*prepare(given, rest), launch=at_once)
    device = given[0].device  # type: ignore[union-attr]
    current = triton.runtime.driver.active.get_current_device()
    if device.index is not None and device.index != current:
        with torch.cuda.device(device):  # Triton compiles for, and launches on, the current one
            return run(build, given, rest, setting, prepare)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in given]
    signature = (
        *(build, device, rest, setting),
        *[
            None
            if tensor is None or address is None
            else (tensor.shape, tensor.stride(), tensor.dtype, address % 16)
            for tensor, address in zip(given, addresses, strict=True)
        ],
    )
    plan = kept.get(signature)
    if plan is None:
        # objects of their own: one tensor that is key and value now may be two at the next call
        given = [None if tensor is None else tensor.detach() for tensor in given]
        return _first(signature, given, build, prepare(given, rest))
    return plan.run(addresses, current)


def _first(
    signature: Any, given: list[Tensor | None], build: Build, arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Compiles all, launches all, and keeps the plan where each call can be filled in."""
    wanted: list[tuple[Any, ...]] = []
    results = build(*arguments, launch=lambda *call: wanted.append(call))
    found = [step for call in wanted if (step := compiled(*call)) is not None]
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    for step in found:
        step.launch(stream, step.arguments, _is_profiled())
    places = {id(tensor): at for at, tensor in enumerate(given) if tensor is not None}
    if not {id(tensor) for tensor in _tensors_in(arguments)} <= places.keys():
        return results  # something was copied into a form that kernels can read
    new = _placed(results, places, len(given))
    used = _tensors_in(tuple(step.arguments for step in found))
    between = _placed(used, places, len(given) + len(new))
    end, starts = 0, []
    for tensor in between:
        starts.append(end)
        end += -(-_extent(tensor) // _ALIGNMENT) * _ALIGNMENT
    if len(kept) >= _MOST_PLANS:
        kept.clear()
    kept[signature] = Plan(
        [_step(each, places) for each in found],
        [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in new],
        [places[id(tensor)] - len(given) for tensor in results],
        end,
        starts,
        empty_strided_on(results[0].device.type),
    )
    return results


def _placed(tensors: Iterable[Tensor], places: dict[int, int], start: int) -> list[Tensor]:
    """Those that had no place; they are given the places from `start` on."""
    found: list[Tensor] = []
    for tensor in tensors:
        if id(tensor) not in places:
            places[id(tensor)] = start + len(found)
            found.append(tensor)
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not tensor.numel():
        return 0
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.itemsize


def _step(found: Compiled, places: dict[int, int]) -> tuple[Compiled, _Plain, _Nested]:
    """`found`, and where its arguments want addresses."""
    plain: _Plain = []
    nested: _Nested = []
    constants: list[Any] = []
    for at, value in enumerate(found.arguments):
        marked = _marked(value, places)
        constants.append(value if marked is value else None)  # a plan keeps no tensor
        if isinstance(marked, _Address):
            plain.append((at, marked.of, None))
        elif marked is not value:
            first, *rest = marked
            if isinstance(first, _Address) and next(_tensors_in(value[1:]), None) is None:
                plain.append((at, first.of, tuple(rest)))
            else:
                nested.append((at, marked))
    return found._replace(arguments=tuple(constants)), plain, nested


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors_in(part)


def _marked(value: Any, places: dict[int, int]) -> Any:
    """`value` with an address in the place of each tensor; itself where it has none."""
    if isinstance(value, Tensor):
        return _Address(places[id(value)])
    if isinstance(value, tuple) and next(_tensors_in(value), None) is not None:
        return tuple(_marked(part, places) for part in value)
    return value


def _filled(value: Any, addresses: list[int | None]) -> Any:
    if type(value) is _Address:
        return addresses[value.of]
    if type(value) is tuple:
        return tuple([_filled(part, addresses) for part in value])
    return value
