"""From an attention problem to its kernels: strides, allocations, and what is copied and why."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import sequences
from ..layout import empty_heads, saved_lse_dtype
from ..problem import AttentionProblem
from .attention_forward import FORWARD
from .attention_forward import scratch_elements as forward_scratch
from .attention_gradients import BACKWARD
from .attention_gradients import scratch_elements as backward_scratch
from .attention_tiles import LOG2_E, NO_BOUND
from .microkernel import VECTORS, lanes_in


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    if problem.query_starts is not None:
        return sequences.attention(attention, problem)
    problem = _prepared(problem)
    query, value = problem.query, problem.value
    out = empty_heads(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=saved_lse_dtype(query.dtype))
    batch, heads, query_len, _ = query.shape
    tile = VECTORS * lanes_in(query.dtype)
    width = min(tile, _round_up(query_len, lanes_in(query.dtype)))
    elements = forward_scratch(width, query.shape[3], value.shape[3])
    FORWARD(
        query.dtype,
        batch * heads * -(-query_len // tile),
        elements * query.element_size(),
        _integers(problem, out, lse),
        (problem.scale * LOG2_E, _keep_scale(problem.dropout_p)),
    )
    return out, lse


def attention_backward(
    problem: AttentionProblem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    sinks_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if problem.query_starts is not None:
        return sequences.attention_backward(
            *(attention_backward, problem, grad_out, grad_lse, out, lse, bias_grad, sinks_grad)
        )
    bias = problem.bias
    problem = _prepared(problem)
    query, key, value = problem.query, problem.key, problem.value
    d_query, d_key, d_value = (empty_heads(x, x.shape[3]) for x in (query, key, value))
    grad_out, out, lse = _unit_last_stride(grad_out), _unit_last_stride(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    d_bias, wide = None, False
    if bias_grad and bias is not None:
        wide = tuple(bias.shape) != problem.shape
        d_bias = torch.zeros(bias.shape, dtype=torch.float64 if wide else query.dtype)

    batch, _, query_len, key_len = problem.shape
    key_heads = key.shape[1]
    # A bias that several heads or batch elements share has one gradient: the same thread takes
    # them all, one after another.
    shares = (1, 1) if d_bias is None else (d_bias.shape[0], d_bias.shape[1])
    batch_tasks = 1 if d_bias is not None and shares[0] == 1 else batch
    head_tasks = 1 if d_bias is not None and shares[1] == 1 else key_heads
    lanes = lanes_in(query.dtype)
    width = min(VECTORS * lanes, _round_up(query_len, lanes))
    elements = backward_scratch(width, lanes, key_len, query.shape[3], value.shape[3])
    d_bias_strides = (0, 0, 0, 0) if d_bias is None else _broadcast_strides(d_bias)
    BACKWARD(
        query.dtype,
        batch_tasks * head_tasks,
        elements * query.element_size(),
        (
            *_integers(problem, out, lse),
            *(grad_out.data_ptr(), *grad_out.stride()[:3]),
            _address(grad_lse),
            *(d_query.data_ptr(), *d_query.stride()[:3]),
            *(d_key.data_ptr(), *d_key.stride()[:3]),
            *(d_value.data_ptr(), *d_value.stride()[:3]),
            *(_address(d_bias), *d_bias_strides),
            int(wide),
            *(batch_tasks, head_tasks),
        ),
        (problem.scale * LOG2_E, _keep_scale(problem.dropout_p), problem.scale),
    )
    if d_bias is None or bias is None:
        d_bias = query.new_empty(0)
    else:
        d_bias = d_bias.to(bias.dtype)
    return d_query, d_key, d_value, d_bias, query.new_empty(0)


def _prepared(problem: AttentionProblem) -> AttentionProblem:
    """The problem with everything a kernel reads in a form that it can read."""
    bias, mask = problem.bias, problem.mask
    if bias is not None:
        bias = _unit_last_stride(bias.to(problem.query.dtype))
        problem = problem._replace(bias=bias)
    if bias is not None or mask.dense is not None:
        problem = _without_unattended(problem)
    query, key, value = problem.query, problem.key, problem.value
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        problem = problem._replace(
            query=_unit_last_stride(query),
            key=_unit_last_stride(key),
            value=_unit_last_stride(value),
        )
    tensors = (mask.key_lengths, mask.query_lengths, mask.band)
    if any(tensor is not None and not tensor.is_contiguous() for tensor in tensors):
        key_lengths, query_lengths, band = (
            None if tensor is None else tensor.contiguous() for tensor in tensors
        )
        mask = mask._replace(key_lengths=key_lengths, query_lengths=query_lengths, band=band)
        problem = problem._replace(mask=mask)
    return problem


def _without_unattended(problem: AttentionProblem) -> AttentionProblem:
    """Zeros in the place of NaN and infinities that no query attends.

    Bands and lengths leave such keys unread, but a dense mask or a -inf bias only gives them
    weight 0, and 0 * NaN is NaN. Finite inputs, the usual case, cost one sum.
    """
    if bool(torch.isfinite(problem.key.sum() + problem.value.sum())):
        return problem
    batch, _, query_len, key_len = problem.shape
    allowed = problem.mask.allowed(query_len, key_len, problem.query.device)
    if problem.bias is not None:
        attended = problem.bias != -torch.inf
        allowed = attended if allowed is None else allowed & attended
    if allowed is None:
        return problem
    unused = ~allowed.expand(batch, allowed.shape[1], query_len, key_len).any(2).any(1)
    unused = unused[:, None, :, None]
    return problem._replace(
        key=problem.key.masked_fill(unused, 0.0), value=problem.value.masked_fill(unused, 0.0)
    )


def _integers(problem: AttentionProblem, out: Tensor, lse: Tensor) -> tuple[int, ...]:
    query, key, value, mask = problem.query, problem.key, problem.value, problem.mask
    batch, heads, query_len, head_dim = query.shape
    _, key_heads, key_len, value_dim = value.shape
    bias, dense, seed = problem.bias, mask.dense, problem.seed
    bias_strides = (0, 0, 0, 0) if bias is None else _broadcast_strides(bias)
    dense_strides = (0, 0, 0, 0) if dense is None else _broadcast_strides(dense)
    dropout = problem.dropout_p > 0.0 and seed is not None
    return (
        *(query.data_ptr(), *query.stride()[:3]),
        *(key.data_ptr(), *key.stride()[:3]),
        *(value.data_ptr(), *value.stride()[:3]),
        *(out.data_ptr(), *out.stride()[:3]),
        lse.data_ptr(),
        *(batch, heads, key_heads, query_len, key_len, head_dim, value_dim),
        -NO_BOUND if mask.band_lower is None else mask.band_lower,
        NO_BOUND if mask.band_upper is None else mask.band_upper,
        _address(mask.band),
        _address(mask.key_lengths),
        _address(mask.query_lengths),
        *(_address(bias), *bias_strides),
        *(_address(dense), *dense_strides),
        int(dropout),
        # p = 1 wants 2**32, one more than a word holds; keep_scale = 0 drops what is left
        min(round(problem.dropout_p * 2**32), 2**32 - 1),
        int(seed) if dropout and seed is not None else 0,
        problem.batch_start,
    )


def _keep_scale(dropout_p: float) -> float:
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 for every dimension of size 1."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _round_up(value: int, multiple: int) -> int:
    return max(multiple, -(-value // multiple) * multiple)
