"""From an attention problem to its kernels: grids, strides, allocations, and what is copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...api.masks import MaskStructure
from ...ops.layout import broadcast_strides, empty_heads, saved_lse_dtype, statistics_dtype
from ...ops.problem import AttentionProblem, BackwardInputs
from . import plans
from .arguments import contiguous, dropout, seed_on_device
from .attention_backward_bias import backward_dbias
from .attention_backward_kernels import backward_dkdv, backward_dq, backward_preprocess
from .attention_decode import CHUNK, combine, decode, splits_keys
from .attention_forward import forward
from .attention_tiles import PAIRS_AT_ONCE
from .configs import candidates, launch_config, may_have_empty_rows, precision

_LOG2_E = math.log2(math.e)
_NO_BOUND = 2**30
# Divisors of the strides of a tensor's rows: the kernels are compiled for them.
_ALIGNMENTS = {size: tl.constexpr(size) for size in (1, 2, 4, 8, 16)}


# (kernel, problem, extent, arguments): runs `kernel` once for each tile of (queries, keys, planes).
# A dimension of the extent that is 1 is not divided.
Launch = Callable[[Any, AttentionProblem, tuple[int, int, int], dict[str, Any]], None]


def _with_configs(launch: plans.Launch) -> Launch:
    """`launch` with the table's configs for each problem."""

    def launch_with_configs(
        kernel: Any,
        problem: AttentionProblem,
        extent: tuple[int, int, int],
        arguments: dict[str, Any],
    ) -> None:
        configs = candidates(kernel.fn.__name__, problem)
        launch(kernel, (launch_config(kernel, extent, config) for config in configs), arguments)

    return launch_with_configs


launch_kernel = _with_configs(plans.launch_now)


