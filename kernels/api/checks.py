"""Argument checks shared by every public function: one wording, raised before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..ops.tracing import untraced

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STRIDED = torch.strided
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def fail_value(function: str, argument: str, got: object, expected: str, fix: str = "") -> NoReturn:
    """`fix` is what a caller who made the usual mistake writes instead."""
    raise ValueError(_sentence(function, argument, got, expected, fix))


def fail_type(function: str, argument: str, got: object, expected: str, fix: str = "") -> NoReturn:
    raise TypeError(_sentence(function, argument, got, expected, fix))


def _sentence(function: str, argument: str, got: object, expected: str, fix: str) -> str:
    sentence = f"{function}: `{argument}`: expected {expected}, got {got}"
    return f"{sentence}; {fix}" if fix else sentence


# What takes the place of a keyword that torch's functions have and these have not.
_KEYWORDS = {
    "is_causal": "pass mask=Causal()",
    "attn_mask": "pass a bool tensor, True = may attend, as `mask`, and a float one as `bias`",
    "key_padding_mask": "pass mask=KeyLengths(lengths), or a bool (B, 1, 1, Lk), True = a token",
    "enable_gqa": "leave it out: heads are grouped wherever `k` has fewer than `q`",
    "dropout": "pass it as dropout_p=",
}


def fail_keywords(function: str, unknown: dict[str, object]) -> NoReturn:
    """The error of a keyword that the function does not have, as Python words it."""
    name = next(iter(unknown))
    fix = _KEYWORDS.get(name)
    sentence = f"{function}() got an unexpected keyword argument {name!r}"
    raise TypeError(f"{sentence}; {fix}" if fix else sentence)


def shape_text(shape: Sequence[int | torch.SymInt]) -> str:
    # in a trace by torch.jit sizes are tensors
    numbers = (untraced(int, size) if isinstance(size, Tensor) else size for size in shape)
    sizes = ", ".join(map(str, numbers))
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def as_tensor(argument: str, value: object) -> str:
    """The fix of an argument that should be a tensor, or nothing."""
    makers = {"ndarray": "torch.from_numpy", "list": "torch.tensor"}
    maker = makers.get(type(value).__name__)
    return f"pass {maker}({argument})" if maker else ""


def require_tensor(function: str, argument: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        fix = as_tensor(argument, value)
        fail_type(function, argument, type(value).__name__, "a torch.Tensor", fix)
    if value.layout is not _STRIDED or value.is_nested:
        got = f"a {'nested ' if value.is_nested else ''}tensor of layout {value.layout}"
        fail_type(function, argument, got, "a dense tensor, of layout torch.strided")
    return value


def require_float(function: str, argument: str, value: object) -> Tensor:
    tensor = require_tensor(function, argument, value)
    if tensor.dtype not in FLOAT_DTYPES:
        expected = "dtype float64, float32, bfloat16 or float16"
        fail_type(function, argument, tensor.dtype, expected, f"pass {argument}.float()")
    return tensor


def require_like(function: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    """`value` must have the dtype and the device of `like`."""
    if value.dtype != like.dtype:
        expected = f"dtype {like.dtype}, that of `{other}`"
        fail_type(function, argument, value.dtype, expected, f"pass {argument}.to({like.dtype})")
    require_device(function, argument, value, other, like)


def require_device(function: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.device != like.device:
        got, expected = f"device {value.device}", f"{like.device}, as `{other}`"
        fix = f'pass {argument}.to("{like.device}")'
        fail_value(function, argument, got, expected, fix)


def require_broadcastable(
    function: str, argument: str, value: Tensor, shape: Sequence[int | torch.SymInt], names: str
) -> Tensor:
    """`value` viewed with leading ones, so that it has `len(shape)` dimensions and broadcasts."""
    if not broadcasts(value, shape):
        fix = ""
        if value.dim() == 2 and broadcasts(value[:, None, None], shape):
            fix = f"pass {argument}[:, None, None, :] to mask the keys of each batch element"
        elif value.dim() == 3 and broadcasts(value[:, None], shape):
            fix = f"pass {argument}[:, None] to mask all heads alike"
        expected = f"a shape that broadcasts to {names} = {shape_text(shape)}"
        fail_value(function, argument, f"shape {shape_text(value.shape)}", expected, fix)
    return value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape))


def broadcasts(value: Tensor, shape: Sequence[int | torch.SymInt]) -> bool:
    """Whether `value` broadcasts to `shape` as it stands."""

    def fits() -> bool:
        return value.dim() <= len(shape) and all(
            size == 1 or size == target
            for size, target in zip(reversed(value.shape), reversed(shape), strict=False)
        )

    return untraced(fits)


def require_number(function: str, argument: str, value: object) -> float:
    """A finite Python or NumPy number; a tensor is none, for it might want a gradient."""
    if isinstance(value, Tensor) or not (
        isinstance(value, int | float) or hasattr(value, "__float__")
    ):
        one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
        fix = f"pass {argument}.item()" if one else ""
        fail_type(function, argument, type(value).__name__, "a number", fix)
    number = float(value)
    if not -math.inf < number < math.inf:
        fail_value(function, argument, number, "a finite number")
    return number


def require_probability(function: str, argument: str, value: object) -> float:
    probability = require_number(function, argument, value)
    if not 0.0 <= probability <= 1.0:
        fix = (
            f"pass {probability / 100:g} for {probability:g} %"
            if 1.0 < probability <= 100.0
            else ""
        )
        fail_value(function, argument, probability, "a probability in [0, 1]", fix)
    return probability


def require_choice(
    function: str,
    limits: tuple[int, int] | None,
    weight_heads: Sequence[int] | None,
    weight_rows: Sequence[int] | None,
) -> tuple[list[int] | None, list[int] | None]:
    """The chosen heads and rows as lists of numbers below `limits`; None where none are wanted."""
    chosen: list[list[int] | None] = []
    for n, (name, values) in enumerate(
        (("weight_heads", weight_heads), ("weight_rows", weight_rows))
    ):
        numbers = list(values) if isinstance(values, Sequence) else None
        if values is not None:
            if limits is None:
                fail_value(function, name, f"{values!r}", "None without return_weights=True")
            if numbers is None or not all(type(number) is int for number in numbers):
                fail_type(function, name, f"{values!r}", "a sequence of ints, or None")
            if not all(0 <= number < limits[n] for number in numbers):
                fail_value(function, name, f"{values!r}", f"numbers from 0 to {limits[n] - 1}")
        chosen.append(numbers)
    return chosen[0], chosen[1]


def seed_tensor(
    function: str, seed: int | Tensor | None, dropout_p: float, other: str, like: Tensor
) -> Tensor | None:
    """A 0-d int64 tensor where dropout needs one; a tensor so that a traced graph can draw it.

    It lies where `like` does: a CUDA graph then draws anew at each replay, and nobody waits for it.
    """
    if seed is not None and not isinstance(seed, int | Tensor):
        fail_type(function, "seed", type(seed).__name__, "an int, a 0-d int64 tensor or None")
    if isinstance(seed, Tensor):
        require_tensor(function, "seed", seed)
        if seed.dtype != torch.int64 or seed.dim() != 0:
            got = f"{seed.dtype} of shape {shape_text(seed.shape)}"
            fail_type(function, "seed", got, "a 0-d int64 tensor")
        if seed.device.type != "cpu":
            require_device(function, "seed", seed, other, like)
    if dropout_p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)
    if not -(2**63) <= seed < 2**63:
        fail_value(function, "seed", seed, "an int of 64 bits")
    return torch.full((), seed, dtype=torch.int64, device=like.device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, attention runs in the autocast dtype, as torch's own does."""
    device_type = tensors[0].device.type
    if not autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
    )


def autocasts(device_type: str) -> bool:
    """Whether torch.autocast is on for the device; some, "meta" among them, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
