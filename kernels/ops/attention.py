"""The operators `attention` and `attention_backward`: arguments, results, derivatives, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import second_order, unfused
from ..backends.reference.second_order import AttentionTangents
from .operator_checks import Checks
from .problem import AttentionProblem, BackwardInputs
from .spec import Argument, Named, Operator, Result, TensorSpec, Values, arguments_of, gradient_of

_PROBLEM = arguments_of(AttentionProblem)
_OUT, _LSE = TensorSpec("Bm Hq Lq Dv"), TensorSpec("Bm Hq Lq", "lse")
_BEFORE = (
    Argument("grad_out", "Tensor?", _OUT._replace(grad=True)),
    Argument("grad_lse", "Tensor?", _LSE._replace(grad=True)),
    Argument("out", "Tensor", _OUT),
    Argument("lse", "Tensor", _LSE),
    Argument("bias_grad", "bool"),
    Argument("sinks_grad", "bool"),
)
# not with packed sequences: they speak of the positions of one, or of what packing makes needless
_OF_ONE_SEQUENCE = (
    *("bias", "dense", "key_lengths", "query_lengths", "query_documents", "key_documents"),
)


def _independent(given: Named) -> tuple[str, ...]:
    if given["dropout_p"] > 0.0:  # counts batch elements and heads from the first
        return ()
    return ("B", "Hq") if given["query_starts"] is None else ("Hq",)


def _problem(given: Named) -> AttentionProblem:
    return AttentionProblem.from_flat(tuple(given[argument.name] for argument in _PROBLEM))


# --- what runs, and its derivatives ---------------------------------------------------------------


def _run_backward(
    backend: Any, problem: AttentionProblem, grad_out: Tensor | None, *rest: Any
) -> Values:
    grad_out = torch.zeros_like(rest[1]) if grad_out is None else grad_out
    gradients: Values = backend.attention_backward(problem, BackwardInputs(grad_out, *rest))
    return gradients


def _gradients(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    of_results = dict(zip(("grad_out", "grad_lse"), gradients, strict=True))
    asked = {"bias_grad": wanted["bias"], "sinks_grad": wanted["sinks"]}
    *of_heads, d_bias, d_sinks = call(
        "attention_backward", *ATTENTION_BACKWARD.flat(given | of_results | asked)
    )
    return *of_heads, d_bias if wanted["bias"] else None, d_sinks if wanted["sinks"] else None


def _second_order(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    problem, grad_out, grad_lse = _problem(given), given["grad_out"], given["grad_lse"]
    of_query, of_key, of_value, of_bias, of_sinks = gradients  # what was not asked for is empty
    tangents = AttentionTangents(
        *(of_query, of_key, of_value),
        of_bias if given["bias_grad"] else None,
        of_sinks if given["sinks_grad"] else None,
    )
    t_out, t_lse = second_order.attention_tangents(problem, tangents)
    *of_heads, d_bias, d_sinks = second_order.attention_second_order(
        problem, grad_out, grad_lse, tangents
    )
    return (
        None if grad_out is None else t_out,
        None if grad_lse is None else t_lse,
        *of_heads,
        None if problem.bias is None else d_bias,
        None if problem.sinks is None else d_sinks,
    )


# --- checks ---------------------------------------------------------------------------------------


def _check(checks: Checks) -> None:
    heads, key_heads = checks.sizes["Hq"], checks.sizes["Hkv"]
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        checks.fail("key", f"{key_heads} heads", f"a divisor of the query's {heads}")
    checks.together("query_documents", "key_documents")
    checks.together("alibi_slopes", "alibi_offset")
    checks.number("scale")
    checks.number("softcap", above=0)
    checks.dropout()
    if checks.given["batch_start"] < 0:
        checks.fail("batch_start", checks.given["batch_start"], "at least 0")


def _check_backward(checks: Checks) -> None:
    _check(checks)
    for name in ("bias", "sinks"):
        if checks.given[f"{name}_grad"] and checks.given[name] is None:
            checks.fail(f"{name}_grad", "True", f"False without {name}")


def _bind_batch(checks: Checks) -> None:
    """Packed sequences are the batch elements."""
    given, sizes = checks.given, checks.sizes
    sizes["B"] = sizes["Bm"]
    checks.together("query_starts", "key_starts")
    starts = given["query_starts"]
    if starts is None:
        return
    if sizes["Bm"] != 1:
        checks.fail("query", f"a batch of {sizes['Bm']}", "(1, Hq, total, D) of packed sequences")
    checks.starts("query_starts", sizes["Lq"], "longest_query")
    checks.starts("key_starts", sizes["Lk"], "longest_key")
    sizes["B"] = starts.shape[0] - 1
    for name in _OF_ONE_SEQUENCE:
        if given[name] is not None:
            checks.fail(name, type(given[name]).__name__, "None with packed sequences")


ATTENTION = Operator(
    name="attention",
    like="query",
    arguments=_PROBLEM,
    results=(Result("out", "query", _OUT), Result("lse", "query", _LSE)),
    split=lambda fields: (AttentionProblem.from_flat(fields), ()),
    run=lambda backend, problem: backend.attention(problem),
    unfused_backend=unfused,
    saves=(*(each.name for each in _PROBLEM if each.spec is not None), "out", "lse"),
    derivative=_gradients,
    independent=_independent,
    check=_check,
    bind_batch=_bind_batch,
)
ATTENTION_BACKWARD = Operator(
    name="attention_backward",
    like="query",
    arguments=(*_BEFORE, *_PROBLEM),
    results=(
        *(gradient_of(f"d_{name}", ATTENTION.argument(name)) for name in ("query", "key", "value")),
        gradient_of("d_bias", ATTENTION.argument("bias"), when="bias_grad"),
        gradient_of("d_sinks", ATTENTION.argument("sinks"), when="sinks_grad"),
    ),
    split=lambda fields: (
        AttentionProblem.from_flat(fields[len(_BEFORE) :]),
        fields[: len(_BEFORE)],
    ),
    run=_run_backward,
    unfused_backend=unfused,
    saves=("grad_out", "grad_lse", *(each.name for each in _PROBLEM if each.spec is not None)),
    derivative=_second_order,
    independent=_independent,
    check=_check_backward,
    bind_batch=_bind_batch,
)
