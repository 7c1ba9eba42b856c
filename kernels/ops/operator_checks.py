"""What an operator checks before it reads memory, when torch's dispatcher has called it.

By hand or from a serialized graph it may be given anything; the public functions check in their
own terms, and their calls that go past the dispatcher come by here no more.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

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
from ..api.masks import MaskStructure
from ..backends.dispatch import check_name
from .layout import saved_lse_dtype, statistics_dtype
from .problem import AttentionProblem

_ABSENT = frozenset((type(None),))


class _Checks:
    """The checks of one call: each takes an argument's name in the schema and its value."""

    def __init__(self, operator: str, first: str, like: Tensor, *, least: int, most: int) -> None:
        """`like` is the tensor named `first`; it has `least` to `most` dimensions."""
        self.operator, self.first, self.like = operator, first, like
        require_float(operator, first, like)
        if not least <= like.dim() <= most:
            expected = f"{least} dimensions" if least == most else f"{least} or more dimensions"
            fail_value(operator, first, f"shape {shape_text(like.shape)}", expected)

    def shape(
        self, argument: str, tensor: Tensor | None, *shapes: tuple[int, ...], names: str
    ) -> None:
        """One of the shapes, on the device; nothing where the argument is absent."""
        if tensor is None:
            return
        require_tensor(self.operator, argument, tensor)
        require_device(self.operator, argument, tensor, self.first, self.like)
        if tensor.shape not in shapes:
            expected = f"{names} = " + " or ".join(map(shape_text, dict.fromkeys(shapes)))
            fail_value(self.operator, argument, f"shape {shape_text(tensor.shape)}", expected)

    def like_first(
        self, argument: str, tensor: Tensor | None, shape: tuple[int, ...], names: str
    ) -> None:
        """A shape, and the dtype and device of the first tensor."""
        if tensor is not None:
            require_like(self.operator, argument, tensor, self.first, self.like)
            self.shape(argument, tensor, shape, names=names)

    def dtype(self, argument: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
        if tensor is not None and tensor.dtype != dtype:
            fail_type(self.operator, argument, tensor.dtype, f"dtype {dtype}")

    def floats(
        self, argument: str, tensor: Tensor | None, *shapes: tuple[int, ...], names: str
    ) -> None:
        if tensor is not None:
            require_float(self.operator, argument, tensor)
            self.shape(argument, tensor, *shapes, names=names)

    def integers(
        self, argument: str, tensor: Tensor | None, *shapes: tuple[int, ...], names: str
    ) -> None:
        self.dtype(argument, tensor, torch.int64)
        self.shape(argument, tensor, *shapes, names=names)

    def absent(self, argument: str, value: object, why: str) -> None:
        if value is not None:
            fail_value(self.operator, argument, type(value).__name__, f"None {why}")

    def dropout(self, probability: float, seed: Tensor | None) -> None:
        if require_probability(self.operator, "dropout_p", probability) == 0.0:
            return
        if seed is None:
            fail_value(self.operator, "seed", "None", "a 0-d int64 tensor where dropout_p > 0")
        self.dtype("seed", seed, torch.int64)
        if seed.dim() != 0:
            fail_value(self.operator, "seed", f"shape {shape_text(seed.shape)}", "a 0-d tensor")
        if seed.device.type != "cpu":
            require_device(self.operator, "seed", seed, self.first, self.like)

    def mask(self, mask: MaskStructure, shape: tuple[int, int, int, int]) -> None:
        if _ABSENT.issuperset(map(type, mask[:6])):
            return
        batch, _, query_len, key_len = shape
        self.broadcast("dense_mask", mask.dense, shape)
        self.dtype("dense_mask", mask.dense, torch.bool)
        self.integers("key_lengths", mask.key_lengths, (batch,), names="(B,)")
        self.integers("query_lengths", mask.query_lengths, (batch,), names="(B,)")
        for name, own, other in (
            ("query_documents", mask.query_documents, mask.key_documents),
            ("key_documents", mask.key_documents, mask.query_documents),
        ):
            if own is None and other is not None:
                fail_value(self.operator, name, "None", "ids of queries and keys, or of neither")
        self.integers("query_documents", mask.query_documents, (batch, query_len), names="(B, Lq)")
        self.integers("key_documents", mask.key_documents, (batch, key_len), names="(B, Lk)")
        self.integers("band", mask.band, (batch, 2), names="(B, 2)")

    def broadcast(
        self, argument: str, tensor: Tensor | None, shape: tuple[int, int, int, int]
    ) -> None:
        """Four dimensions, each full or 1."""
        if tensor is None:
            return
        require_tensor(self.operator, argument, tensor)
        require_device(self.operator, argument, tensor, self.first, self.like)
        if tensor.dim() != 4 or any(
            size not in (1, full) for size, full in zip(tensor.shape, shape, strict=True)
        ):
            got, expected = f"shape {shape_text(tensor.shape)}", shape_text(shape)
            fail_value(self.operator, argument, got, f"each dimension of {expected}, or 1")

    def starts(self, argument: str, starts: Tensor, total: int, longest: int, name: str) -> None:
        """Of packed sequences: they begin with 0, never fall and end with the total."""
        self.dtype(argument, starts, torch.int64)
        expected = f"(n + 1,) that begin with 0, never fall, and end with {total}"
        if starts.dim() != 1 or starts.shape[0] < 1:
            fail_value(self.operator, argument, f"shape {shape_text(starts.shape)}", expected)
        require_device(self.operator, argument, starts, self.first, self.like)
        if starts.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # nothing can be read there while a graph is captured
        values: list[int] = starts.tolist()
        lengths = [end - start for start, end in pairwise(values)]
        if values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
            fail_value(self.operator, argument, values, expected)
        if longest < max(lengths, default=0):
            fail_value(self.operator, name, longest, f"at least {max(lengths)}, the largest length")


# --- attention ------------------------------------------------------------------------------------


def _attention_problem(operator: str, fields: tuple[Any, ...]) -> tuple[_Checks, AttentionProblem]:
    *flat, backend = fields
    check_name(operator, backend)
    problem = AttentionProblem.from_flat(tuple(flat))
    query, key, value = problem[:3]
    checks = _Checks(operator, "query", query, least=4, most=4)
    batch, heads, _, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        require_like(operator, name, tensor, "query", query)
        if tensor.dim() != 4:
            fail_value(operator, name, f"shape {shape_text(tensor.shape)}", "4 dimensions")
    key_heads, key_len = key.shape[1:3]
    checks.shape("key", key, (batch, key_heads, key_len, head_dim), names="(B, Hkv, Lk, D)")
    of_value = (batch, key_heads, key_len, value.shape[3])
    checks.shape("value", value, of_value, names="(B, Hkv, Lk, Dv)")
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        fail_value(operator, "key", f"{key_heads} heads", f"a divisor of the query's {heads}")
    _packed(checks, problem)
    shape = problem.shape
    checks.mask(problem.mask, shape)
    if not _ABSENT.issuperset(map(type, problem[3:7])):
        _added(checks, problem, shape)
    require_number(operator, "scale", problem.scale)
    if problem.softcap is not None and not require_number(operator, "softcap", problem.softcap) > 0:
        fail_value(operator, "softcap", problem.softcap, "a finite number > 0, or None")
    checks.dropout(problem.dropout_p, problem.seed)
    if problem.batch_start < 0:
        fail_value(operator, "batch_start", problem.batch_start, "at least 0")
    return checks, problem


def _added(checks: _Checks, problem: AttentionProblem, shape: tuple[int, int, int, int]) -> None:
    """What is added to the scores, and the sinks."""
    batch, heads = shape[:2]
    checks.broadcast("bias", problem.bias, shape)
    if problem.bias is not None:
        require_float(checks.operator, "bias", problem.bias)
    slopes, offset = problem.alibi_slopes, problem.alibi_offset
    if (slopes is None) != (offset is None):
        name = "alibi_slopes" if slopes is None else "alibi_offset"
        fail_value(checks.operator, name, "None", "slopes and offset, or neither")
    checks.floats("alibi_slopes", slopes, (1, heads), (batch, heads), names="(B | 1, Hq)")
    checks.integers("alibi_offset", offset, (1,), (batch,), names="(B | 1,)")
    checks.floats("sinks", problem.sinks, (heads,), names="(Hq,)")


def _packed(checks: _Checks, problem: AttentionProblem) -> None:
    query_starts, key_starts = problem.query_starts, problem.key_starts
    if query_starts is None or key_starts is None:
        for name, starts, other in (
            ("query_starts", query_starts, key_starts),
            ("key_starts", key_starts, query_starts),
        ):
            if starts is None and other is not None:
                fail_value(checks.operator, name, "None", "starts of queries and keys, or neither")
        return
    query, key = problem.query, problem.key
    if query.shape[0] != 1:
        got = f"shape {shape_text(query.shape)}"
        fail_value(checks.operator, "query", got, "(1, Hq, total, D) of packed sequences")
    longest, longest_key = problem.longest_query, problem.longest_key
    checks.starts("query_starts", query_starts, query.shape[2], longest, "longest_query")
    checks.starts("key_starts", key_starts, key.shape[2], longest_key, "longest_key")
    count = (query_starts.shape[0],)
    checks.shape("key_starts", key_starts, count, names="the shape of query_starts")
    for name, tensor in (
        ("bias", problem.bias),
        ("dense_mask", problem.mask.dense),
        ("key_lengths", problem.mask.key_lengths),
        ("query_lengths", problem.mask.query_lengths),
        ("query_documents", problem.mask.query_documents),
        ("key_documents", problem.mask.key_documents),
    ):
        checks.absent(name, tensor, "with packed sequences")


def _attention(*arguments: Any) -> None:
    _attention_problem("rowmax::attention", arguments)


def _attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    sinks_grad: bool,
    *arguments: Any,
) -> None:
    operator = "rowmax::attention_backward"
    checks, problem = _attention_problem(operator, arguments)
    rows = tuple(problem.query.shape[:3])
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        checks.like_first(name, tensor, (*rows, problem.value.shape[3]), "(B, Hq, Lq, Dv)")
    for name, tensor in (("grad_lse", grad_lse), ("lse", lse)):
        checks.dtype(name, tensor, saved_lse_dtype(problem.query.dtype))
        checks.shape(name, tensor, rows, names="(B, Hq, Lq)")
    for name, asked, tensor in (
        ("bias_grad", bias_grad, problem.bias),
        ("sinks_grad", sinks_grad, problem.sinks),
    ):
        if asked and tensor is None:
            fail_value(operator, name, "True", f"False without {name.removesuffix('_grad')}")


