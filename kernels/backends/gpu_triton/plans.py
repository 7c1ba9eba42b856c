"""Launch plans: what the kernels of a call are launched with, found once a signature.

The first call of a signature takes its arguments apart (strides, grids, constants), finds the
configs that fit the GPU, and compiles its kernels before it launches the first of them. The plan
that it makes is cached; later calls allocate, fill addresses in and launch.
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

# (number of programs, the arguments of the kernel that decide it)
LaunchConfig = tuple[int, dict[str, Any]]
# (kernel, configs in the order in which to try them, all other arguments)
Launch = Callable[[Any, Iterable[LaunchConfig], dict[str, Any]], None]
# (*arguments, launch=) -> the tensors that the kernels write
Build = Callable[..., tuple[Tensor, ...]]
# (tensors, constants) -> the arguments of a Build, in layouts that kernels can read
Unflatten = Callable[[Sequence[Tensor | None], tuple[Any, ...]], tuple[Any, ...]]

_MAX_PLANS = 1024
# The errors of a config that does not fit: resources, Triton's compiler or ptxas; LLVM's and MLIR's
# passes, and the driver that loads the result, raise RuntimeError.
_CONFIG_ERRORS = (TritonError, CompilationError, RuntimeError)
_ALIGNMENT = 512  # of torch's own memory on a GPU


class Compiled(NamedTuple):
    """A kernel that is compiled with one config and loaded on the device of the call."""

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


def launch_now(kernel: Any, configs: Iterable[LaunchConfig], arguments: dict[str, Any]) -> None:
    """A `Launch` of the first config, by Triton's own launcher."""
    programs, config = next(iter(configs))
    tensor = next(_tensors_in(tuple(arguments.values())))
    if programs > 0:
        with on_device(tensor):
            kernel[(programs,)](**arguments, **config)


def compiled(
    kernel: Any, configs: Iterable[LaunchConfig], arguments: dict[str, Any]
) -> Compiled | None:
    """The kernel with the first config that fits the device; None where nothing is to compute.

    Raises:
        RuntimeError: no config fits; the message lists those that were tried, and their errors.
    """
    tried: list[str] = []
    name = kernel.fn.__name__
    for programs, config in configs:
        if programs == 0:
            return None
        named = arguments | config
        try:
            found = kernel.warmup(grid=(programs,), **named)
            run = found.run  # loads it: a lack of resources shows here
        except _CONFIG_ERRORS as error:
            tried.append(f"{_text(config)}: {' '.join(str(error).split())[:200]}")
            continue
        if tried:
            warnings.warn(
                f"rowmax: {name} runs with the config ({_text(config)}), because others do not fit "
                f"this GPU: {'; '.join(tried)}",
                RuntimeWarning,
                stacklevel=2,
            )
        handles = (found.function, found.packed_metadata)
        positional = tuple(named[part] for part in kernel.arg_names)
        return Compiled(found, run, (programs, 1, 1), handles, positional)
    raise RuntimeError(
        f"rowmax: no config of the Triton kernel {name} fits this GPU and nothing was launched; "
        "tried " + "; ".join(tried)
    )


def _text(config: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


class _Address(NamedTuple):
    """A placeholder for the address of the tensor with this number."""

    tensor: int


# (index of the argument, number of the tensor, None or the rest of the argument's tuple)
_Pointers = list[tuple[int, int, tuple[Any, ...] | None]]
_Nested = list[tuple[int, tuple[Any, ...]]]  # the same for tuples of several tensors


class Plan(NamedTuple):
    steps: list[tuple[Compiled, _Pointers, _Nested]]
    outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]  # sizes, strides, dtype
    results: list[int]  # indices of the outputs that are returned, in order
    # temporary tensors, all in one allocation: its bytes, and the offset of each
    workspace_bytes: int
    workspace_offsets: list[int]
    empty: Callable[..., Tensor]

    def run(self, addresses: list[int | None], device: int) -> tuple[Tensor, ...]:
        """The tensors that the kernels write; `addresses` are those of the inputs."""
        steps, outputs, results, workspace_bytes, workspace_offsets, empty = self
        allocated = [empty(size, stride, dtype) for size, stride, dtype in outputs]
        addresses += [tensor.data_ptr() for tensor in allocated]
        if workspace_bytes:
            workspace = empty((workspace_bytes,), (1,), torch.uint8)
            base = workspace.data_ptr()
            addresses += [base + offset for offset in workspace_offsets]
        stream = triton.runtime.driver.active.get_current_stream(device)
        profiled = _is_profiled()
        for compiled, pointers, nested in steps:
            arguments = list(compiled.arguments)
            for at, tensor, rest in pointers:
                arguments[at] = addresses[tensor] if rest is None else (addresses[tensor], *rest)
            for at, value in nested:
                arguments[at] = _filled(value, addresses)
            compiled.launch(stream, arguments, profiled)
        return tuple([allocated[at] for at in results])


