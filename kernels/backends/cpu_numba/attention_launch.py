"""From an attention problem to its kernels: strides, allocations, and what is copied and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.layout import empty_heads, statistics_dtype
from ...ops.problem import AttentionProblem, BackwardInputs
from ..cpu_common.constants import ITEM_BFLOAT16, ITEM_COMPUTED, ITEM_FLOAT16, LOG2_E, NO_BOUND
from ..cpu_common.preparation import (
    backward_tensors,
    broadcast_strides,
    dropout_fields,
    empty_lse,
    prepared,
    unit_last_stride,
)
from .attention_backward_kernels import BACKWARD
from .attention_backward_kernels import scratch_elements as backward_scratch
from .attention_decode import DECODE, partial_elements
from .attention_decode import scratch_elements as decode_scratch
from .attention_forward import FORWARD
from .attention_forward import scratch_elements as forward_scratch
from .attention_plan import (
    Sizes,
    backward_plan,
    bias_gradient_kind,
    decode_plan,
    forward_plan,
    max_decode_queries,
)
from .call import Plan
from .gemm import lanes_in
from .host import bfloat16_dots

_ITEM_TYPES = {torch.bfloat16: ITEM_BFLOAT16, torch.float16: ITEM_FLOAT16}
# The fields of what a problem may lack, and of a bias gradient that is not wanted.
_ABSENT: dict[str, float] = dict.fromkeys(
    (
        *("query_starts", "key_starts", "band", "prefix_lengths", "key_lengths"),
        *("query_lengths", "sinks"),
        *("query_documents", "query_documents_batch", "key_documents", "key_documents_batch"),
        *("bias", "bias_batch", "bias_head", "bias_row", "bias_column", "bias_item_type"),
        *("dense", "dense_batch", "dense_head", "dense_row", "dense_column"),
        *("alibi", "alibi_batch", "alibi_offset", "alibi_offset_batch"),
    ),
    0,
)
_NO_BIAS_GRADIENT = dict.fromkeys(
    (
        *("d_bias", "d_bias_batch", "d_bias_head", "d_bias_row", "d_bias_column"),
        *("d_bias_kind", "d_bias_item_type"),
    ),
    0,
)


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    lse = empty_lse(problem.query)
    return _forward(problem, lse), lse


def attention_out(problem: AttentionProblem) -> Tensor:
    return _forward(problem, None)


def _forward(problem: AttentionProblem, lse: Tensor | None) -> Tensor:
    """out, and what is written into lse."""
    query, key, value = problem[:3]
    out = empty_heads(query, value.shape[3])
    name = _plan_name(problem)
    plan = _plans.get(name) if name is not None else None
    if plan is not None:
        plan.run(
            *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
            *(out.data_ptr(), 0 if lse is None else lse.data_ptr()),
        )
        return out
    problem = prepared(problem)  # kept: a plan holds addresses of the copies made here
    plans = _forward_plans(problem, out, lse)
    for plan in plans:
        plan.run()
    if name is not None:
        if len(_plans) >= _MAX_CACHED_PLANS:
            _plans.clear()
        (_plans[name],) = plans
    return out


_NO_TENSORS = frozenset((type(None), int))
_MAX_CACHED_PLANS = 256
_plans: dict[tuple[Any, ...], Plan] = {}


def _plan_name(problem: AttentionProblem) -> tuple[Any, ...] | None:
    """All that a forward call depends on but the addresses of q, k, v; None where there is more."""
    query, key, value, mask = problem.query, problem.key, problem.value, problem.mask
    if (
        problem.dropout_p > 0.0
        or not (problem.bias is problem.alibi_slopes is problem.sinks is None)
        or problem.query_starts is not None
        or not _NO_TENSORS.issuperset(map(type, mask))
    ):
        return None
    by_query, by_key, by_value = query.stride(), key.stride(), value.stride()
    if not by_query[3] == by_key[3] == by_value[3] == 1:
        return None
    return (
        *(query.dtype, query.shape, key.shape, value.shape, by_query, by_key, by_value),
        *(problem.scale, problem.softcap, mask.band_lower, mask.band_upper),
        torch.get_num_threads(),
    )


def _forward_plans(problem: AttentionProblem, out: Tensor, lse: Tensor | None) -> list[Plan]:
    """The decoding kernel or that of tiles; of packed sequences, each takes its own."""
    query, value = problem.query, problem.value
    dtype = statistics_dtype(query.dtype)
    of, lanes = _sizes(problem), lanes_in(dtype)
    most = max_decode_queries(of.heads, of.key_heads)
    packed = problem.query_starts is not None
    plans = [_decode_plan(problem, of, out, lse, most)] if packed or of.query_len <= most else []
    if of.query_len <= most:
        return plans
    plan = forward_plan(of, lanes)
    elements = forward_scratch(
        plan.tile, lanes, query.shape[3], value.shape[3], query.dtype in _ITEM_TYPES
    )
    fields = _fields(problem, of, out, lse)
    fields["tile"] = plan.tile
    fields["tasks_per_grab"] = plan.tasks_per_grab
    fields["max_decode_queries"] = most if packed else 0
    compiled_for, scratch_bytes = _compiled_for(query.dtype), elements * dtype.itemsize
    return [*plans, FORWARD.plan(compiled_for, plan.grabs, scratch_bytes, fields)]


def _decode_plan(
    problem: AttentionProblem, of: Sizes, out: Tensor, lse: Tensor | None, most: int
) -> Plan:
    """out and lse of a problem of at most `most` queries, or of the packed sequences that have
    no more: their bits are those of the same sequence alone."""
    dtype = statistics_dtype(problem.query.dtype)
    lanes, value_dim = lanes_in(dtype), problem.value.shape[3]
    plan = decode_plan(of)
    rows = of.heads // max(1, of.key_heads) * min(of.query_len, most)
    partials = plan.tasks * partial_elements(rows, lanes, value_dim) * dtype.itemsize
    chunks_done = 8 * of.batch * of.key_heads if plan.chunks > 1 else 0
    fields = _fields(problem, of, out, lse)
    fields["tile"], fields["tasks_per_grab"] = 0, 1
    fields["max_decode_queries"] = most
    fields["chunks"] = plan.chunks
    return DECODE.plan(
        dtype,
        plan.tasks,
        decode_scratch(rows, lanes, problem.query.shape[3], value_dim) * dtype.itemsize,
        fields,
        chunks_done + partials,
        chunks_done,
    )


def attention_backward(
    problem: AttentionProblem, inputs: BackwardInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, problem = problem, prepared(problem)
    query, key, value = problem.query, problem.key, problem.value
    dtype, half = statistics_dtype(query.dtype), query.dtype in _ITEM_TYPES
    grad_out, out = unit_last_stride(inputs.grad_out), unit_last_stride(inputs.out)
    lse, grad_lse, d_bias, delta = tensors = backward_tensors(given, inputs)
    of, lanes = _sizes(problem), lanes_in(dtype)
    head_dim, value_dim = query.shape[3], value.shape[3]
    row_bytes = (head_dim + value_dim) * dtype.itemsize
    plan = backward_plan(of, lanes, row_bytes, None if d_bias is None else d_bias.shape)
    chunked = plan.chunk_tasks > 1
    tiles = of.batch * of.heads * -(-of.query_len // plan.tile) if chunked else 0
    dq_semaphore, dq_accumulator = 8 * tiles, tiles * plan.tile * head_dim * dtype.itemsize
    elements = backward_scratch(
        *(plan.tile, lanes, plan.chunk_keys, head_dim, value_dim),
        *(half, problem.softcap is not None, chunked),
    )
    d_query, d_key, d_value = (empty_heads(x, x.shape[3]) for x in (query, key, value))
    by_grad_out = grad_out.stride()
    by_query, by_key, by_value = d_query.stride(), d_key.stride(), d_value.stride()
    fields = {
        **_fields(problem, of, out, lse),
        **_NO_BIAS_GRADIENT,
        "score_scale": problem.scale,
        "max_decode_queries": 0,
        "tile": plan.tile,
        "tasks_per_grab": plan.tasks_per_grab,
        "batch_tasks": plan.batch_tasks,
        "head_tasks": plan.head_tasks,
        "chunk_tasks": plan.chunk_tasks,
        "chunk_keys": plan.chunk_keys,
        "grad_out": grad_out.data_ptr(),
        "grad_out_batch": by_grad_out[0],
        "grad_out_head": by_grad_out[1],
        "grad_out_row": by_grad_out[2],
        "grad_lse": 0 if grad_lse is None else grad_lse.data_ptr(),
        "d_query": d_query.data_ptr(),
        "d_query_batch": by_query[0],
        "d_query_head": by_query[1],
        "d_query_row": by_query[2],
        "d_key": d_key.data_ptr(),
        "d_key_batch": by_key[0],
        "d_key_head": by_key[1],
        "d_key_row": by_key[2],
        "d_value": d_value.data_ptr(),
        "d_value_batch": by_value[0],
        "d_value_head": by_value[1],
        "d_value_row": by_value[2],
        "delta": 0 if delta is None else delta.data_ptr(),
    }
    if d_bias is not None:
        fields.update(_pairs("d_bias", d_bias))
        fields["d_bias_kind"] = bias_gradient_kind(of, d_bias.shape, d_bias.dtype == dtype)
        fields["d_bias_item_type"] = _ITEM_TYPES.get(d_bias.dtype, ITEM_COMPUTED)
    BACKWARD(
        _compiled_for(query.dtype),
        plan.grabs,
        elements * dtype.itemsize,
        fields,
        dq_semaphore + dq_accumulator,
        dq_semaphore,
    )
    return d_query, d_key, d_value, *tensors.of_bias_and_sinks(given)


def _compiled_for(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel is asked for: bfloat16 has a form of its own where the host can do it."""
    in_pairs = dtype == torch.bfloat16 and bfloat16_dots()
    return dtype if in_pairs else statistics_dtype(dtype)


