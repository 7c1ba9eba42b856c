"""Test cases of attention: a call, the naive path and the float64 oracle of it, and its magnitudes.

The oracle is `naive_attention` under autograd with float64 inputs, every mask written out by
`Mask.dense` and ALiBi by `ALiBi.dense`: it shares neither the mask structures nor any hand-written
backward with what it judges. `python -m rowmax.bench verify` holds it to 50 digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..api.attention import attention_problem
from ..api.biases import ALiBi
from ..api.masks import Dense, KeyLengths, Mask
from ..backends.reference import naive_attention
from ..ops.problem import AttentionProblem
from .tolerance import SUMMATION, Expected

Results = dict[str, Tensor]  # outputs and gradients by name: out, lse, d_q, ...
Kernel = Callable[..., Any]  # returns a tensor or a tuple of tensors


class TestCase(Protocol):
    """One call of a function in one dtype, with the gradients that its outputs receive."""

    @property
    def op(self) -> str:
        """The function's name in rowmax.kernels."""

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype that its sums are in: float32, or float64 for float64 inputs."""

    @property
    def expected(self) -> dict[str, Expected]:
        """By the name of the result."""

    def run(self, kernel: Kernel, device: torch.device | str | None = None) -> Results:
        """The kernel's outputs and gradients, computed on `device`, returned where the case is."""

    def forward_only(self) -> TestCase:
        """The same without gradients."""


def expected_of(
    exact: Results, naive: Results, magnitudes: Results, terms: int
) -> dict[str, Expected]:
    """The `Expected` of results that are sums of at most `terms` terms.

    In float64 the oracle is as wide as what it judges, and the naive path's error is not known. A
    sum of n terms, in whatever order, is then allowed the error that is to be expected of it,
    sqrt(n) * eps / 2 times their magnitudes (Higham & Mary 2019, theorem 2.4).
    """
    found = {}
    for name, tensor in exact.items():
        magnitude = magnitudes[name].expand_as(tensor)
        if naive[name].dtype == torch.float64:
            magnitude = magnitude * max(1.0, terms**0.5 / (2 * SUMMATION))
        found[name] = Expected(tensor, naive[name], magnitude)
    return found


