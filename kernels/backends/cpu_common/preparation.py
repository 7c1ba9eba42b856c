"""What both CPU backends do before a kernel and after it: what is copied, and why; results."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...api.masks import MaskStructure
from ...ops.layout import saved_lse_dtype, statistics_dtype
from ...ops.problem import AttentionProblem, BackwardInputs, Problem, SoftmaxProblem

_MAX_FLOAT32_TERMS = 16  # gradients of a bias: float32 sums of so few are as exact as the terms


def declines(problem: Problem) -> str | None:
    first = problem[0]
    if not first.is_cpu:
        return f"tensors on {first.device}, not on the CPU"
    if isinstance(problem, AttentionProblem) and max(problem.shape[2:]) >= 2**30:
        return "sequences of 2**30 and more are not done (positions are 32-bit)"
    return None


def empty_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=saved_lse_dtype(query.dtype))


class BackwardTensors(NamedTuple):
    """What a backward kernel reads and writes beside the problem, the gradients of q, k and v."""

    lse: Tensor  # (B, Hq, Lq) float64
    grad_lse: Tensor | None
    d_bias: Tensor | None  # see `bias_gradient`
    delta: Tensor | None  # (B, Hq, Lq), of which the sinks' gradient is made

    def of_bias_and_sinks(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """The last two results, of the problem as it was given; empty unless they are wanted."""
        bias, sinks, empty = problem.bias, problem.sinks, problem.query.new_empty
        d_bias = empty(0) if self.d_bias is None or bias is None else self.d_bias.to(bias.dtype)
        if self.delta is None or sinks is None:
            return d_bias, empty(0)  # results of an operator are no aliases of each other
        # -sum over batch and rows of exp(sink - lse) * delta; a row that attends nothing has
        # lse = -inf, and huge numbers must not round to a weight above 1
        lse = self.lse.masked_fill(self.lse == -torch.inf, torch.inf)
        taken = torch.exp((sinks.to(torch.float64).view(1, -1, 1) - lse).clamp(max=0.0))
        return d_bias, -(taken * self.delta).sum((0, 2)).to(sinks.dtype)


def backward_tensors(problem: AttentionProblem, inputs: BackwardInputs) -> BackwardTensors:
    lse, grad_lse = inputs.lse.to(torch.float64).contiguous(), inputs.grad_lse
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float64).contiguous()
    d_bias = delta = None
    if inputs.bias_grad and problem.bias is not None:
        d_bias = bias_gradient(problem.bias, problem.shape, statistics_dtype(problem.query.dtype))
    if inputs.sinks_grad:
        # Rows that no tile of keys meets: out = 0, so that delta is -dlse.
        delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse
    return BackwardTensors(lse, grad_lse, d_bias, delta)


def prepared(problem: AttentionProblem) -> AttentionProblem:
    """The problem with every tensor in a layout and dtype that a kernel reads."""
    bias, mask, dtype = problem.bias, problem.mask, statistics_dtype(problem.query.dtype)
    if bias is not None:
        readable = bias.dtype == dtype or (bias.dtype.itemsize == 2 and dtype == torch.float32)
        bias = unit_last_stride(bias if readable else bias.to(dtype))
        problem = problem._replace(bias=bias)
    if bias is not None or mask.dense is not None or mask.query_documents is not None:
        problem = _without_unattended(problem)
    query, key, value = problem.query, problem.key, problem.value
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        problem = problem._replace(
            query=unit_last_stride(query), key=unit_last_stride(key), value=unit_last_stride(value)
        )
    if problem.alibi_slopes is not None:
        problem = problem._replace(alibi_slopes=problem.alibi_slopes.double().contiguous())
    if problem.sinks is not None:
        problem = problem._replace(sinks=problem.sinks.detach().double().contiguous())
    for name in ("key_lengths", "query_lengths", "band", "prefix_lengths"):
        tensor = getattr(mask, name)
        if tensor is not None and not tensor.is_contiguous():
            mask = mask._replace(**{name: tensor.contiguous()})
            problem = problem._replace(mask=mask)
    return problem


def _without_unattended(problem: AttentionProblem) -> AttentionProblem:
    """Zeros in the place of NaN and infinities that no query attends.

    Bands and lengths leave such keys unread, but a dense mask, documents or a -inf bias only give
    them weight 0, and 0 * NaN is NaN. Finite inputs, the usual case, cost one sum.
    """
    if sums_to_finite(problem.key) and sums_to_finite(problem.value):
        return problem
    batch, _, query_len, key_len = problem.shape
    unused = torch.ones(batch, key_len, dtype=torch.bool)
    step = 64
    for start in range(0, query_len, step):
        rows = min(step, query_len - start)
        allowed = problem.mask.rows(start, rows).allowed(rows, key_len, problem.query.device)
        if problem.bias is not None:
            bias = problem.bias
            if bias.shape[2] > 1:
                bias = bias[:, :, start : start + rows]
            attended = bias != -torch.inf
            allowed = attended if allowed is None else allowed & attended
        if allowed is None:
            return problem
        met = allowed.expand(batch, allowed.shape[1], rows, key_len)
        unused &= ~met.any(2).any(1)
    at = unused[:, None, :, None]
    return problem._replace(
        key=problem.key.masked_fill(at, 0.0), value=problem.value.masked_fill(at, 0.0)
    )


def sums_to_finite(tensor: Tensor) -> bool:
    """Whether the sum is finite: then so is every element.

    Torch widens a whole tensor to sum it in another dtype. Its sums of bfloat16 are computed in
    float32 and reach as far; those of float16 are kept to rows.
    """
    if tensor.dtype == torch.float16:
        tensor = tensor.sum(3).float()
    return math.isfinite(tensor.sum().item())


def bias_gradient(bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros for the gradient of a bias, where scores of `shape` are computed in `dtype`.

    Where each element is one pair's, as the bias, unless that is wider than `dtype`. A sum of many
    float32 is kept in float64, unless it will be rounded to a half type, or whole tiles are summed
    and few of them.
    """
    half = bias.dtype.itemsize == 2
    if tuple(bias.shape) == shape:
        rounded = half and dtype == torch.float32
        return torch.zeros(bias.shape, dtype=bias.dtype if rounded else dtype)
    exact = math.prod(shape) // max(1, bias.numel()) <= _MAX_FLOAT32_TERMS
    if tuple(bias.shape[2:]) == shape[2:] and (half or exact):
        return torch.zeros(bias.shape, dtype=dtype)
    return torch.zeros(bias.shape, dtype=torch.float64)


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def prepared_softmax(problem: SoftmaxProblem) -> SoftmaxProblem:
    """The problem with every tensor in a layout that a kernel reads."""
    scores, mask, scale = problem
    parts: dict[str, Any] = {
        name: part.contiguous() if isinstance(part, Tensor) and name != "dense" else part
        for name, part in mask._asdict().items()
    }
    if mask.dense is not None and mask.dense.shape[3] != 1:
        parts["dense"] = unit_last_stride(mask.dense)
    return SoftmaxProblem(unit_last_stride(scores), MaskStructure(**parts), scale)
