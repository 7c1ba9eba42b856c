"""One call of attention, the naive path and the float64 oracle of it, and how far its sums reach.

The oracle is `naive_attention` under autograd with float64 inputs, every mask written out by
`Mask.dense` and ALiBi by `ALiBi.dense`: it shares neither the mask structures nor any hand-written
backward with what it judges. `high_precision.py` holds it to 50 digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..biases import ALiBi
from ..functional import attention_problem
from ..masks import Dense, Mask
from ..problem import AttentionProblem
from ..reference import naive_attention

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Arguments:
    """One call of `attention`, with the gradients that its outputs receive.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv); grad_out like the output, grad_lse
    (B, Hq, Lq), or None where what is judged returns no lse; neither where no gradient is wanted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None = None
    bias: Tensor | ALiBi | None = None
    sinks: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)  # scale, softcap, dropout_p, seed
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Lk)."""
        batch, heads, query_len, _ = self.q.shape
        return batch, heads, query_len, self.k.shape[2]

    def differentiable(self) -> dict[str, Tensor]:
        tensors = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "sinks": self.sinks}
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}

    def leaves(self) -> Arguments:
        """The same call, each of whose differentiable tensors starts a graph of its own."""
        fresh: dict[str, Any] = {
            name: value.detach().requires_grad_() for name, value in self.differentiable().items()
        }
        return replace(self, **fresh)

    def to(self, dtype: torch.dtype) -> Arguments:
        """The same values in another dtype."""
        tensors = self._tensors()
        cast: dict[str, Any] = {
            name: value.detach().to(dtype) for name, value in tensors.items() if value is not None
        }
        return replace(self, **cast)

    def on(self, device: torch.device) -> Arguments:
        """The same call with all its tensors on `device`."""
        if self.q.device == device:
            return self
        moved: dict[str, Any] = {
            name: value.detach().to(device)
            for name, value in self._tensors().items()
            if value is not None
        }
        if isinstance(self.bias, ALiBi):
            moved["bias"] = _moved(self.bias, device)
        return replace(self, mask=mask_on(device, self.mask), **moved)

    def _tensors(self) -> dict[str, Tensor | None]:
        gradients = {"grad_out": self.grad_out, "grad_lse": self.grad_lse}
        return {**self.differentiable(), **gradients}


def mask_on(device: torch.device, mask: Mask | Tensor | None) -> Mask | Tensor | None:
    """`mask` with its tensors on `device`."""
    if mask is None or isinstance(mask, Tensor):
        return None if mask is None else mask.to(device)
    joined: Mask | None = None
    for part in mask.parts():
        moved = _moved(part, device)
        joined = moved if joined is None else joined & moved
    return joined


def _moved(value: Any, device: torch.device) -> Any:
    fields = {
        name: content.to(device) if isinstance(content, Tensor) else content
        for name, content in vars(value).items()
    }
    return type(value)(**fields)


def random_gradients(
    arguments: Arguments, generator: torch.Generator, *, with_lse: bool = True
) -> Arguments:
    """`arguments` with random gradients for out and lse."""
    q, v = arguments.q, arguments.v
    grad_out = torch.randn((*q.shape[:3], v.shape[3]), generator=generator, dtype=torch.float64)
    arguments = replace(arguments, grad_out=grad_out.to(q))
    if not with_lse:
        return arguments
    grad_lse = torch.randn(q.shape[:3], generator=generator, dtype=torch.float64)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return replace(arguments, grad_lse=grad_lse.to(q.device, lse_dtype))


def gradients_of(arguments: Arguments, out: Tensor, lse: Tensor | None) -> Results:
    """out, lse and, where the arguments hold gradients of the outputs, d_q, d_k, d_v, ..."""
    results = {"out": out.detach()}
    if lse is not None:
        results["lse"] = lse.detach()
    if arguments.grad_out is None:
        return results
    outputs, received = [out], [arguments.grad_out]
    if lse is not None and arguments.grad_lse is not None:
        outputs.append(lse)
        received.append(arguments.grad_lse.to(lse.dtype))
    leaves = arguments.differentiable()
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), received)
    return results | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def naive(arguments: Arguments) -> Results:
    """The naive path under autograd, in the dtype of the arguments (sums in float32 or wider).

    What it hands from its forward to its backward pass is stored in that dtype, as by every path
    that keeps out and lse (Dao et al. 2022, algorithm 4): row by row, `sum(d_out * out)` is of the
    rounded out, which is the same as a gradient of lse less by `sum(d_out * (rounded - out))`.
    """
    contiguous: dict[str, Any] = {
        name: value.detach().contiguous() for name, value in arguments.differentiable().items()
    }
    leaves = replace(arguments, **contiguous).leaves()
    result = naive_attention(naive_problem(leaves))
    out = result.out.to(arguments.q.dtype)
    if arguments.grad_out is None:
        return {"out": out.detach(), "lse": result.lse.detach()}
    rounded = ((out - result.out) * arguments.grad_out).sum(-1).detach()
    given = arguments.grad_lse
    kept = -rounded if given is None else given.to(rounded.dtype) - rounded
    masked = kept.masked_fill(result.lse == -torch.inf, 0.0)
    found = gradients_of(replace(leaves, grad_lse=masked), out, result.lse)
    if given is None:  # lse is no result of what is judged
        del found["lse"]
    return found


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


def magnitudes(arguments: Arguments) -> Results:
    """For each result, its sum with every term replaced by its magnitude, in float64.

    A weight exp(score - max) carries the rounding of its score, so its relative error grows with
    the magnitude of the scores in its row: the factor 1 + max_j |q| @ |k_j| * scale + |bias|.

    In half precision the gradient of a sink, one number a head, is a sum over rows of the rounding
    of the stored out, of which the naive path's is a single draw: two standard deviations of that
    sum are added, in units of eps(float32). The same holds for the gradient of a broadcast bias.
    """
    stored = torch.finfo(arguments.q.dtype).eps
    arguments = arguments.to(torch.float64)
    problem = naive_problem(arguments)
    result = naive_attention(problem)
    query, key, value = result.query.abs(), result.key.abs(), result.value.abs()
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
    if arguments.grad_out is None:
        return terms
    d_out = arguments.grad_out.abs()
    d_weights = (d_out @ value.transpose(-1, -2)) * result.keep
    delta = (d_weights * result.weights).sum(-1, keepdim=True)
    if arguments.grad_lse is not None:
        delta = delta + arguments.grad_lse.abs().unsqueeze(-1)
    d_shifted = weights * (d_weights + delta)
    d_scores = d_shifted * abs(problem.scale)
    key_heads = arguments.k.shape[1]
    terms["d_q"] = d_scores @ key
    terms["d_k"] = _grouped(d_scores.transpose(-1, -2) @ query, key_heads)
    terms["d_v"] = _grouped((weights * result.keep).transpose(-1, -2) @ d_out, key_heads)
    if isinstance(arguments.bias, Tensor):
        bias = arguments.bias
        shape = (1,) * (4 - bias.dim()) + bias.shape
        summed = d_shifted.sum_to_size(shape)
        if stored > torch.finfo(torch.float32).eps and shape != tuple(weights.shape):
            rounded = (d_out * result.out).norm(dim=-1, keepdim=True) * stored / 12**0.5
            of_row = (result.weights * rounded).sum_to_size((*weights.shape[:3], shape[3]))
            drawn = 2 * of_row.square().sum_to_size(shape).sqrt()
            summed = summed + drawn / torch.finfo(torch.float32).eps
        terms["d_bias"] = summed.view(bias.shape)
    if problem.sinks is not None:
        taken = torch.exp(problem.sinks.view(1, -1, 1) - finite_lse)
        terms["d_sinks"] = (taken * (row * delta).squeeze(-1)).sum((0, 2))
        if stored > torch.finfo(torch.float32).eps:
            deviation = (d_out * result.out).norm(dim=-1) * stored / 12**0.5
            drawn = 2 * (taken * deviation).square().sum((0, 2)).sqrt()
            terms["d_sinks"] = terms["d_sinks"] + drawn / torch.finfo(torch.float32).eps
    return terms


def _grouped(gradient: Tensor, key_heads: int) -> Tensor:
    """(B, Hq, L, D) summed over the query heads that share a key head."""
    batch, heads, length, dim = gradient.shape
    if heads == key_heads:
        return gradient
    return gradient.view(batch, key_heads, heads // key_heads, length, dim).sum(2)