@dataclass(frozen=True)
class AttentionCase:
    """One call of `attention`.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv); mask, bias, sinks and options (scale,
    softcap, dropout_p, seed) as in `rowmax.kernels.attention`. grad_out (B, Hq, Lq, Dv) and
    grad_lse (B, Hq, Lq) are the gradients that the outputs receive: without grad_out, the forward
    pass alone is compared.

    `kernel(q, k, v, mask=..., ...)` gets those of mask, bias, sinks and options that are given, and
    returns out and lse, or out alone: see `without_lse`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None = None
    bias: Tensor | ALiBi | None = None
    sinks: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None
    with_lse: bool = True  # whether lse is compared
    kept: Tensor | None = None  # bool (B, Hq, Lq, Lk): what dropout keeps; None: by the seed

    op = "attention"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Lk)."""
        batch, heads, query_len, _ = self.q.shape
        return batch, heads, query_len, self.k.shape[2]

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @cached_property
    def expected(self) -> dict[str, Expected]:
        return expected_of(self.oracle(), self.naive(), self.magnitudes(), max(self.shape))

    def run(self, kernel: Kernel, device: torch.device | str | None = None) -> Results:
        leaves = self.on(device or self.q.device).leaves()
        return on_device(leaves._results(kernel(*leaves.tensors, **leaves.keywords)), self.q.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the call."""
        keywords = {"mask": self.mask, "bias": self.bias, "sinks": self.sinks}
        return {name: value for name, value in keywords.items() if value is not None} | self.options

    # --- the same call, changed -------------------------------------------------------------------

    def differentiable(self) -> dict[str, Tensor]:
        tensors = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "sinks": self.sinks}
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}

    def leaves(self) -> AttentionCase:
        """Each of its differentiable tensors starts a graph of its own."""
        fresh: dict[str, Any] = {
            name: value.detach().requires_grad_() for name, value in self.differentiable().items()
        }
        return replace(self, **fresh)

    def to(self, dtype: torch.dtype) -> AttentionCase:
        """The same values in another dtype."""
        return self._changed(lambda value: value.detach().to(dtype))

    def on(self, device: torch.device | str) -> AttentionCase:
        """All its tensors on `device`."""
        if self.q.device == torch.device(device):
            return self
        moved = self._changed(lambda value: value.detach().to(device))
        if isinstance(self.bias, ALiBi):
            moved = replace(moved, bias=_moved(self.bias, device))
        return replace(moved, mask=mask_on(device, self.mask))

    def without_lse(self) -> AttentionCase:
        """For kernels that return out alone."""
        return replace(self, grad_lse=None, with_lse=False)

    def forward_only(self) -> AttentionCase:
        return replace(self, grad_out=None, grad_lse=None)

    def of_batch(self, part: slice) -> AttentionCase:
        """Some of its batch elements, where nothing but lengths tells these apart."""
        names = ("q", "k", "v", "grad_out", "grad_lse")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        cut = {name: value[part] for name, value in given.items() if value is not None}
        if isinstance(self.mask, KeyLengths):
            cut["mask"] = KeyLengths(self.mask.lengths[part])
        return replace(self, **cut)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> AttentionCase:
        gradients = {"grad_out": self.grad_out, "grad_lse": self.grad_lse}
        tensors = {**self.differentiable(), **gradients}
        changed: dict[str, Any] = {
            name: change(value) for name, value in tensors.items() if value is not None
        }
        return replace(self, **changed)

    # --- what is right ----------------------------------------------------------------------------

    def naive(self) -> Results:
        """The naive path under autograd, in the dtype of the inputs (sums in float32 or wider).

        What it hands from its forward to its backward pass is stored in that dtype, as by every
        path that keeps out and lse (Dao et al. 2022, algorithm 4): row by row, `sum(d_out * out)`
        is of the rounded out, which is the same as a gradient of lse less by
        `sum(d_out * (rounded - out))`.
        """
        contiguous: dict[str, Any] = {
            name: value.detach().contiguous() for name, value in self.differentiable().items()
        }
        leaves = replace(self, **contiguous).leaves()
        result = naive_attention(leaves.naive_problem(), self.kept)
        out = result.out.to(self.q.dtype)
        if self.grad_out is not None:
            rounded = ((out - result.out) * self.grad_out).sum(-1).detach()
            grad_lse = self.grad_lse
            total = -rounded if grad_lse is None else grad_lse.to(rounded.dtype) - rounded
            masked = total.masked_fill(result.lse == -torch.inf, 0.0)
            leaves = replace(leaves, grad_lse=masked)
        found = leaves._results((out, result.lse))
        return found if self.with_lse else {name: found[name] for name in found if name != "lse"}

    def oracle(self) -> Results:
        return self.to(torch.float64).naive()

    def naive_problem(self) -> AttentionProblem:
        """The problem with its mask and ALiBi written out as dense tensors."""
        mask, bias = self.mask, self.bias
        if isinstance(mask, Mask):
            mask = Dense(mask.dense(*self.shape).to(self.q.device))
        if isinstance(bias, ALiBi):
            slopes = bias.slopes.to(self.sum_dtype)
            bias = replace(bias, slopes=slopes).dense(*self.shape).to(self.q.device)
        options = {"scale": None, "softcap": None, "dropout_p": 0.0, "seed": None, **self.options}
        return attention_problem(
            *self.tensors, mask, bias, sinks=self.sinks, draw_seed=True, **options
        )

    def magnitudes(self) -> Results:
        """For each result, its sum with every term replaced by its magnitude, in float64.

        A weight exp(score - max) carries the rounding of its score, so its relative error grows
        with the magnitude of the scores in its row: 1 + max_j |q| @ |k_j| * scale + |bias|. The
        backward pass computes it anew as exp(score - lse), and in float64 lse, stored no wider than
        all else, adds its own rounding.

        In half precision the gradient of a sink, one number a head, is a sum over rows of the
        rounding of the stored out, of which the naive path's is a single draw: two standard
        deviations of that sum are added, in units of eps(float32). The same holds for the gradient
        of a bias that is broadcast, or wider than q: it is not rounded itself.
        """
        stored = torch.finfo(self.q.dtype).eps
        narrow_bias = isinstance(self.bias, Tensor) and torch.finfo(self.bias.dtype).eps >= stored
        return _magnitudes(self.to(torch.float64), stored, narrow_bias)

    def _results(self, returned: Any) -> Results:
        """out, lse where there is one, and d_q, d_k, d_v, ... where gradients are given."""
        outputs = outputs_of(returned)
        if len(outputs) > 2:
            raise TypeError(
                f"a kernel of attention: expected out, or out and lse, got {len(outputs)} tensors"
            )
        results = dict(zip(("out", "lse"), outputs, strict=False))
        received = [self.grad_out, *((self.grad_lse,) if len(outputs) == 2 else ())]
        return gradients_of(results, received, self.differentiable())


class PackedCase:
    """One call of `attention_varlen`; the oracle sees the sequences padded, lengths as masks.

    `arguments` hold the padded tensors, (B, H, L, D), without those masks; `padded` with them.

    `kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, mask=..., ...)` gets q (total, Hq, D), and so on,
    and returns out (total, Hq, Dv) and lse (Hq, total).
    """

    op = "attention_varlen"

    def __init__(
        self, arguments: AttentionCase, padded: AttentionCase, lengths: tuple[Tensor, Tensor]
    ) -> None:
        self._arguments, self._padded = arguments, padded
        self._lengths = lengths

    @property
    def sum_dtype(self) -> torch.dtype:
        return self._arguments.sum_dtype

    @cached_property
    def expected(self) -> dict[str, Expected]:
        exact, naive, magnitudes = (
            {name: self._pack(name, tensor) for name, tensor in results.items()}
            for results in (self._padded.oracle(), self._padded.naive(), self._padded.magnitudes())
        )
        return expected_of(exact, naive, magnitudes, max(self._padded.shape))

    def without_lse(self) -> PackedCase:
        """For kernels that return out alone."""
        return PackedCase(self._arguments.without_lse(), self._padded.without_lse(), self._lengths)

    def forward_only(self) -> PackedCase:
        arguments, padded = self._arguments.forward_only(), self._padded.forward_only()
        return PackedCase(arguments, padded, self._lengths)

    def run(self, kernel: Kernel, device: torch.device | str | None = None) -> Results:
        arguments = self._arguments
        device = torch.device(device or arguments.q.device)
        inputs = {"q": arguments.q, "k": arguments.k, "v": arguments.v}
        received = {"grad_out": arguments.grad_out, "grad_lse": arguments.grad_lse}
        packed: dict[str, Any] = {
            name: self._pack(name.removeprefix("grad_"), tensor)
            for name, tensor in {**inputs, **received}.items()
            if tensor is not None
        }
        leaves = replace(arguments, **packed).on(device).leaves()
        starts = [
            torch.cat((length.new_zeros(1), length.cumsum(0))).to(device)
            for length in self._lengths
        ]
        returned = kernel(*leaves.tensors, *starts, **leaves.keywords)
        return on_device(leaves._results(returned), arguments.q.device)

    def _pack(self, name: str, tensor: Tensor) -> Tensor:
        """(B, H, L, D) -> (total, H, D), and lse (B, H, L) -> (H, total)."""
        if name.endswith("sinks"):
            return tensor
        is_key = name.removeprefix("d_") in ("k", "v")
        lengths = self._lengths[1 if is_key else 0]
        parts = [tensor[b, :, :length] for b, length in enumerate(lengths.tolist())]
        if name == "lse":
            return torch.cat(parts, dim=1)
        return torch.cat([part.transpose(0, 1) for part in parts])


def random_gradients(case: AttentionCase, generator: torch.Generator) -> AttentionCase:
    """`case` with random gradients for out and lse."""
    q, v = case.q, case.v
    grad_out = torch.randn((*q.shape[:3], v.shape[3]), generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(q.shape[:3], generator=generator, dtype=torch.float64)
    return replace(case, grad_out=grad_out.to(q), grad_lse=grad_lse.to(q.device, case.sum_dtype))


def outputs_of(returned: Any) -> tuple[Tensor, ...]:
    """The tensors that a kernel returned, without an lse of None."""
    outputs = returned if isinstance(returned, tuple | list) else (returned,)
    outputs = tuple(output for output in outputs if output is not None)
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        kinds = ", ".join(type(output).__name__ for output in outputs) or "nothing"
        raise TypeError(f"a kernel: expected to return a tensor or a tuple of tensors, got {kinds}")
    return outputs


def gradients_of(
    results: Results, received: Iterable[Tensor | None], leaves: dict[str, Tensor]
) -> Results:
    """`results`, detached, and with `received` by each of them the gradients of the leaves.

    A leaf that no result depends on has none.
    """
    outputs, gradients = [], []
    for output, gradient in zip(results.values(), received, strict=False):
        if gradient is not None and output.requires_grad:
            # a wrong shape is reported with the outputs, and has no gradients
            if gradient.shape != output.shape:
                return _detached(results)
            outputs.append(output)
            gradients.append(gradient.to(output))
    if not outputs:
        return _detached(results)
    found = torch.autograd.grad(outputs, tuple(leaves.values()), gradients, allow_unused=True)
    named = zip(leaves, found, strict=True)
    return _detached(results) | {f"d_{name}": grad for name, grad in named if grad is not None}


def on_device(results: Results, device: torch.device) -> Results:
    return {name: tensor.to(device) for name, tensor in results.items()}


def mask_on(device: torch.device | str, mask: Mask | Tensor | None) -> Mask | Tensor | None:
    """`mask` with its tensors on `device`."""
    if mask is None or isinstance(mask, Tensor):
        return None if mask is None else mask.to(device)
    joined: Mask | None = None
    for part in mask.parts():
        moved = _moved(part, device)
        joined = moved if joined is None else joined & moved
    return joined


def _moved(value: Any, device: torch.device | str) -> Any:
    fields = {
        name: content.to(device) if isinstance(content, Tensor) else content
        for name, content in vars(value).items()
    }
    return type(value)(**fields)


def _detached(results: Results) -> Results:
    return {name: tensor.detach() for name, tensor in results.items()}


def _magnitudes(case: AttentionCase, stored: float, narrow_bias: bool) -> Results:
    """`magnitudes` of a case that is float64 already; `stored` is eps of what q was before, and
    `narrow_bias` says whether the bias was no wider."""
    in_half = stored > torch.finfo(torch.float32).eps
    problem = case.naive_problem()
    result = naive_attention(problem, case.kept)
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
    if case.grad_out is None:
        return terms
    if stored == torch.finfo(torch.float64).eps:
        weights = weights + result.weights * finite_lse.abs().unsqueeze(-1)
    d_out = case.grad_out.abs()
    d_weights = (d_out @ value.transpose(-1, -2)) * result.keep
    delta = (d_weights * result.weights).sum(-1, keepdim=True)
    if case.grad_lse is not None:
        delta = delta + case.grad_lse.abs().unsqueeze(-1)
    d_shifted = weights * (d_weights + delta)
    d_scores = d_shifted * abs(problem.scale)
    key_heads = case.k.shape[1]
    terms["d_q"] = d_scores @ key
    terms["d_k"] = _grouped(d_scores.transpose(-1, -2) @ query, key_heads)
    terms["d_v"] = _grouped((weights * result.keep).transpose(-1, -2) @ d_out, key_heads)
    if isinstance(case.bias, Tensor):
        bias = case.bias
        shape = (1,) * (4 - bias.dim()) + bias.shape
        summed = d_shifted.sum_to_size(shape)
        if in_half and not (narrow_bias and shape == tuple(weights.shape)):
            rounded = (d_out * result.out).norm(dim=-1, keepdim=True) * stored / 12**0.5
            per_row = (result.weights * rounded).sum_to_size((*weights.shape[:3], shape[3]))
            drawn = 2 * per_row.square().sum_to_size(shape).sqrt()
            summed = summed + drawn / torch.finfo(torch.float32).eps
        terms["d_bias"] = summed.view(bias.shape)
    if problem.sinks is not None:
        taken = torch.exp(problem.sinks.view(1, -1, 1) - finite_lse)
        terms["d_sinks"] = (taken * (row * delta).squeeze(-1)).sum((0, 2))
        if in_half:
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
