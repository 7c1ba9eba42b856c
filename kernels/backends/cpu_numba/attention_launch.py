"""From an attention problem to its kernels: strides, allocations, and what is copied and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.layout import empty_heads, saved_lse_dtype, statistics_dtype
from ...ops.problem import AttentionProblem
from ..cpu_common.constants import BLOCK_KEYS, CACHE_BYTES, CHUNK_KEYS, LOG2_E, NO_BOUND, SHORT_HEAD
from ..cpu_common.preparation import bias_gradient, prepared, unit_last_stride
from .attention_backward_blocks import PUT, PUT_BFLOAT16, PUT_FLOAT16, SUM, SUM_WIDE
from .attention_backward_kernels import BACKWARD
from .attention_backward_kernels import scratch_elements as backward_scratch
from .attention_decode import DECODE, most_queries, partial_elements
from .attention_decode import scratch_elements as decode_scratch
from .attention_forward import FORWARD
from .attention_forward import scratch_elements as forward_scratch
from .call import Plan
from .gemm import VECTORS, lanes_in
from .host import bfloat16_dots
from .threads import thread_count

_HALVES = {torch.bfloat16: 1, torch.float16: 2}


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    query = problem.query
    lse = query.new_empty(query.shape[:3], dtype=saved_lse_dtype(query.dtype))
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
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        (_plans[name],) = plans
    return out


_MOST_PLANS = 256
_plans: dict[tuple[Any, ...], Plan] = {}


def _plan_name(problem: AttentionProblem) -> tuple[Any, ...] | None:
    """All that a forward call depends on but the addresses of q, k, v; None where there is more."""
    query, key, value, bias, slopes, _, sinks, mask, scale, softcap, dropout_p = problem[:11]
    dense, key_lengths, query_lengths, documents, _, band, lower, upper = mask
    if dropout_p > 0.0 or not (
        bias is slopes is sinks is problem.query_starts is None
        and dense is key_lengths is query_lengths is documents is band is None
    ):
        return None
    by_query, by_key, by_value = query.stride(), key.stride(), value.stride()
    if not by_query[3] == by_key[3] == by_value[3] == 1:
        return None
    return (
        *(query.dtype, query.shape, key.shape, value.shape, by_query, by_key, by_value),
        *(scale, softcap, lower, upper, torch.get_num_threads()),
    )


def _forward_plans(problem: AttentionProblem, out: Tensor, lse: Tensor | None) -> list[Plan]:
    """The kernel of few queries or that of tiles; of packed sequences, each takes its own."""
    query, key, value = problem.query, problem.key, problem.value
    dtype = statistics_dtype(query.dtype)
    batch, heads, query_len, key_len = problem.shape
    few = most_queries(heads // max(1, key.shape[1]))
    packed = problem.query_starts is not None
    decoding = [_decode_plan(problem, out, lse, few)] if packed or query_len <= few else []
    if query_len <= few:
        return decoding
    tile = _tile_queries(dtype, query_len, batch * heads)
    elements = forward_scratch(
        tile, lanes_in(dtype), query.shape[3], value.shape[3], query.dtype in _HALVES
    )
    tiles = -(-query_len // tile)
    tasks = batch * heads * tiles
    run = max(1, tiles * _heads_at_once(batch * heads, max(query_len, key_len)))
    tiled = FORWARD.plan(
        _compiled_for(query.dtype),
        -(-tasks // run),
        elements * dtype.itemsize,
        (*_integers(problem, out, lse, tile, few if packed else 0), run),
        _reals(problem),
    )
    return [*decoding, tiled]


def _decode_plan(problem: AttentionProblem, out: Tensor, lse: Tensor | None, few: int) -> Plan:
    """out and lse of a problem of at most `few` queries, or of the packed sequences that have
    no more: their bits are those of the same sequence alone."""
    dtype = statistics_dtype(problem.query.dtype)
    batch, heads, query_len, key_len = problem.shape
    key_heads, value_dim = problem.key.shape[1], problem.value.shape[3]
    rows, lanes = heads // max(1, key_heads) * min(query_len, few), lanes_in(dtype)
    chunks = max(1, -(-key_len // CHUNK_KEYS))
    planes = batch * key_heads
    partial = planes * chunks * partial_elements(rows, lanes, value_dim) * dtype.itemsize
    finished = 8 * planes if chunks > 1 else 0
    return DECODE.plan(
        dtype,
        planes * chunks,
        decode_scratch(rows, lanes, problem.query.shape[3], value_dim) * dtype.itemsize,
        (
            *_integers(problem, out, lse, query_len, few),
            *(chunks, finished),
        ),
        _reals(problem),
        finished + partial,
        finished,
    )


def attention_backward(
    problem: AttentionProblem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    sinks_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, sinks = problem.bias, problem.sinks
    problem = prepared(problem)
    query, key, value = problem.query, problem.key, problem.value
    dtype, half = statistics_dtype(query.dtype), query.dtype in _HALVES
    grad_out, out = unit_last_stride(grad_out), unit_last_stride(out)
    lse = lse.to(torch.float64).contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float64).contiguous()
    d_bias, d_bias_kind = None, PUT
    if bias_grad and bias is not None:
        d_bias = bias_gradient(bias, problem.shape, dtype)
        d_bias_kind = _bias_gradient_kind(d_bias, problem.shape, dtype)
    delta = None
    if sinks_grad:
        # Rows that no tile of keys meets: out = 0, so that delta is -dlse.
        delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse

    batch, heads, query_len, key_len = problem.shape
    key_heads = key.shape[1]
    lanes = lanes_in(dtype)
    tile = min(VECTORS * lanes, _round_up(query_len, lanes))
    row_bytes = (query.shape[3] + value.shape[3]) * dtype.itemsize
    tasks = _backward_tasks(batch, key_heads, key_len, row_bytes, d_bias)
    _, _, chunks, chunk_keys = tasks
    tiles = batch * heads * -(-query_len // tile) if chunks > 1 else 0
    turns, sums = 8 * tiles, tiles * tile * query.shape[3] * dtype.itemsize
    d_query, d_key, d_value = (empty_heads(x, x.shape[3]) for x in (query, key, value))
    elements = backward_scratch(
        tile,
        lanes,
        chunk_keys,
        query.shape[3],
        value.shape[3],
        half,
        problem.softcap is not None,
        chunks > 1,
    )
    d_bias_strides = (0, 0, 0, 0) if d_bias is None else _broadcast_strides(d_bias)
    count = tasks[0] * tasks[1] * chunks
    whole = count == batch * key_heads  # a task is a head
    run = max(1, _heads_at_once(count, max(query_len, key_len))) if whole else 1
    BACKWARD(
        _compiled_for(query.dtype),
        -(-count // run),
        elements * dtype.itemsize,
        (
            *_integers(problem, out, lse, tile, 0),
            *(grad_out.data_ptr(), *grad_out.stride()[:3]),
            _address(grad_lse),
            *(d_query.data_ptr(), *d_query.stride()[:3]),
            *(d_key.data_ptr(), *d_key.stride()[:3]),
            *(d_value.data_ptr(), *d_value.stride()[:3]),
            *(_address(d_bias), *d_bias_strides),
            d_bias_kind,
            _address(delta),
            *(*tasks, run),
            turns,
        ),
        (*_reals(problem), problem.scale),
        turns + sums,
        turns,
    )
    if d_bias is not None and bias is not None:
        d_bias = d_bias.to(bias.dtype)
    d_sinks = None
    if delta is not None and sinks is not None:
        # -sum over batch and rows of exp(sink - lse) * delta
        taken = torch.exp(sinks.to(torch.float64).view(1, -1, 1) - lse)
        d_sinks = -(taken * delta).sum((0, 2)).to(sinks.dtype)
    return (
        *(d_query, d_key, d_value),
        query.new_empty(0) if d_bias is None else d_bias,
        query.new_empty(0) if d_sinks is None else d_sinks,
    )


def _bias_gradient_kind(d_bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How the kernel puts the gradient of a bias there, of scores of `shape`."""
    if tuple(d_bias.shape) == shape:
        return {torch.bfloat16: PUT_BFLOAT16, torch.float16: PUT_FLOAT16}.get(d_bias.dtype, PUT)
    in_tiles = tuple(d_bias.shape[2:]) == shape[2:]
    return SUM if in_tiles and d_bias.dtype == dtype else SUM_WIDE


