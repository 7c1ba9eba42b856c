"""Invariants: properties that hold for all inputs, checked on the implementation itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...kernels import Causal, KeyLengths
from ...kernels.testing.cases import Draw, Kind, Shape, attention_case, dtype_text
from ...kernels.testing.cross_entropy import CrossEntropyCase, cross_entropy_case
from ...kernels.testing.oracle import AttentionCase, PackedCase, Results, outputs_of
from ...kernels.testing.rows import RowCase, norm_case
from ...kernels.testing.suite import ATTENTION_OPS
from ...kernels.testing.tolerance import Expected, accuracies
from ..conduct import examine
from ..conduct.guard import Guard
from ..measure.inputs import AttentionInputs
from ..options import first_fault, told
from ..peers.candidates import foreign_row
from .bits import difference, on_all_threads
from .contracts import Contract
from .implementations import DeclinedError, Foreign, Implementation, contract_of
from .packed_invariants import packed, packed_alone

T = TypeVar("T")
AnyCase = AttentionCase | PackedCase | RowCase | CrossEntropyCase

SIZES = Shape(4, 4, 2, 33, 70, 16, 16)
SQUARE = Shape(4, 4, 2, 70, 70, 16, 16)
DECODING = Shape(4, 4, 2, 1, 600, 32, 32)
ROWS = (257, 96)
# What says whether the same numbers come out again.
DETERMINISM = ("same bits again", "any thread count", "alone as in a batch")
# On the same tensors, with other values each: of a stranger's function, and of a backend.
CALLS, OWN_CALLS = 150, 6


@dataclass(frozen=True)
class Invariant:
    """A property that was checked; `fault` describes a violation, None where it holds."""

    op: str
    name: str
    dtype: torch.dtype
    fault: str | None
    declined: str | None = None
    promised: bool = True  # by the contract that it is held to; else a fault is no failure

    @property
    def failed(self) -> bool:
        """Whether it is not as it was promised."""
        return self.promised and not self.passed

    @property
    def passed(self) -> bool:
        return self.fault is None

    def as_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "invariant": self.name,
            "dtype": dtype_text(self.dtype),
            "fault": self.fault,
            "declined": self.declined,
            "promised": self.promised,
        }


# --- of every op ----------------------------------------------------------------------------------


def same_bits_again(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """Three runs on the same inputs."""
    return first_fault(
        difference(_results(implementation, case, op), first)
        for case in _cases(implementation, op, dtype)
        for first in [_results(implementation, case, op)]
        for _ in range(2)
    )


def any_threads(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """The same bits on one, two and three threads."""
    cases = _cases(implementation, op, dtype)
    return first_fault(on_all_threads(partial(_results, implementation, c, op)) for c in cases)


DETERMINISTIC = {"same bits again": same_bits_again, "any thread count": any_threads}


# --- attention ------------------------------------------------------------------------------------


def rows_sum_to_one(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """With v all ones, out is the sum of each row's weights."""
    case = _case(implementation, dtype)
    case = replace(case, v=torch.ones_like(case.v))
    out = {"out": _results(implementation, case)["out"]}
    expected = {"out": case.expected["out"]}
    assert bool(((expected["out"].exact - 1).abs() < 1e-12).all())
    return _fault(implementation, out, case, expected)