def _sizes(problem: AttentionProblem) -> Sizes:
    batch, heads, query_len, key_len = problem.shape
    return Sizes(batch, heads, problem.key.shape[1], query_len, key_len)


def _fields(
    problem: AttentionProblem, of: Sizes, out: Tensor, lse: Tensor | None
) -> dict[str, float]:
    """The fields of every pass, but for those that a plan decides."""
    query, key, value, bias, alibi, alibi_offset, sinks, mask, _, softcap, dropout_p = problem[:11]
    by_query, by_key, by_value, by_out = query.stride(), key.stride(), value.stride(), out.stride()
    fields = {
        **_ABSENT,
        "query": query.data_ptr(),
        "query_batch": by_query[0],
        "query_head": by_query[1],
        "query_row": by_query[2],
        "key": key.data_ptr(),
        "key_batch": by_key[0],
        "key_head": by_key[1],
        "key_row": by_key[2],
        "value": value.data_ptr(),
        "value_batch": by_value[0],
        "value_head": by_value[1],
        "value_row": by_value[2],
        "out": out.data_ptr(),
        "out_batch": by_out[0],
        "out_head": by_out[1],
        "out_row": by_out[2],
        "lse": 0 if lse is None else lse.data_ptr(),
        "item_type": _ITEM_TYPES.get(query.dtype, ITEM_COMPUTED),
        "batch": of.batch,
        "heads": of.heads,
        "key_heads": of.key_heads,
        "query_len": of.query_len,
        "key_len": of.key_len,
        "head_dim": query.shape[3],
        "value_dim": value.shape[3],
        "query_rows": query.shape[2],
        "band_lower": -NO_BOUND if mask.band_lower is None else mask.band_lower,
        "band_upper": NO_BOUND if mask.band_upper is None else mask.band_upper,
        "batch_start": problem.batch_start,
        "scale": problem.scale * LOG2_E if softcap is None else problem.scale / softcap,
        "cap": 0.0 if softcap is None else softcap * LOG2_E,
        **dropout_fields(dropout_p, problem.seed),
    }
    if mask.band is not None:
        fields["band"] = mask.band.data_ptr()
    if mask.prefix_lengths is not None:
        fields["prefix_lengths"] = mask.prefix_lengths.data_ptr()
    if mask.key_lengths is not None:
        fields["key_lengths"] = mask.key_lengths.data_ptr()
    if mask.query_lengths is not None:
        fields["query_lengths"] = mask.query_lengths.data_ptr()
    if mask.query_documents is not None and mask.key_documents is not None:
        fields["query_documents"] = mask.query_documents.data_ptr()
        fields["query_documents_batch"] = mask.query_documents.stride(0)
        fields["key_documents"] = mask.key_documents.data_ptr()
        fields["key_documents_batch"] = mask.key_documents.stride(0)
    if mask.dense is not None:
        fields.update(_pairs("dense", mask.dense))
    if bias is not None:
        fields.update(_pairs("bias", bias))
        fields["bias_item_type"] = _ITEM_TYPES.get(bias.dtype, ITEM_COMPUTED)
    if alibi is not None and alibi_offset is not None:
        fields["alibi"], fields["alibi_offset"] = alibi.data_ptr(), alibi_offset.data_ptr()
        fields["alibi_batch"] = broadcast_strides(alibi)[0]
        fields["alibi_offset_batch"] = broadcast_strides(alibi_offset)[0]
    if sinks is not None:
        fields["sinks"] = sinks.data_ptr()
    if problem.query_starts is not None and problem.key_starts is not None:
        fields["query_starts"] = problem.query_starts.data_ptr()
        fields["key_starts"] = problem.key_starts.data_ptr()
    return fields


def _pairs(name: str, tensor: Tensor) -> dict[str, int]:
    """The fields of a tensor with an element for each pair of a query and a key."""
    batch, head, row, column = broadcast_strides(tensor)
    return {
        name: tensor.data_ptr(),
        f"{name}_batch": batch,
        f"{name}_head": head,
        f"{name}_row": row,
        f"{name}_column": column,
    }
