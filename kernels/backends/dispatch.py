"""Which backend runs a problem, by a rule that can be read and asked for.

`backend="auto"` takes the first of `PREFERENCE[device]` that is available here and does not
decline the problem; when that is the reference path although a fused one exists for the device,
it says so once. A named backend is taken or refused with its reason, never replaced.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..api.checks import fail_type, fail_value
from ..api.masks import Mask
from ..ops.problem import (
    AddLayerNormProblem,
    AddNormInputs,
    AttentionProblem,
    BackwardInputs,
    LayerNormProblem,
    LinearCrossEntropyProblem,
    Problem,
    RMSNormProblem,
    SoftmaxProblem,
)

# On a CPU both fused backends are level on large problems; the native one is faster on small ones
# and in decoding, and nothing waits for a compiler (`bench speed --backend native --peers numba`).
PREFERENCE = {"cpu": ("native", "numba", "reference"), "cuda": ("triton", "reference")}
_FOLDERS = {
    "native": "cpu_native",
    "numba": "cpu_numba",
    "triton": "gpu_triton",
    "reference": "reference",
}
NAMES = tuple(_FOLDERS)


# q, k, v, mask and scale as a caller passed them -> out; None where the general path must decide
FastPathAttention = Callable[
    [Tensor, Tensor, Tensor, Mask | Tensor | None, float | None], Tensor | None
]
# x, residual, weight, bias and eps as a caller passed them, subtract_mean -> y, and x + residual,
# which without a residual is y again; None as above
FastPathNorm = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor | None, float, bool], tuple[Tensor, Tensor] | None
]


class MissingBackendWarning(RuntimeWarning):
    """The backend that `auto` asks first does not work here, though nobody left it out."""


class Backend(Protocol):
    """What each backend's package offers; tensors as in `problem.py`.

    It may offer `fast_path_attention` and `fast_path_norm` as well: see `FastPathAttention`; and
    `left_out_on_purpose()`, whether somebody chose to install rowmax without it.
    """

    def unavailable(self) -> str | None:
        """Why this backend cannot run here at all; None when it can."""

    def declines(self, problem: Problem) -> str | None:
        """Why this backend does not do this problem; None when it does."""

    def attention(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Lq, Dv), lse (B, Hq, Lq) in `layout.saved_lse_dtype`."""

    def attention_out(self, problem: AttentionProblem) -> Tensor:
        """The same out alone, for those who want neither lse nor a gradient."""

    def attention_backward(
        self, problem: AttentionProblem, inputs: BackwardInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """d_query, d_key, d_value, d_bias, d_sinks; the last two empty or None if not asked for."""

    def masked_softmax(self, problem: SoftmaxProblem) -> Tensor:
        """weights (B, H, Lq, Lk)."""

    def masked_softmax_backward(
        self, grad_weights: Tensor, weights: Tensor, scale: float
    ) -> Tensor:
        """d_scores (B, H, Lq, Lk)."""

    def layer_norm(self, problem: LayerNormProblem) -> tuple[Tensor, Tensor, Tensor]:
        """y (..., N), mean (...), rstd (...)."""

    def layer_norm_backward(
        self, problem: LayerNormProblem, grad_y: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """d_x, d_weight, d_bias; the last two empty where the parameter is absent."""

    def add_layer_norm(self, problem: AddLayerNormProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, total = residual + dropout(x), mean, rstd."""

    def add_layer_norm_backward(
        self, problem: AddLayerNormProblem, inputs: AddNormInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d_x (empty without dropout: it equals d_residual), d_residual, d_weight, d_bias."""

    def rms_norm(self, problem: RMSNormProblem) -> tuple[Tensor, Tensor]:
        """y (..., N), rstd (...)."""

    def rms_norm_backward(
        self, problem: RMSNormProblem, grad_y: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """d_x, d_weight (empty where the weight is absent)."""

    def linear_cross_entropy(
        self, problem: LinearCrossEntropyProblem
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """loss (); d_x and d_weight of the sum over tokens, or None; all but d_x of statistics."""


def check_name(function: str, backend: object) -> str:
    if not isinstance(backend, str):
        fail_type(function, "backend", type(backend).__name__, "a str")
    if backend != "auto" and backend not in _FOLDERS:
        fail_value(function, "backend", repr(backend), "one of auto, " + ", ".join(NAMES))
    return backend


@functools.cache
def load(name: str) -> Backend:
    """The backend's package. Light: what it needs beyond torch is imported on first use."""
    return cast(Backend, importlib.import_module(f".{_FOLDERS[name]}", __package__))


@functools.cache
def unavailable(name: str) -> str | None:
    """Why the backend cannot run on this machine; None when it can."""
    try:
        return load(name).unavailable()
    except ModuleNotFoundError as error:
        return f"this version of rowmax does not contain it ({error}); a later one may"


def choose(name: str, problem: Problem) -> Backend:
    """The backend that runs `problem` when the caller asked for `name`."""
    if name != "auto":
        reason = refusal(name, problem)
        if reason is not None:
            raise RuntimeError(
                f"{problem.op_name}: backend {name!r} can't do this: {reason}; "
                "backend='auto' takes one that can"
            )
        return load(name)
    preferred = _preferred(problem[0].device)
    if preferred is not None and preferred.declines(problem) is None:
        return preferred
    taken, passed_over = _select(problem)
    if taken == "reference" and passed_over:
        _warn_once(
            f"rowmax: {problem.op_name} runs on the unfused reference path, because "
            + "; ".join(f"{other}: {reason}" for other, reason in passed_over)
        )
    return load(taken)


@functools.cache
def fast_path_attention(name: str) -> FastPathAttention | None:
    """How the backend that `name` means takes a fast-path call on the CPU, where it has one."""
    return getattr(_on_cpu(name), "fast_path_attention", None)


@functools.cache
def fast_path_norm(name: str) -> FastPathNorm | None:
    """The same for the norms."""
    return getattr(_on_cpu(name), "fast_path_norm", None)


def _on_cpu(name: str) -> Backend | None:
    """The fused backend that `name` means on the CPU, if it works here."""
    if name == "auto":
        return _preferred(torch.device("cpu"))
    return load(name) if name in _FOLDERS and unavailable(name) is None else None


@functools.cache
def _preferred(device: torch.device) -> Backend | None:
    """The fused backend that is asked first, of those that work here; found once a device.

    Where another one should be asked before it, a warning says why that can't be.
    """
    missing: list[str] = []
    for name in PREFERENCE.get(device.type, ()):
        reason = unavailable(name)
        if name == "reference":
            break  # with a warning of its own, from `choose`
        if reason is None:
            if missing:
                _warn_once(
                    f"rowmax: backend 'auto' takes {name} on {device.type}, because "
                    + "; ".join(missing),
                    MissingBackendWarning,
                )
            return load(name)
        if not _left_out(name):
            missing.append(f"{name}: {reason}")
    return None


def _left_out(name: str) -> bool:
    """Whether somebody chose that this installation lacks the backend."""
    try:
        on_purpose: Callable[[], bool] = getattr(load(name), "left_out_on_purpose", bool)
    except ModuleNotFoundError:  # as the whole version does
        return True
    return on_purpose()


def explain(problem: Problem) -> str:
    """The rule applied to `problem`, one line a backend, and who computes its derivatives."""
    taken, passed_over = _select(problem)
    lines = [f"{problem.op_name} on {problem[0].device}, {problem[0].dtype}: {taken}"]
    lines += [f"  {name}: passed over: {reason}" for name, reason in passed_over]
    lines.append(f"  {taken}: taken, the first in the order of preference that can do this")
    lines.append(
        f"  gradients: {taken}; forward-mode and second derivatives: the unfused formulas of the "
        "reference path"
    )
    return "\n".join(lines)


def _select(problem: Problem) -> tuple[str, list[tuple[str, str]]]:
    passed_over: list[tuple[str, str]] = []
    for name in PREFERENCE.get(problem[0].device.type, ("reference",)):
        reason = refusal(name, problem)
        if reason is None:
            return name, passed_over
        passed_over.append((name, reason))
    raise AssertionError("the reference declines nothing")


def refusal(name: str, problem: Problem) -> str | None:
    """Why the named backend can't do `problem`; None when it can."""
    return unavailable(name) or load(name).declines(problem)


_warned: set[str] = set()


def _warn_once(message: str, category: type[Warning] = RuntimeWarning) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, category, stacklevel=2)


def installation() -> dict[str, Any]:
    """Backend name -> None when it works here, or the reason why not."""
    return {name: unavailable(name) for name in NAMES}


def attention_weights(
    problem: AttentionProblem, heads: list[int] | None, rows: list[int] | None
) -> Tensor:
    """The weights (B, heads, rows, Lk) by the reference path: fused kernels never write them."""
    from .reference import weights  # as backends are, on first use

    return weights.attention_weights(problem, heads, rows)
