"""From an attention problem to its kernels: strides, allocations, and what is copied and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.layout import broadcast_strides, empty_heads, statistics_dtype
from ...ops.problem import AttentionProblem, BackwardInputs
from ..cpu_common.constants import ITEM_BFLOAT16, ITEM_COMPUTED, ITEM_FLOAT16, LOG2_E
from ..cpu_common.preparation import backward_tensors, empty_lse, prepared, unit_last_stride
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
from .fields import address, dropout_fields, heads, mask_fields, pairs
from .gemm import lanes_in
from .host import bfloat16_dots

_ITEM_TYPES = {torch.bfloat16: ITEM_BFLOAT16, torch.float16: ITEM_FLOAT16}


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
    compiled_for, half = _compiled_for(query.dtype), query.dtype in _ITEM_TYPES
    columns = query.shape[3] + value.shape[3]
    widens = half and compiled_for != query.dtype
    plan = forward_plan(of, lanes, columns * dtype.itemsize if widens else 0)
    kept = of.key_len if plan.keeps_wide else 0
    elements = forward_scratch(plan.tile, lanes, query.shape[3], value.shape[3], half, kept)
    fields = _fields(problem, of, out, lse)
    fields["tile"] = plan.tile
    fields["tasks_per_grab"] = plan.tasks_per_grab
    fields["max_decode_queries"] = most if packed else 0
    fields["keeps_wide"] = plan.keeps_wide
    return [*plans, FORWARD.plan(compiled_for, plan.grabs, elements * dtype.itemsize, fields)]


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
    fields = {
        **_fields(problem, of, out, lse),
        **heads(grad_out=grad_out, d_query=d_query, d_key=d_key, d_value=d_value),
        **pairs("d_bias", d_bias),
        "score_scale": problem.scale,
        "max_decode_queries": 0,
        "tile": plan.tile,
        "tasks_per_grab": plan.tasks_per_grab,
        "batch_tasks": plan.batch_tasks,
        "head_tasks": plan.head_tasks,
        "chunk_tasks": plan.chunk_tasks,
        "chunk_keys": plan.chunk_keys,
        "grad_lse": address(grad_lse),
        "delta": address(delta),
        "d_bias_kind": 0,
        "d_bias_item_type": 0,
    }
    if d_bias is not None:
        fields["d_bias_kind"] = bias_gradient_kind(of, d_bias.shape, d_bias.dtype == dtype)
        fields["d_bias_item_type"] = _item_type(d_bias)
    BACKWARD.plan(
        _compiled_for(query.dtype),
        plan.grabs,
        elements * dtype.itemsize,
        fields,
        dq_semaphore + dq_accumulator,
        dq_semaphore,
    ).run()
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
    fields = {
        **heads(query=query, key=key, value=value, out=out),
        **mask_fields(mask),
        **pairs("bias", bias),
        "lse": address(lse),
        "query_documents_batch": 0,
        "key_documents_batch": 0,
        "bias_item_type": ITEM_COMPUTED if bias is None else _item_type(bias),
        "alibi": address(alibi),
        "alibi_batch": 0 if alibi is None else broadcast_strides(alibi)[0],
        "alibi_offset": address(alibi_offset),
        "alibi_offset_batch": 0 if alibi_offset is None else broadcast_strides(alibi_offset)[0],
        "sinks": address(sinks),
        "query_starts": address(problem.query_starts),
        "key_starts": address(problem.key_starts),
        "item_type": _item_type(query),
        "batch": of.batch,
        "heads": of.heads,
        "key_heads": of.key_heads,
        "query_len": of.query_len,
        "key_len": of.key_len,
        "head_dim": query.shape[3],
        "value_dim": value.shape[3],
        "query_rows": query.shape[2],
        "batch_start": problem.batch_start,
        "scale": problem.scale * LOG2_E if softcap is None else problem.scale / softcap,
        "cap": 0.0 if softcap is None else softcap * LOG2_E,
        **dropout_fields(dropout_p, problem.seed),
    }
    if mask.query_documents is not None and mask.key_documents is not None:
        fields["query_documents_batch"] = mask.query_documents.stride(0)
        fields["key_documents_batch"] = mask.key_documents.stride(0)
    return fields


def _item_type(tensor: Tensor) -> int:
    return _ITEM_TYPES.get(tensor.dtype, ITEM_COMPUTED)
