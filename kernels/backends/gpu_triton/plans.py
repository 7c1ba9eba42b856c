"""What the kernels of a call are launched with, found once for all calls of the same signature.

The first call of a signature takes a problem apart (strides, grids, constants), finds the forms
that fit the GPU, and compiles its kernels before it launches the first of them. What it found is
kept; later calls allocate, fill addresses in and launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import TritonError

from ...api.masks import NO_MASK, MaskStructure
from ...ops.problem import AttentionProblem
from .configurations import Configuration, candidates

# (kernel, problem, extent, arguments): runs `kernel` once for each tile of (queries, keys, planes)
Launch = Callable[[Any, AttentionProblem, tuple[int, int, int], dict[str, Any]], None]
# (problem, other tensors, launch) -> what the kernels write
Build = Callable[..., tuple[Tensor, ...]]

_MOST_PLANS = 1024
_NO_HOOKS: tuple[Any, Any, Any] = (None, None, None)
_NO_TENSORS = frozenset((type(None), int, float, MaskStructure))
# What says that a form does not suit: resources, Triton's compiler or ptxas; LLVM's and MLIR's
# passes, and the driver that loads the result, raise RuntimeError.
_UNFIT = (TritonError, CompilationError, RuntimeError)


class Compiled(NamedTuple):
    """A kernel in a form that the device of the call has loaded."""

    kernel: Any
    run: Callable[..., None]  # Triton's launcher
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]

    def launch(self, stream: int, arguments: Sequence[Any]) -> None:
        kernel, run, grid, _ = self
        hooks = _NO_HOOKS
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls or leave.calls:  # a profiler listens
            hooks = (kernel.launch_metadata(grid, stream, *arguments), enter, leave)
        run(*grid, stream, kernel.function, kernel.packed_metadata, *hooks, *arguments)


def compiled(
    kernel: Any,
    problem: AttentionProblem,
    extent: tuple[int, int, int],
    arguments: dict[str, Any],
) -> Compiled | None:
    """The kernel in the first form that fits the device; None where there is nothing to compute.

    Raises:
        RuntimeError: no form does; says which were tried and what came.
    """
    tried: list[str] = []
    name = kernel.fn.__name__
    for config in candidates(name, problem):
        programs, form = compiled_form(kernel, extent, config)
        if programs == 0:
            return None
        every = arguments | form
        try:
            found = kernel.warmup(grid=(programs,), **every)
            run = found.run  # loads it: what the device lacks shows here
        except _UNFIT as error:
            tried.append(f"{tuple(config)}: {' '.join(str(error).split())[:200]}")
            continue
        if tried:
            warnings.warn(
                f"rowmax: {name} runs in the form {tuple(config)}, because others do not fit this "
                f"GPU: {'; '.join(tried)}",
                RuntimeWarning,
                stacklevel=2,
            )
        arguments_in_order = tuple(every[part] for part in kernel.arg_names)
        return Compiled(found, run, (programs, 1, 1), arguments_in_order)
    raise RuntimeError(
        f"attention: no form of the Triton kernel {name} fits this GPU and nothing was launched; "
        "tried (BLOCK_M, BLOCK_N, warps, stages) " + "; ".join(tried)
    )


def compiled_form(
    kernel: Any, extent: tuple[int, int, int], config: Configuration
) -> tuple[int, dict[str, int]]:
    """How many programs there are, and the arguments of `kernel` that `config` decides."""
    rows, columns, planes = extent
    block_m = config.block_m
    if kernel.fn.__name__ == "decode":  # often a single row: its tile is as small as a product's
        block_m = min(block_m, max(16, triton.next_power_of_2(rows)))
    sizes = {"BLOCK_M": block_m, "BLOCK_N": config.block_n}
    programs = triton.cdiv(rows, block_m) * triton.cdiv(columns, config.block_n) * planes
    return programs, {
        **{name: size for name, size in sizes.items() if name in kernel.arg_names},
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


class _Address(NamedTuple):
    """Stands for the address of a tensor, the one of this number."""

    of: int


# (where in the arguments, of which tensor, None or what follows it in a tuple)
_Plain = list[tuple[int, int, tuple[Any, ...] | None]]
_Nested = list[tuple[int, tuple[Any, ...]]]  # the same for tuples of several tensors


class _New(NamedTuple):
    """A tensor that a call makes."""

    size: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype


class Plan(NamedTuple):
    steps: list[tuple[Compiled, _Plain, _Nested]]
    new: list[_New]
    results: list[int]  # which tensors are returned, counted from the first given one

    def run(self, given: list[Tensor | None], device: torch.device) -> tuple[Any, ...]:
        tensors = given + [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype in self.new
        ]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        for compiled, plain, nested in self.steps:
            arguments = list(compiled.arguments)
            for at, which, rest in plain:
                arguments[at] = addresses[which] if rest is None else (addresses[which], *rest)
            for at, value in nested:
                arguments[at] = _filled(value, addresses)
            compiled.launch(stream, arguments)
        return tuple([tensors[at] for at in self.results])


_plans: dict[Any, Plan] = {}


def run(
    build: Build,
    prepared: Callable[[AttentionProblem], AttentionProblem],
    problem: AttentionProblem,
    *others: Tensor | None,
) -> tuple[Tensor, ...]:
    """What `build` returns, by kernels that are compiled before the first of them is launched."""
    query = problem.query
    device = query.device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton compiles for, and launches on, the current one
            return run(build, prepared, problem, *others)
    given, rest = _taken_apart(problem, others)
    signature = (
        *(build, device, query.dtype, rest),
        torch.get_float32_matmul_precision() if query.dtype == torch.float32 else None,
        *[
            None
            if tensor is None
            else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
            for tensor in given
        ],
    )
    plan = _plans.get(signature)
    if plan is None:
        # objects of their own: one tensor that is key and value now may be two at the next call
        fields = tuple(map(_alias, problem.flat()))
        problem, others = AttentionProblem.from_flat(fields), tuple(map(_alias, others))
        given, _ = _taken_apart(problem, others)
        return _first(signature, given, build, prepared(problem), others)
    return plan.run(given, device)


def _taken_apart(
    problem: AttentionProblem, others: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """The tensors of a call in a fixed order, and the rest of the problem without them."""
    given: list[Tensor | None] = [*problem[:3], *others]
    rest: tuple[Any, ...] = problem[3:]
    mask = problem.mask
    if _NO_TENSORS.issuperset(map(type, rest)) and (
        mask is NO_MASK or _NO_TENSORS.issuperset(map(type, mask))
    ):
        return given, rest
    fields = problem.flat()[3:]
    given += [field for field in fields if isinstance(field, Tensor)]
    return given, tuple([_Address(0) if isinstance(field, Tensor) else field for field in fields])


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _first(
    signature: Any,
    given: list[Tensor | None],
    build: Build,
    problem: AttentionProblem,
    others: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """Compiles all, launches all, and keeps the plan where each call can be filled in."""
    wanted: list[tuple[Any, ...]] = []
    results = build(problem, *others, launch=lambda *call: wanted.append(call))
    found = [step for call in wanted if (step := compiled(*call)) is not None]
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    for step in found:
        step.launch(stream, step.arguments)
    places = {id(tensor): at for at, tensor in enumerate(given) if tensor is not None}
    own = {id(field) for field in (*problem.flat(), *others) if isinstance(field, Tensor)}
    if not own <= places.keys():  # something was copied into a form that kernels can read
        return results
    made: dict[int, Tensor] = {}
    for tensor in (*results, *_tensors_in([step.arguments for step in found])):
        if id(tensor) not in places:
            places[id(tensor)] = len(given) + len(made)
            made[id(tensor)] = tensor
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[signature] = Plan(
        [_step(each, places) for each in found],
        [_New(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made.values()],
        [places[id(tensor)] for tensor in results],
    )
    return results


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