cache: dict[Any, Plan] = {}


def _joined(inputs: Sequence[Tensor | None], constants: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*inputs, *constants)


def run(
    build: Build,
    inputs: list[Tensor | None],
    constants: tuple[Any, ...],
    setting: Any = None,
    unflatten: Unflatten = _joined,
) -> Any:
    """Returns what `build` does, by kernels that are compiled before the first is launched.

    Its arguments are what `unflatten` makes of the inputs, the first of which has the device of the
    call, and the constants. `setting` is whatever else it depends on. `build` may allocate and
    launch, no more.
    """
    if interpreting():
        return build(*unflatten(inputs, constants), launch=launch_now)
    device = inputs[0].device  # type: ignore[union-attr]
    current = triton.runtime.driver.active.get_current_device()
    if device.index is not None and device.index != current:
        with torch.cuda.device(device):  # Triton compiles for, and launches on, the current one
            return run(build, inputs, constants, setting, unflatten)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in inputs]
    signature = (
        *(build, device, constants, setting),
        *[
            None
            if tensor is None or address is None
            else (tensor.shape, tensor.stride(), tensor.dtype, address % 16)
            for tensor, address in zip(inputs, addresses, strict=True)
        ],
    )
    plan = cache.get(signature)
    if plan is None:
        # objects of their own: one tensor that is key and value now may be two at the next call
        inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        return _first(signature, inputs, build, unflatten(inputs, constants))
    return plan.run(addresses, current)


def _first(
    signature: Any, inputs: list[Tensor | None], build: Build, arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Compiles all, launches all, and caches the plan if later calls can be filled in."""
    launches: list[tuple[Any, ...]] = []
    results = build(*arguments, launch=lambda *call: launches.append(call))
    steps = [step for call in launches if (step := compiled(*call)) is not None]
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    for step in steps:
        step.launch(stream, step.arguments, _is_profiled())
    numbers = {id(tensor): at for at, tensor in enumerate(inputs) if tensor is not None}
    if not {id(tensor) for tensor in _tensors_in(arguments)} <= numbers.keys():
        return results  # an input was copied into a layout that kernels can read
    outputs = _number(results, numbers, len(inputs))
    used = _tensors_in(tuple(step.arguments for step in steps))
    temporary = _number(used, numbers, len(inputs) + len(outputs))
    workspace_bytes, workspace_offsets = 0, []
    for tensor in temporary:
        workspace_offsets.append(workspace_bytes)
        workspace_bytes += -(-_extent(tensor) // _ALIGNMENT) * _ALIGNMENT
    if len(cache) >= _MAX_PLANS:
        cache.clear()
    cache[signature] = Plan(
        [_step(each, numbers) for each in steps],
        [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in outputs],
        [numbers[id(tensor)] - len(inputs) for tensor in results],
        workspace_bytes,
        workspace_offsets,
        empty_strided_on(results[0].device.type),
    )
    return results


def _number(tensors: Iterable[Tensor], numbers: dict[int, int], start: int) -> list[Tensor]:
    """Numbers the tensors that have no number yet, from `start` on, and returns them."""
    found: list[Tensor] = []
    for tensor in tensors:
        if id(tensor) not in numbers:
            numbers[id(tensor)] = start + len(found)
            found.append(tensor)
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not tensor.numel():
        return 0
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.itemsize


def _step(found: Compiled, numbers: dict[int, int]) -> tuple[Compiled, _Pointers, _Nested]:
    """`found`, and where its arguments hold addresses."""
    pointers: _Pointers = []
    nested: _Nested = []
    constants: list[Any] = []
    for at, value in enumerate(found.arguments):
        marked = _marked(value, numbers)
        constants.append(value if marked is value else None)  # a plan keeps no tensor
        if isinstance(marked, _Address):
            pointers.append((at, marked.tensor, None))
        elif marked is not value:
            first, *rest = marked
            if isinstance(first, _Address) and next(_tensors_in(value[1:]), None) is None:
                pointers.append((at, first.tensor, tuple(rest)))
            else:
                nested.append((at, marked))
    return found._replace(arguments=tuple(constants)), pointers, nested


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors_in(part)


def _marked(value: Any, numbers: dict[int, int]) -> Any:
    """`value` with an address in the place of each tensor; itself where it has none."""
    if isinstance(value, Tensor):
        return _Address(numbers[id(value)])
    if isinstance(value, tuple) and next(_tensors_in(value), None) is not None:
        return tuple(_marked(part, numbers) for part in value)
    return value


def _filled(value: Any, addresses: list[int | None]) -> Any:
    if type(value) is _Address:
        return addresses[value.tensor]
    if type(value) is tuple:
        return tuple([_filled(part, addresses) for part in value])
    return value