def attention(problem: AttentionProblem, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """out and lse; `launch`, if given, launches every kernel in place of the plans."""
    if launch is not None:
        return _attention(_with_readable_tensors(problem), launch=launch)
    out, lse = plans.run(_planned_attention, *_flatten(problem), _unflatten)
    return out, lse


def _planned_attention(problem: AttentionProblem, *, launch: plans.Launch) -> tuple[Tensor, Tensor]:
    return _attention(problem, launch=_with_configs(launch))


def _attention(problem: AttentionProblem, *, launch: Launch) -> tuple[Tensor, Tensor]:
    query, value = problem.query, problem.value
    out = empty_heads(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=saved_lse_dtype(query.dtype))
    batch, heads, query_len, key_len = problem.shape
    key_heads = problem.key.shape[1]
    if key_heads and splits_keys(query_len, heads // key_heads, key_len):
        _decode(problem, out, lse, launch)
        return out, lse
    launch(
        forward,
        problem,
        (query_len, 1, heads * batch),
        {
            "out": _rows(out),
            "lse": lse,
            "sinks": problem.sinks,
            "NEGATIVE": problem.scale < 0.0,
            **_packed(problem),
            **_tensors(problem),
            **_common(problem),
            **_constants(problem),
        },
    )
    return out, lse


def _decode(problem: AttentionProblem, out: Tensor, lse: Tensor, launch: Launch) -> None:
    """out and lse with the keys split over programs."""
    batch, heads, query_len, key_len = problem.shape
    key_heads, value_dim = problem.key.shape[1], problem.value.shape[3]
    group, chunks = heads // key_heads, triton.cdiv(key_len, CHUNK)
    rows, dtype = group * query_len, statistics_dtype(out.dtype)
    partial = out.new_empty((batch, key_heads, chunks, rows, value_dim), dtype=dtype)
    maxima, sums = out.new_empty((2, batch, key_heads, chunks, rows), dtype=dtype)
    common, constants = _common(problem), _constants(problem)
    shared = {
        "partial": partial,
        "maxima": maxima,
        "sums": sums,
        "chunks": chunks,
        "GROUP": group,
        "packed": _packed(problem)["packed"],
    }
    keep_scale = common.pop("keep_scale")
    launch(
        decode,
        problem,
        (rows, 1, chunks * key_heads * batch),
        {
            **shared,
            "CHUNK": CHUNK,
            **_tensors(problem),
            **common,
            **{name: constants[name] for name in constants if name != "HAS_LOWER"},
        },
    )
    launch(
        combine,
        problem,
        (1, 1, query_len * heads * batch),
        {
            **shared,
            "out": _rows(out),
            "lse": lse,
            "sinks": problem.sinks,
            "query_rows": problem.query.shape[2],
            "keep_scale": keep_scale,
            **{name: common[name] for name in ("heads", "key_heads", "query_len")},
            **{name: constants[name] for name in ("VALUE_DIM", "BLOCK_DV")},
        },
    )


def attention_out(problem: AttentionProblem) -> Tensor:
    return attention(problem)[0]


def attention_backward(
    problem: AttentionProblem, inputs: BackwardInputs, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    bias = problem.bias
    d_bias = None
    if inputs.bias_grad and bias is not None:
        d_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    grad_out, grad_lse, out, lse, _, sinks_grad = inputs
    lse = lse.contiguous()
    others = (_readable(grad_out), contiguous(grad_lse), _readable(out), lse, d_bias)
    if launch is not None:
        results = _attention_backward(_with_readable_tensors(problem), *others, launch=launch)
    else:
        planned = _planned_with_delta if sinks_grad else _planned_backward
        results = plans.run(planned, *_flatten(problem, *others), _unflatten)
    d_sinks = _sinks_gradient(problem, lse, results[3]) if sinks_grad else None
    return *results[:3], d_bias, d_sinks


def _planned_backward(*arguments: Any, launch: plans.Launch) -> tuple[Tensor, ...]:
    return _planned_with_delta(*arguments, launch=launch)[:3]


def _planned_with_delta(*arguments: Any, launch: plans.Launch) -> tuple[Tensor, ...]:
    return _attention_backward(*arguments, launch=_with_configs(launch))


def _attention_backward(
    problem: AttentionProblem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_bias: Tensor | None,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_query, d_key, d_value and delta; d_bias, if not None, must be zeros and is written."""
    query, key, value = problem.query, problem.key, problem.value
    d_query, d_key, d_value = (empty_heads(x, x.shape[3]) for x in (query, key, value))
    dtype = statistics_dtype(query.dtype)
    lse_log2 = torch.empty_like(lse, dtype=dtype)
    lse_log2_low = None if lse.dtype == dtype else torch.empty_like(lse_log2)
    delta = torch.empty_like(lse_log2)
    shared = d_bias is not None and tuple(d_bias.shape) != problem.shape

    batch, heads, query_len, key_len = problem.shape
    constants = _constants(problem)
    arguments = {
        "grad_out": _rows(grad_out),
        "lse_log2": lse_log2,
        "lse_log2_low": lse_log2_low,
        "delta": delta,
        "scale": problem.scale,
        "EMPTY_ROWS": may_have_empty_rows(problem),
        **_tensors(problem),
        **_common(problem),
        **constants,
    }
    launch(
        backward_preprocess,
        problem,
        (query_len, 1, heads * batch),
        {
            "grad_out": _rows(grad_out),
            "out": _rows(out),
            "lse": lse,
            "grad_lse": grad_lse,
            "lse_log2": lse_log2,
            "lse_log2_low": lse_log2_low,
            "delta": delta,
            "heads": heads,
            "query_len": query_len,
            **_packed(problem),
            "VALUE_DIM": constants["VALUE_DIM"],
            "BLOCK_DV": constants["BLOCK_DV"],
        },
    )
    key_heads = key.shape[1]
    launch(
        backward_dkdv,
        problem,
        (1, key_len, key_heads * batch),
        {
            "d_key": _rows(d_key),
            "d_value": _rows(d_value),
            "GROUP": heads // key_heads if key_heads else 1,
            **_packed(problem),
            **arguments,
        },
    )
    unshared = None if shared else d_bias
    launch(
        backward_dq,
        problem,
        (query_len, 1, heads * batch),
        {
            "d_query": _rows(d_query),
            "d_bias": _broadcast(unshared, problem),
            **_packed(problem),
            **arguments,
        },
    )
    if shared and d_bias is not None:
        full = [size > 1 for size in d_bias.shape]
        launch(
            backward_dbias,
            problem,
            (d_bias.shape[2], d_bias.shape[3], d_bias.shape[0] * d_bias.shape[1]),
            {
                "d_bias": d_bias,
                "batches": batch,
                **dict(
                    zip(("EACH_BATCH", "EACH_HEAD", "EACH_QUERY", "EACH_KEY"), full, strict=True)
                ),
                **arguments,
            },
        )
    return d_query, d_key, d_value, delta


def _sinks_gradient(problem: AttentionProblem, lse: Tensor, delta: Tensor) -> Tensor | None:
    """-sum over batch and rows of exp(sink - lse) * delta."""
    sinks = problem.sinks
    if sinks is None:
        return None
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # rows that attend nothing
    taken = torch.exp((sinks.to(lse.dtype).view(1, -1, 1) - lse).clamp(max=0.0))
    return -(taken * delta).sum((0, 2)).to(sinks.dtype)


_TENSOR = object()  # stands where a problem has one


def _flatten(
    problem: AttentionProblem, *others: Tensor | None
) -> tuple[list[Tensor | None], tuple[Any, ...], str | None]:
    """The tensors of a call in a fixed order, its constants, and torch's setting for products."""
    query = problem.query
    setting = torch.get_float32_matmul_precision() if query.dtype == torch.float32 else None
    constants: tuple[Any, ...] = problem[3:]
    if problem.has_heads_only():
        return [*problem[:3], *others], constants, setting
    fields = problem.flat()
    tensors = [field for field in fields if isinstance(field, Tensor)]
    constants = tuple([_TENSOR if isinstance(field, Tensor) else field for field in fields[3:]])
    return [*tensors, *others], constants, setting


def _unflatten(tensors: Sequence[Tensor | None], constants: tuple[Any, ...]) -> tuple[Any, ...]:
    """The problem, with readable tensors, and the other tensors: the inverse of `_flatten`."""
    remaining = iter(tensors)
    heads = [next(remaining) for _ in range(3)]
    fields = (*heads, *[next(remaining) if field is _TENSOR else field for field in constants])
    whole = any(isinstance(field, MaskStructure) for field in constants)
    problem = AttentionProblem._make(fields) if whole else AttentionProblem.from_flat(fields)
    return _with_readable_tensors(problem), *remaining


def _with_readable_tensors(problem: AttentionProblem) -> AttentionProblem:
    """The problem with every tensor in a layout that the kernels can read."""
    mask = problem.mask
    return problem._replace(
        query=_readable(problem.query),
        key=_readable(problem.key),
        value=_readable(problem.value),
        mask=mask._replace(
            band=contiguous(mask.band),
            prefix_lengths=contiguous(mask.prefix_lengths),
            key_lengths=contiguous(mask.key_lengths),
            query_lengths=contiguous(mask.query_lengths),
            query_documents=_in_rows(mask.query_documents),
            key_documents=_in_rows(mask.key_documents),
        ),
        sinks=contiguous(problem.sinks),
        seed=seed_on_device(problem.seed, problem.query),
    )


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous and 32-bit offsets reach all; or a copy."""
    near = tensor.shape[2] * abs(tensor.stride(2)) < 2**31
    return tensor if tensor.stride(3) == 1 and near else tensor.contiguous()


def _in_rows(ids: Tensor | None) -> Tensor | None:
    return ids if ids is None or ids.stride(1) == 1 else ids.contiguous()


def _rows(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride()[:3]
    return (tensor, *strides, _ALIGNMENTS[math.gcd(16, *strides)])


def _broadcast(tensor: Tensor | None, problem: AttentionProblem) -> tuple[Any, ...] | None:
    """The tensor, its strides (0 for dimensions of size 1), and a 1 if keys are read in chunks.

    Keys are read in chunks of PAIRS_AT_ONCE where every row is made of whole, aligned chunks: a
    case that Triton tells apart anyway, so it costs no further compilation. Only half types do so,
    since the other ones' products fill the registers by themselves.
    """
    if tensor is None:
        return None
    strides, size = broadcast_strides(tensor), PAIRS_AT_ONCE.value
    whole = strides[3] == 1 and math.gcd(size, tensor.shape[3], *strides[:3]) == size
    return (tensor, *strides, 1) if whole and problem.query.itemsize == 2 else (tensor, *strides)


def _packed(problem: AttentionProblem) -> dict[str, Any]:
    """The starts of packed sequences, and the rows of lse per head."""
    starts = (problem.query_starts, problem.key_starts)
    return {
        "packed": None if problem.query_starts is None else starts,
        "query_rows": problem.query.shape[2],
    }


def _tensors(problem: AttentionProblem) -> dict[str, Any]:
    return {name: _rows(getattr(problem, name)) for name in ("query", "key", "value")}


def _common(problem: AttentionProblem) -> dict[str, Any]:
    """The arguments that every attention kernel takes."""
    mask = problem.mask
    _, heads, query_len, key_len = problem.shape
    documents: tuple[Any, ...] = (None, None)
    if mask.query_documents is not None and mask.key_documents is not None:
        documents = tuple(
            (ids, ids.stride(0)) for ids in (mask.query_documents, mask.key_documents)
        )
    alibi = None
    if problem.alibi_slopes is not None and problem.alibi_offset is not None:
        slopes, offset = problem.alibi_slopes, problem.alibi_offset
        alibi = (slopes, *broadcast_strides(slopes), offset, *broadcast_strides(offset))
    cap = problem.softcap
    threshold, keep_scale, seed = dropout(problem.dropout_p, problem.seed)
    return {
        "band_lower": -_NO_BOUND if mask.band_lower is None else max(mask.band_lower, -_NO_BOUND),
        "band_upper": _NO_BOUND if mask.band_upper is None else min(mask.band_upper, _NO_BOUND),
        "mask": (
            mask.band,
            mask.key_lengths,
            mask.query_lengths,
            *documents,
            _broadcast(mask.dense, problem),
            mask.prefix_lengths,
        ),
        "bias": _broadcast(problem.bias, problem),
        "alibi": alibi,
        "seed": seed,
        "threshold": threshold,
        "keep_scale": keep_scale,
        "batch_start": problem.batch_start,
        "score_factor": problem.scale * _LOG2_E if cap is None else problem.scale / cap,
        "cap_factor": 0.0 if cap is None else cap * _LOG2_E,
        "heads": heads,
        "key_heads": problem.key.shape[1],
        "query_len": query_len,
        "key_len": key_len,
    }


def _constants(problem: AttentionProblem) -> dict[str, Any]:
    """The constexpr arguments of an attention kernel."""
    mask, dtype = problem.mask, problem.query.dtype
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    return {
        "DTYPE": tl.float64 if statistics_dtype(dtype) == torch.float64 else tl.float32,
        "HAS_LOWER": mask.band_lower is not None or mask.band is not None,
        "ARBITRARY_MASK": (
            mask.dense is not None or mask.query_documents is not None or problem.bias is not None
        ),
        "DROPOUT": problem.dropout_p > 0.0,
        "SOFTCAP": problem.softcap is not None,
        "PRECISION": precision(dtype),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
    }