# --- the row-wise operators -----------------------------------------------------------------------


def _masked_softmax(scores: Tensor, *arguments: Any) -> None:
    *mask, scale, backend = arguments
    operator = "rowmax::masked_softmax"
    check_name(operator, backend)
    checks = _Checks(operator, "scores", scores, least=4, most=4)
    batch, heads, query_len, key_len = scores.shape
    checks.mask(MaskStructure(*mask), (batch, heads, query_len, key_len))
    require_number(operator, "scale", scale)


def _masked_softmax_backward(
    grad_weights: Tensor, weights: Tensor, scale: float, backend: str
) -> None:
    operator = "rowmax::masked_softmax_backward"
    check_name(operator, backend)
    checks = _Checks(operator, "weights", weights, least=4, most=4)
    checks.like_first("grad_weights", grad_weights, weights.shape, "the shape of weights")
    require_number(operator, "scale", scale)


def _norm(
    operator: str,
    first: str,
    x: Tensor,
    parameters: dict[str, Tensor | None],
    eps: float,
    backend: str,
    *,
    statistics: dict[str, Tensor] | None = None,
    alike: dict[str, Tensor | None] | None = None,
) -> _Checks:
    """What all norms have; `alike` are of the shape and dtype of `x`, `statistics` one a row."""
    check_name(operator, backend)
    checks = _Checks(operator, first, x, least=1, most=1 << 16)
    for name, tensor in (alike or {}).items():
        checks.like_first(name, tensor, x.shape, f"the shape of {first}")
    for name, statistic in (statistics or {}).items():
        checks.dtype(name, statistic, statistics_dtype(x.dtype))
        checks.shape(name, statistic, x.shape[:-1], names="one a row")
    for name, parameter in parameters.items():
        checks.floats(name, parameter, x.shape[-1:], names="(N,)")
    if require_number(operator, "eps", eps) < 0:
        fail_value(operator, "eps", eps, "a finite number >= 0")
    return checks


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> None:
    _norm("rowmax::layer_norm", "x", x, {"weight": weight, "bias": bias}, eps, backend)


