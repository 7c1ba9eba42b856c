"""From a norm's problem to its kernels: layouts, allocations and grids."""

from __future__ import annotations

from torch import Tensor

from ...ops.layout import count_rows, rows_of, statistics_dtype
from ..fused_norms import Backward, Forward, FusedNorms, Results
from . import plans
from .arguments import contiguous, dropout, seed_on_device
from .norm_backward import norm_backward, norm_backward_row_means, norm_backward_sum_partials
from .norm_forward import norm_forward, norm_forward_blocked
from .rows import backward_tile, chunk_rows, forward_tile, stages

# The tile in which partial sums are added: many loads in flight, and blocks of columns enough.
_SUMMED_CHUNKS, _SUMMED_COLUMNS = 128, 32


def _forward(norm: Forward) -> Results:
    x, residual, weight, bias, eps, dropout_p, seed, subtract_mean = norm
    if not x.numel():
        return _without_values(x, residual is None, subtract_mean)
    result: Results = plans.run(
        _plan_forward,
        [
            *(rows_of(x)[0], None if residual is None else rows_of(residual)[0]),
            *(contiguous(weight), contiguous(bias), seed_on_device(seed, x)),
        ],
        (eps, dropout_p, subtract_mean),
    )
    return result


def _plan_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    subtract_mean: bool,
    *,
    launch: plans.Launch,
) -> Results:
    shape, columns, rows = x.shape, x.shape[-1], count_rows(x)
    y = x.new_empty(shape)
    rstd = x.new_empty(shape[:-1], dtype=statistics_dtype(x.dtype))
    mean = x.new_empty(rstd.shape, dtype=rstd.dtype) if subtract_mean else rstd
    total = y if residual is None else x.new_empty(shape)
    threshold, keep_scale, seed = dropout(dropout_p, seed)
    arguments = {
        "x": x,
        "x_row": rows_of(x)[1],
        "residual": residual,
        "residual_row": 0 if residual is None else rows_of(residual)[1],
        "weight": weight,
        "bias": bias,
        "y": y,
        "total": None if residual is None else total,
        "mean": mean if subtract_mean else None,
        "rstd": rstd,
        "rows": rows,
        "columns": columns,
        "eps": eps,
        "threshold": threshold,
        "keep_scale": keep_scale,
        "seed": seed,
    }
    tile = forward_tile(columns, x.dtype)
    config = {"COLUMNS": tile.columns, "num_warps": tile.warps}
    if columns <= tile.columns:
        programs = -(-rows // tile.rows)
        launch(norm_forward, [(programs, {"ROWS": tile.rows, **config})], arguments)
    else:
        launch(norm_forward_blocked, [(rows, config)], arguments)
    return y, total, mean, rstd


def _without_values(x: Tensor, alone: bool, subtract_mean: bool) -> Results:
    """The results of `_forward` for an input without columns or rows."""
    y = x.new_empty(x.shape)
    rstd = x.new_full(x.shape[:-1], float("nan"), dtype=statistics_dtype(x.dtype))
    return y, y if alone else x.new_empty(x.shape), rstd.clone() if subtract_mean else rstd, rstd


def _backward(norm: Backward) -> Results:
    x, grad_y, grad_total, mean, rstd, weight, bias, dropout_p, seed = norm
    if not x.numel():
        # Without any row there is no chunk: the gradients are the zeros of an empty sum.
        d_x = x.new_empty(x.shape if dropout_p > 0.0 else 0)
        d_weight, d_bias = (
            x.new_empty(0) if each is None else each.new_zeros(each.shape)
            for each in (weight, bias)
        )
        return d_x, x.new_empty(x.shape), d_weight, d_bias
    result: Results = plans.run(
        _plan_backward,
        [
            *(rows_of(x)[0], rows_of(grad_y)[0]),
            None if grad_total is None else rows_of(grad_total)[0],
            *(
                contiguous(mean),
                rstd.contiguous(),
                contiguous(weight),
                bias,
                seed_on_device(seed, x),
            ),
        ],
        (dropout_p,),
    )
    return result


def _plan_backward(
    x: Tensor,
    grad_y: Tensor,
    grad_total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    *,
    launch: plans.Launch,
) -> Results:
    columns, rows = x.shape[-1], count_rows(x)
    d_total = x.new_empty(x.shape)
    d_x = x.new_empty(x.shape if dropout_p > 0.0 else 0)
    d_weight = x.new_empty(0) if weight is None else x.new_empty(columns, dtype=weight.dtype)
    d_bias = x.new_empty(0) if bias is None else x.new_empty(columns, dtype=bias.dtype)
    tile = backward_tile(columns, x.dtype)
    blocks, chunk = -(-columns // tile.columns), chunk_rows(rows, tile)
    chunks = -(-rows // chunk)
    weight_partials, bias_partials = (
        None if parameter is None else rstd.new_empty((chunks, columns))
        for parameter in (weight, bias)
    )
    shared = {
        "x": x,
        "x_row": rows_of(x)[1],
        "grad_y": grad_y,
        "grad_y_row": rows_of(grad_y)[1],
        "mean": mean,
        "rstd": rstd,
        "weight": weight,
        "means": rstd.new_empty((rows, 2)) if blocks > 1 else None,
        "rows": rows,
        "columns": columns,
    }
    config = {"COLUMNS": tile.columns, "num_warps": tile.warps}
    if blocks > 1:
        launch(norm_backward_row_means, [(rows, config)], shared)
    threshold, keep_scale, seed = dropout(dropout_p, seed)
    inputs = 2 if grad_total is None else 3
    launch(
        norm_backward,
        [(chunks * blocks, {**config, "ROWS": tile.rows, "STAGES": stages(tile, x.dtype, inputs)})],
        {
            **shared,
            "grad_total": grad_total,
            "grad_total_row": 0 if grad_total is None else rows_of(grad_total)[1],
            "d_total": d_total,
            "d_x": d_x if dropout_p > 0.0 else None,
            "weight_partials": weight_partials,
            "bias_partials": bias_partials,
            "chunk_rows": chunk,
            "threshold": threshold,
            "keep_scale": keep_scale,
            "seed": seed,
        },
    )
    if weight is not None or bias is not None:
        sizes = {"CHUNKS": _SUMMED_CHUNKS, "COLUMNS": _SUMMED_COLUMNS, "num_warps": 8}
        launch(
            norm_backward_sum_partials,
            [(-(-columns // _SUMMED_COLUMNS), sizes)],
            {
                "weight_partials": weight_partials,
                "bias_partials": bias_partials,
                "d_weight": None if weight is None else d_weight,
                "d_bias": None if bias is None else d_bias,
                "chunks": chunks,
                "columns": columns,
            },
        )
    return d_x, d_total, d_weight, d_bias


norms = FusedNorms(_forward, _backward)
