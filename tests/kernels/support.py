"""Running attention and its oracle on the same arguments, and the tolerance between them.

The oracle is `naive_attention` under autograd with float64 inputs, every mask written out by
`Mask.dense` and ALiBi by `ALiBi.dense`: it shares neither the mask structures nor the hand-written
backward with what it judges. `test_oracle.py` holds it to a few lines of pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rowmax.kernels import ALiBi, Dense, Mask, attention
from rowmax.kernels.functional import attention_problem
from rowmax.kernels.problem import AttentionProblem
from rowmax.kernels.reference import naive_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Arguments:
    """One call of `attention`, with the gradients that its outputs receive."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None = None
    bias: Tensor | ALiBi | None = None
    sinks: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Lk)."""
        batch, heads, query_len, _ = self.q.shape
        return batch, heads, query_len, self.k.shape[2]

    def differentiable(self) -> dict[str, Any]:
        tensors = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "sinks": self.sinks}
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}

    def call(self, backend: str) -> tuple[Tensor, Tensor]:
        return attention(
            self.q,
            self.k,
            self.v,
            mask=self.mask,
            bias=self.bias,
            sinks=self.sinks,
            return_lse=True,
            backend=backend,
            **self.options,
        )

    def to(self, dtype: torch.dtype) -> Arguments:
        """The same values in another dtype."""
        tensors = self.differentiable() | {"grad_out": self.grad_out, "grad_lse": self.grad_lse}
        cast: dict[str, Any] = {
            name: value.detach().to(dtype) for name, value in tensors.items() if value is not None
        }
        return replace(self, **cast)


def random_gradients(arguments: Arguments, generator: torch.Generator) -> Arguments:
    """`arguments` with random gradients for out and lse."""
    q, v = arguments.q, arguments.v
    grad_out = torch.randn((*q.shape[:3], v.shape[3]), generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(q.shape[:3], generator=generator, dtype=torch.float64)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return replace(arguments, grad_out=grad_out.to(q), grad_lse=grad_lse.to(q.device, lse_dtype))


def run(backend: str, arguments: Arguments) -> Results:
    """out, lse and, where the arguments hold gradients of the outputs, d_q, d_k, d_v, ..."""
    leaves = {
        name: value.detach().requires_grad_() for name, value in arguments.differentiable().items()
    }
    out, lse = replace(arguments, **leaves).call(backend)
    return _with_gradients(arguments, leaves, out, lse)


def naive(arguments: Arguments) -> Results:
    """The naive path under autograd, in the dtype of the arguments."""
    leaves = {
        name: value.detach().contiguous().requires_grad_()
        for name, value in arguments.differentiable().items()
    }
    result = naive_attention(naive_problem(replace(arguments, **leaves)))
    return _with_gradients(arguments, leaves, result.out.to(arguments.q.dtype), result.lse)


def oracle(arguments: Arguments) -> Results:
    return naive(arguments.to(torch.float64))


def naive_problem(arguments: Arguments) -> AttentionProblem:
    """The problem with its mask and ALiBi written out as dense tensors."""
    mask, bias = arguments.mask, arguments.bias
    if isinstance(mask, Mask):
        mask = Dense(mask.dense(*arguments.shape))
    if isinstance(bias, ALiBi):
        slopes = bias.slopes.to(torch.promote_types(arguments.q.dtype, torch.float32))
        bias = replace(bias, slopes=slopes).dense(*arguments.shape)
    options = {"scale": None, "softcap": None, "dropout_p": 0.0, "seed": None, **arguments.options}
    q, k, v, sinks = arguments.q, arguments.k, arguments.v, arguments.sinks
    return attention_problem(q, k, v, mask, bias, sinks=sinks, draw_seed=True, **options)


def _with_gradients(
    arguments: Arguments, leaves: dict[str, Tensor], out: Tensor, lse: Tensor
) -> Results:
    results = {"out": out.detach(), "lse": lse.detach()}
    if arguments.grad_out is not None and arguments.grad_lse is not None:
        grads = torch.autograd.grad(
            (out, lse),
            tuple(leaves.values()),
            (arguments.grad_out, arguments.grad_lse.to(lse.dtype)),
        )
        results |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


# --- the tolerance --------------------------------------------------------------------------------

SUMMATION = 8  # roundings of a long sum, in units of eps times the sum of the terms' magnitudes


def assert_parity(got: Results, arguments: Arguments) -> None:
    """Every tensor of `got` agrees with the float64 oracle within the tolerance of the data.

    For the largest error and for the root mean square of all errors alike,

        error(got) <= 2 * error(naive path in the same dtype)
                      + eps(result's dtype) * |oracle| + SUMMATION * eps(float32 or 64) * magnitude

    where `magnitude` is what the sums would be if no term cancelled another (`magnitudes`): a
    lucky naive path, exact on a tiny case, would otherwise demand exactness. Where the oracle is
    not finite (lse = -inf), `got` must be the same; NaN never passes.
    """
    expected = oracle(arguments)
    plain = naive(arguments)
    terms = magnitudes(arguments)
    computed = torch.promote_types(arguments.q.dtype, torch.float32)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert_close(name, tensor, expected[name], plain[name], terms[name], computed)


def assert_close(
    name: str,
    got: Tensor,
    expected: Tensor,
    plain: Tensor,
    magnitude: Tensor,
    computed: torch.dtype,
) -> None:
    """The rule of `assert_parity` for one tensor, whose sums are `computed` in that dtype."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}"
    wide = got.to(torch.float64)
    finite = torch.isfinite(expected)
    assert torch.equal(wide[~finite], expected[~finite]), f"{name}: differs where not finite"
    assert torch.isfinite(wide[finite]).all(), f"{name}: NaN or infinity"
    if not finite.any():
        return
    error = (wide - expected)[finite]
    plain_error = (plain.to(torch.float64) - expected)[finite]
    stored = torch.finfo(got.dtype)
    rounding = stored.eps * expected[finite].abs() + stored.tiny  # which covers underflow
    rounding = rounding + SUMMATION * torch.finfo(computed).eps * magnitude[finite]
    for norm, of in (
        ("largest", lambda t: t.abs().max()),
        ("rms", lambda t: t.square().mean().sqrt()),
    ):
        limit = 2 * of(plain_error) + of(rounding)
        assert of(error) <= limit, (
            f"{name}: {norm} error {of(error):.3e} > {limit:.3e}, the naive path's is "
            f"{of(plain_error):.3e}, of values up to {expected[finite].abs().max():.3e}"
        )


def magnitudes(arguments: Arguments) -> Results:
    """For each result, its sum with every term replaced by its magnitude, in float64.

    A weight exp(score - max) carries the rounding of its score, so its relative error grows with
    the magnitude of the scores in its row: the factor 1 + max_j |q| @ |k_j| * scale + |bias|.
    """
    arguments = arguments.to(torch.float64)
    problem = naive_problem(arguments)
    result = naive_attention(problem)
    query, key, value = result.query.abs(), result.key.abs(), result.value.abs()
    heads, key_heads = query.shape[1], arguments.k.shape[1]
    score = abs(problem.scale) * (query @ key.transpose(-1, -2))
    if problem.bias is not None:
        score = score + problem.bias.abs().expand(score.shape)
    if problem.sinks is not None:
        score = score + problem.sinks.abs().view(1, -1, 1, 1)
    score = torch.where(result.weights > 0, score, 0.0)
    row = 1.0 + (score.amax(-1, keepdim=True) if score.shape[-1] else score.sum(-1, keepdim=True))
    weights = result.weights * row
    finite_lse = result.lse.masked_fill(result.lse == -torch.inf, 0.0)
    terms = {"out": (weights * result.keep) @ value, "lse": row.squeeze(-1) + finite_lse.abs()}
    if arguments.grad_out is None or arguments.grad_lse is None:
        return terms
    d_out = arguments.grad_out.abs()
    d_weights = (d_out @ value.transpose(-1, -2)) * result.keep
    delta = (d_weights * result.weights).sum(-1, keepdim=True) + arguments.grad_lse.abs().unsqueeze(
        -1
    )
    d_shifted = weights * (d_weights + delta)
    d_scores = d_shifted * abs(problem.scale)

    def grouped(gradient: Tensor) -> Tensor:
        if heads == key_heads:
            return gradient
        batch, _, length, dim = gradient.shape
        return gradient.view(batch, key_heads, heads // key_heads, length, dim).sum(2)

    terms["d_q"] = d_scores @ key
    terms["d_k"] = grouped(d_scores.transpose(-1, -2) @ query)
    terms["d_v"] = grouped((weights * result.keep).transpose(-1, -2) @ d_out)
    if isinstance(arguments.bias, Tensor):
        bias = arguments.bias
        terms["d_bias"] = d_shifted.sum_to_size((1,) * (4 - bias.dim()) + bias.shape).view(
            bias.shape
        )
    if problem.sinks is not None:
        taken = torch.exp(problem.sinks.view(1, -1, 1) - finite_lse)
        terms["d_sinks"] = (taken * (row * delta).squeeze(-1)).sum((0, 2))
    return terms