def _layer_norm_backward(
    grad_y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> None:
    _norm(
        *("rowmax::layer_norm_backward", "x", x, {"weight": weight, "bias": bias}, eps, backend),
        statistics={"mean": mean, "rstd": rstd},
        alike={"grad_y": grad_y},
    )


def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
    checks = _norm(
        *("rowmax::add_layer_norm", "x", x, {"weight": weight, "bias": bias}, eps, backend),
        alike={"residual": residual},
    )
    checks.dropout(dropout_p, seed)


def _add_layer_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
    operator, parameters = "rowmax::add_layer_norm_backward", {"weight": weight, "bias": bias}
    checks = _norm(
        *(operator, "total", total, parameters, eps, backend),
        statistics={"mean": mean, "rstd": rstd},
        alike={"grad_y": grad_y, "grad_total": grad_total},
    )
    checks.dropout(dropout_p, seed)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, backend: str) -> None:
    _norm("rowmax::rms_norm", "x", x, {"weight": weight}, eps, backend)


def _rms_norm_backward(
    grad_y: Tensor, rstd: Tensor, x: Tensor, weight: Tensor | None, eps: float, backend: str
) -> None:
    _norm(
        *("rowmax::rms_norm_backward", "x", x, {"weight": weight}, eps, backend),
        statistics={"rstd": rstd},
        alike={"grad_y": grad_y},
    )


_CHECKS: dict[str, Callable[..., None]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "masked_softmax": _masked_softmax,
    "masked_softmax_backward": _masked_softmax_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "add_layer_norm": _add_layer_norm,
    "add_layer_norm_backward": _add_layer_norm_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
}


def checked(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation` of the operator `name`, behind the checks of its arguments."""
    check = _CHECKS[name]

    def kernel(*arguments: Any) -> Any:
        check(*arguments)
        return implementation(*arguments)

    return kernel