def _compiled_for(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel is asked for: bfloat16 has a form of its own where the host can do it."""
    in_pairs = dtype == torch.bfloat16 and bfloat16_dots()
    return dtype if in_pairs else statistics_dtype(dtype)


def _tile_queries(dtype: torch.dtype, query_len: int, heads: int) -> int:
    """Queries a tile has: as many as the registers hold, fewer where threads would stay idle.

    (The bits of a result do not depend on it.)
    """
    lanes = lanes_in(dtype)
    tile = min(VECTORS * lanes, _round_up(query_len, lanes))
    threads = thread_count(heads * -(-query_len // lanes))
    while tile > lanes and heads * -(-query_len // tile) < threads:
        tile -= lanes
    return tile


def _heads_at_once(heads: int, length: int) -> int:
    """Heads that a thread takes at once: several short ones, so that one can ask memory for the
    next. Long heads are tiles that any thread may take."""
    return min(8, heads // (8 * thread_count(heads))) if length <= SHORT_HEAD else 0


def _backward_tasks(
    batch: int, key_heads: int, key_len: int, row_bytes: int, d_bias: Tensor | None
) -> tuple[int, int, int, int]:
    """How many tasks batch elements, heads of K and keys are divided into, and keys a chunk has.

    A bias that several heads or batch elements share has one gradient: the same task takes them
    all, one after another. Keys are divided where heads alone would leave threads idle, and where
    the sums of dK and dV, `row_bytes` a key, outgrow a core's cache, but not if all of them share a
    bias. (The bits of a result do not depend on it.)
    """
    batch_tasks, head_tasks = batch, key_heads
    if d_bias is not None:
        batch_tasks = 1 if d_bias.shape[0] == 1 else batch
        head_tasks = 1 if d_bias.shape[1] == 1 else key_heads
    tasks, blocks = batch_tasks * head_tasks, -(-key_len // BLOCK_KEYS)
    threads = thread_count(tasks * blocks)
    even = tasks == 0 or tasks >= 4 * threads or tasks % threads == 0
    # A chunk of several blocks reads its queries less often; four tasks a thread even out.
    chunk_blocks = blocks if even else min(4, max(1, tasks * blocks // (4 * threads)))
    if blocks * BLOCK_KEYS * row_bytes > 3 * CACHE_BYTES:
        chunk_blocks = min(chunk_blocks, max(1, CACHE_BYTES // (BLOCK_KEYS * row_bytes)))
    if blocks < 2 or chunk_blocks == blocks or (d_bias is not None and d_bias.shape[3] == 1):
        return batch_tasks, head_tasks, 1, max(1, blocks) * BLOCK_KEYS
    return batch_tasks, head_tasks, -(-blocks // chunk_blocks), chunk_blocks * BLOCK_KEYS


def _integers(
    problem: AttentionProblem, out: Tensor, lse: Tensor | None, tile: int, few: int
) -> tuple[int, ...]:
    query, key, value, mask = problem.query, problem.key, problem.value, problem.mask
    batch, heads, query_len, key_len = problem.shape
    bias, dense, seed = problem.bias, mask.dense, problem.seed
    bias_strides = (0, 0, 0, 0) if bias is None else _broadcast_strides(bias)
    dense_strides = (0, 0, 0, 0) if dense is None else _broadcast_strides(dense)
    slopes, offset = problem.alibi_slopes, problem.alibi_offset
    dropout = problem.dropout_p > 0.0 and seed is not None
    return (
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), _address(lse)),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3]),
        _HALVES.get(query.dtype, 0),
        *(batch, heads, key.shape[1], query_len, key_len, query.shape[3], value.shape[3]),
        tile,
        query.shape[2],
        _address(problem.query_starts),
        _address(problem.key_starts),
        few,
        -NO_BOUND if mask.band_lower is None else mask.band_lower,
        NO_BOUND if mask.band_upper is None else mask.band_upper,
        _address(mask.band),
        _address(mask.key_lengths),
        _address(mask.query_lengths),
        *_documents(mask.query_documents),
        *_documents(mask.key_documents),
        *(_address(bias), *bias_strides),
        0 if bias is None else _HALVES.get(bias.dtype, 0),
        *(_address(dense), *dense_strides),
        *((0, 0) if slopes is None else (slopes.data_ptr(), _broadcast_strides(slopes)[0])),
        *((0, 0) if offset is None else (offset.data_ptr(), _broadcast_strides(offset)[0])),
        _address(problem.sinks),
        int(dropout),
        # p = 1 wants 2**32, one more than a word holds; keep_scale = 0 drops what is left
        min(round(problem.dropout_p * 2**32), 2**32 - 1),
        int(seed) if dropout and seed is not None else 0,
        problem.batch_start,
    )


def _reals(problem: AttentionProblem) -> tuple[float, float, float]:
    cap, dropout_p = problem.softcap, problem.dropout_p
    keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    if cap is None:
        return problem.scale * LOG2_E, keep_scale, 0.0
    return problem.scale / cap, keep_scale, cap * LOG2_E


def _documents(ids: Tensor | None) -> tuple[int, int]:
    return (0, 0) if ids is None else (ids.data_ptr(), ids.stride(0))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 for every dimension of size 1."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _round_up(value: int, multiple: int) -> int:
    return max(multiple, -(-value // multiple) * multiple)