def keys_permuted(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """The order of keys is no part of attention: all results as without, but for their order."""
    kind = Kind(bias=lambda s, draw: draw.normal(1, s.Hq, s.Lq, s.Lk))
    case = _case(implementation, dtype, kind)
    order = torch.randperm(SIZES.Lk, generator=torch.Generator().manual_seed(3))
    bias = case.bias
    assert isinstance(bias, Tensor)  # which the kind makes
    permuted = replace(case, k=case.k[:, :, order], v=case.v[:, :, order], bias=bias[..., order])
    results = _results(implementation, permuted)
    back = order.argsort()
    for name in results.keys() & {"d_k", "d_v"}:
        results[name] = results[name][:, :, back]
    if "d_bias" in results:
        results["d_bias"] = results["d_bias"][..., back]
    return _fault(implementation, results, case)


def scores_shifted(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """A constant added to all scores of a row changes nothing but its lse, by that constant."""
    case = _case(implementation, dtype)
    shifted = replace(case, bias=torch.full((1, 1, 1, 1), 4.0).to(dtype))
    results = _results(implementation, shifted)
    results.pop("d_bias", None)
    if "lse" in results:
        results["lse"] = results["lse"] - 4.0
    magnitudes = shifted.expected
    unshifted = {
        name: expected._replace(magnitude=magnitudes[name].magnitude)
        for name, expected in case.expected.items()
    }
    return _fault(implementation, results, shifted, unshifted)


def padding_unread(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """NaN and infinities in padding give the same bits as zeros there."""
    lengths = torch.tensor([70, 0, 23, 41])
    kind = Kind(lambda s, draw: KeyLengths(lengths))
    clean = _case(implementation, dtype, kind)
    padding = (torch.arange(SIZES.Lk) >= lengths.view(-1, 1, 1)).unsqueeze(-1)
    k, v = (tensor.masked_fill(padding, 0.0) for tensor in (clean.k, clean.v))
    poison = torch.tensor([torch.nan, torch.inf], dtype=dtype).repeat(SIZES.D // 2)
    poisoned = replace(clean, k=torch.where(padding, poison, k), v=torch.where(padding, -poison, v))
    expected = _results(implementation, replace(clean, k=k, v=v))
    got = _results(implementation, poisoned)
    fault = difference(got, expected)
    if fault is None:
        for name in sorted(got.keys() & {"d_k", "d_v"}):
            if bool(got[name].masked_select(padding).any()):
                return f"{name}: padding has a gradient"
    return fault


def empty_rows_are_zero(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """A query that may attend nothing gives out = 0, lse = -inf and no gradient."""
    allowed = torch.ones(SIZES.Lq, SIZES.Lk, dtype=torch.bool)
    allowed[5], allowed[-1] = False, False
    kind = Kind(lambda s, draw: allowed)
    results = _results(implementation, _case(implementation, dtype, kind))
    for row in (5, SIZES.Lq - 1):
        for name in ("out", "d_q") if implementation.backward else ("out",):
            found = results[name][:, :, row]
            if bool((found != 0.0).any()):
                return f"{name}: {float(found.flatten()[0]):.3g} in a row without keys"
        if "lse" in results and not bool((results["lse"][:, :, row] == -torch.inf).all()):
            return "lse: expected -inf in a row without keys"
    finite = all(
        bool(torch.isfinite(results[name]).all()) for name in results.keys() & {"d_k", "d_v"}
    )
    return None if finite else "d_k or d_v: not finite beside a row without keys"


def batch_invariance(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """A batch element alone gives the bits that it gives among others."""
    for case in _several(implementation, dtype):
        together = _results(implementation, case)
        for b in (0, case.shape[0] - 1):
            part = slice(b, b + 1)
            alone = _results(implementation, case.of_batch(part))
            fault = difference(alone, {name: value[part] for name, value in together.items()})
            if fault is not None:
                return fault
    return None


def dropout_scales(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """A weight is dropped, or grows by 1 / (1 - p); about p of them drop. Of SDPA's signature.

    With v the unit matrix, out is the weights themselves. Backends, whose dropout is a function
    of the seed, are held to the oracle's in every weight instead.
    """
    if not isinstance(implementation, Foreign):
        raise DeclinedError("held to the oracle's dropout, weight by weight")
    dropout_p, length = 0.25, 64
    draw = Draw(41, dtype)
    q, k = (draw.normal(4, 2, length, 16).to(implementation.device) for _ in range(2))
    unit = torch.eye(length, dtype=dtype, device=implementation.device).expand(4, 2, length, length)
    torch.manual_seed(7)
    function = implementation.candidate.attention
    dropped = function(q, k, unit, dropout_p=dropout_p).double()
    whole = function(q, k, unit).double() / (1 - dropout_p)
    zero = dropped == 0.0
    wrong = (dropped - whole).abs() > 8 * torch.finfo(dtype).eps * whole
    if bool((wrong & ~zero).any()):
        return "a kept weight is not 1 / (1 - p) times what it is without dropout"
    share = float(zero.double().mean())
    # five standard deviations of the share of so many coins
    reach = 5 * (dropout_p * (1 - dropout_p) / zero.numel()) ** 0.5
    if abs(share - dropout_p) > reach:
        return f"{100 * share:.1f}% of the weights drop, {100 * dropout_p:.1f}% were asked for"
    return None


ATTENTION = {
    "rows sum to 1": rows_sum_to_one,
    "keys permuted": keys_permuted,
    "scores shifted": scores_shifted,
    "NaN in padding": padding_unread,
    "rows without keys": empty_rows_are_zero,
    **DETERMINISTIC,
    "alone as in a batch": batch_invariance,
    "dropout scales": dropout_scales,
}
PACKED = {**DETERMINISTIC, "alone as in a batch": packed_alone}


# --- row-wise functions ---------------------------------------------------------------------------


def rows_alone(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """A row alone gives the bits that it gives among others."""
    case = _row_case(implementation, op, dtype)
    together = _results(implementation, case, op)
    row = 100
    inputs, found = {}, {}
    for name, tensor in case.inputs.items():
        inputs[name] = _row(tensor, row) if name in ("x", "residual", "scores") else tensor
    alone = replace(case, inputs=inputs, grads=tuple(_row(grad, row) for grad in case.grads))
    for name, tensor in together.items():
        if name not in ("d_weight", "d_bias"):
            found[name] = _row(tensor, row)
    got = _results(implementation, alone, op)
    return difference({name: got[name] for name in found}, found)


def rows_apart(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """NaN in a row stays in it: all others keep their bits."""
    case = _row_case(implementation, op, dtype)
    expected = _results(implementation, case, op)
    name = "scores" if op == "masked_softmax" else "x"
    poisoned = case.inputs[name].clone()
    poisoned[..., 100, 3] = torch.nan
    got = _results(implementation, replace(case, inputs={**case.inputs, name: poisoned}), op)
    others = torch.arange(ROWS[0]) != 100
    names = [key for key in expected if key not in ("d_weight", "d_bias")]
    if not bool(got["out"][..., 100, :].isnan().any()):
        return "out: a row that holds NaN gives numbers"
    return difference(
        {key: got[key][..., others, :] for key in names},
        {key: expected[key][..., others, :] for key in names},
    )


ROW_WISE = {**DETERMINISTIC, "alone as in a batch": rows_alone, "NaN stays in its row": rows_apart}
# The products are torch's: what they promise about threads and rows is for torch to say.
CROSS_ENTROPY = {"same bits again": same_bits_again}


# --- all of them ----------------------------------------------------------------------------------


def count(
    implementation: Implementation, ops: tuple[str, ...], only: Collection[str] | None = None
) -> int:
    """The number of checks that `check` makes for each dtype."""
    here = [op for op in ops if op in implementation.ops]
    return sum(
        len(_chosen(_by_op(op), only)) + len(_chosen(_conduct_of(implementation, op), only))
        for op in here
    )


def _chosen(checks: Mapping[str, T], only: Collection[str] | None) -> dict[str, T]:
    return {name: check for name, check in checks.items() if only is None or name in only}


def _conduct_of(implementation: Implementation, op: str) -> Mapping[str, examine.Check]:
    """How a stranger behaves; of a backend at attention, which stands for its other functions."""
    if op == "attention_varlen":
        return {}
    if op == "attention" or isinstance(implementation, Foreign):
        return examine.CHECKS
    return {}


def _by_op(op: str) -> Mapping[str, Callable[[Implementation, str, torch.dtype], str | None]]:
    """The invariants of an op."""
    if op in ATTENTION_OPS:
        return ATTENTION if op == "attention" else PACKED
    return CROSS_ENTROPY if op == "linear_cross_entropy" else ROW_WISE


def check(
    implementation: Implementation,
    ops: tuple[str, ...],
    dtype: torch.dtype,
    only: Collection[str] | None = None,
) -> Iterator[Invariant]:
    """All of them, or those named in `only`."""
    contract = contract_of(implementation)
    for op in ops:
        if op not in implementation.ops:
            continue
        for name, invariant in _chosen(_by_op(op), only).items():
            run = partial(invariant, implementation, op, dtype)
            yield _checked(op, name, dtype, run, contract)
        conducts = _chosen(_conduct_of(implementation, op), only)
        if not conducts:
            continue
        subject = _subject(implementation, op, dtype)
        for name, conduct in conducts.items():
            yield _checked(op, name, dtype, partial(conduct, subject), contract)


def _checked(
    op: str, name: str, dtype: torch.dtype, run: Callable[[], str | None], contract: Contract
) -> Invariant:
    promised = name not in contract.invariants
    try:
        return Invariant(op, name, dtype, run(), promised=promised)
    except DeclinedError as error:
        return Invariant(op, name, dtype, None, str(error), promised)
    except Exception as error:
        return Invariant(op, name, dtype, told(error), promised=promised)


def _subject(implementation: Implementation, op: str, dtype: torch.dtype) -> examine.Subject:
    kernel = implementation.kernel(op)

    def attention(inputs: AttentionInputs) -> tuple[Tensor, ...]:
        return outputs_of(kernel(inputs.q, inputs.k, inputs.v))[:1]

    function: Any = attention if op == "attention" else partial(foreign_row, kernel, op)
    return examine.Subject(
        function,
        kind="full" if op == "attention" else op,
        dtype=dtype,
        backward=implementation.backward,
        device=implementation.device.type,
        calls=CALLS if isinstance(implementation, Foreign) else OWN_CALLS,
        guard=implementation.guard if isinstance(implementation, Foreign) else Guard(),
    )


def _case(
    implementation: Implementation,
    dtype: torch.dtype,
    kind: Kind | None = None,
    sizes: Shape = SIZES,
) -> AttentionCase:
    if isinstance(implementation, Foreign) and not implementation.candidate.takes_groups:
        sizes = sizes._replace(Hkv=sizes.Hq)
    case = attention_case(kind or Kind(), sizes, Draw(17, dtype))
    case = case if implementation.with_lse else case.without_lse()
    return case if implementation.backward else case.forward_only()


def _cases(implementation: Implementation, op: str, dtype: torch.dtype) -> Iterator[AnyCase]:
    if op == "attention":
        yield from _several(implementation, dtype)
    elif op == "attention_varlen":
        yield packed(implementation, dtype)
    elif op == "linear_cross_entropy":
        yield cross_entropy_case("ignored", (ROWS[0], 24, ROWS[1]), Draw(29, dtype))
    else:
        yield _row_case(implementation, op, dtype)


def _several(implementation: Implementation, dtype: torch.dtype) -> Iterator[AttentionCase]:
    lengths = torch.tensor([70, 3, 23, 41])
    for kind, sizes in (
        (Kind(lambda s, draw: Causal()), SQUARE),
        (Kind(lambda s, draw: KeyLengths(lengths)), SIZES),
        (Kind(), DECODING),
    ):
        yield _case(implementation, dtype, kind, sizes)


def _row_case(implementation: Implementation, op: str, dtype: torch.dtype) -> RowCase:
    draw = Draw(23, dtype)
    if op == "masked_softmax":
        scores, grad = draw.normal(1, 1, *ROWS), draw.normal(1, 1, *ROWS)
        case = RowCase(op, {"scores": scores}, (grad,))
    else:
        case = norm_case(op, draw.normal(*ROWS), draw, ("weight", "bias"), {})
    return case if implementation.backward else case.forward_only()


def _row(tensor: Tensor, row: int) -> Tensor:
    return tensor[..., row : row + 1, :]


def _results(implementation: Implementation, case: AnyCase, op: str = "attention") -> Results:
    return case.run(implementation.kernel(op), implementation.device)


def _fault(
    implementation: Implementation,
    results: Results,
    case: AttentionCase,
    expected: dict[str, Expected] | None = None,
) -> str | None:
    """Of the results of `case`, which are to be `expected`, by default its own."""
    contract = contract_of(implementation)
    held_to = contract.expected(case, expected or case.expected)
    found = accuracies(results, held_to, case.sum_dtype, contract.factor(case.q.dtype))
    return first_fault(one.fault and f"{one.tensor}: {one.fault}" for one in found)
