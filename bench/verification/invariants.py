"""What must hold whatever the numbers are: each property checked on the subject itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import Causal, KeyLengths
from ...kernels.testing.oracle import Arguments, Results
from .attention_cases import Draw, Kind, Sizes, attention_arguments
from .questions import AttentionQuestion, attention_results, dtype_text, judged
from .row_cases import RowQuestion, norm_question
from .subjects import DeclinedError, Sdpa, Subject

SIZES = Sizes(4, 4, 2, 33, 70, 16, 16)
SQUARE = Sizes(4, 4, 2, 70, 70, 16, 16)
DECODING = Sizes(4, 4, 2, 1, 600, 32, 32)
ROWS = (257, 96)


@dataclass(frozen=True)
class Invariant:
    """A property found to hold or not; `fault` says what was found instead."""

    op: str
    name: str
    dtype: torch.dtype
    fault: str | None
    declined: str | None = None

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
        }


# --- attention ------------------------------------------------------------------------------------


def rows_sum_to_one(subject: Subject, dtype: torch.dtype) -> str | None:
    """With v all ones, out is the sum of each row's weights."""
    arguments = _arguments(subject, dtype)
    arguments = replace(arguments, v=torch.ones_like(arguments.v))
    question = AttentionQuestion(arguments)
    exact = question.answers["out"].exact
    assert bool(((exact - 1).abs() < 1e-12).all())
    return _faults(attention_results(subject, arguments), question, only="out")


def keys_permuted(subject: Subject, dtype: torch.dtype) -> str | None:
    """The order of keys is no part of attention: all results as without, but for their order."""
    kind = Kind(bias=lambda s, draw: draw.normal(1, s.Hq, s.Lq, s.Lk))
    arguments = _arguments(subject, dtype, kind)
    order = torch.randperm(SIZES.Lk, generator=torch.Generator().manual_seed(3))
    bias = arguments.bias
    assert isinstance(bias, Tensor)  # which the kind makes
    permuted = replace(
        arguments, k=arguments.k[:, :, order], v=arguments.v[:, :, order], bias=bias[..., order]
    )
    results = attention_results(subject, permuted)
    back = order.argsort()
    for name in ("d_k", "d_v"):
        results[name] = results[name][:, :, back]
    results["d_bias"] = results["d_bias"][..., back]
    return _faults(results, AttentionQuestion(arguments))


def scores_shifted(subject: Subject, dtype: torch.dtype) -> str | None:
    """A constant added to all scores of a row changes nothing but its lse, by that constant."""
    arguments = _arguments(subject, dtype)
    shifted = replace(arguments, bias=torch.full((1, 1, 1, 1), 4.0).to(dtype))
    results = attention_results(subject, shifted)
    del results["d_bias"]
    if "lse" in results:
        results["lse"] = results["lse"] - 4.0
    question = AttentionQuestion(shifted)
    plain = AttentionQuestion(arguments)
    answers = {
        name: answer._replace(magnitude=question.answers[name].magnitude)
        for name, answer in plain.answers.items()
    }
    plain.__dict__["answers"] = answers
    return _faults(results, plain)


def padding_unread(subject: Subject, dtype: torch.dtype) -> str | None:
    """NaN and infinities in padding give the same bits as zeros there."""
    lengths = torch.tensor([70, 0, 23, 41])
    kind = Kind(lambda s, draw: KeyLengths(lengths))
    clean = _arguments(subject, dtype, kind)
    padding = (torch.arange(SIZES.Lk) >= lengths.view(-1, 1, 1)).unsqueeze(-1)
    k, v = (tensor.masked_fill(padding, 0.0) for tensor in (clean.k, clean.v))
    poison = torch.tensor([torch.nan, torch.inf], dtype=dtype).repeat(SIZES.D // 2)
    poisoned = replace(clean, k=torch.where(padding, poison, k), v=torch.where(padding, -poison, v))
    expected = attention_results(subject, replace(clean, k=k, v=v))
    got = attention_results(subject, poisoned)
    fault = _difference(got, expected)
    if fault is None:
        for name in ("d_k", "d_v"):
            if bool(got[name].masked_select(padding).any()):
                return f"{name}: padding has a gradient"
    return fault


def empty_rows_are_zero(subject: Subject, dtype: torch.dtype) -> str | None:
    """A query that may attend nothing gives out = 0, lse = -inf and no gradient."""
    allowed = torch.ones(SIZES.Lq, SIZES.Lk, dtype=torch.bool)
    allowed[5], allowed[-1] = False, False
    kind = Kind(lambda s, draw: allowed)
    results = attention_results(subject, _arguments(subject, dtype, kind))
    for row in (5, SIZES.Lq - 1):
        for name in ("out", "d_q"):
            found = results[name][:, :, row]
            if bool((found != 0.0).any()):
                return f"{name}: {float(found.flatten()[0]):.3g} in a row without keys"
        if "lse" in results and not bool((results["lse"][:, :, row] == -torch.inf).all()):
            return "lse: expected -inf in a row without keys"
    finite = all(bool(torch.isfinite(results[name]).all()) for name in ("d_k", "d_v"))
    return None if finite else "d_k or d_v: not finite beside a row without keys"


def same_bits_again(subject: Subject, dtype: torch.dtype) -> str | None:
    """Three runs on the same inputs."""
    for arguments in _several(subject, dtype):
        first = attention_results(subject, arguments)
        for _ in range(2):
            fault = _difference(attention_results(subject, arguments), first)
            if fault is not None:
                return fault
    return None


def any_threads(subject: Subject, dtype: torch.dtype) -> str | None:
    """The same bits on one, two and three threads."""
    for arguments in _several(subject, dtype):
        fault = _on_threads(partial(attention_results, subject, arguments))
        if fault is not None:
            return fault
    return None


def batch_invariance(subject: Subject, dtype: torch.dtype) -> str | None:
    """A batch element alone gives the bits that it gives among others."""
    for arguments in _several(subject, dtype):
        together = attention_results(subject, arguments)
        for b in (0, arguments.shape[0] - 1):
            part = slice(b, b + 1)
            changes: dict[str, Any] = {
                name: getattr(arguments, name)[part]
                for name in ("q", "k", "v", "grad_out", "grad_lse")
                if getattr(arguments, name) is not None
            }
            if isinstance(arguments.mask, KeyLengths):
                changes["mask"] = KeyLengths(arguments.mask.lengths[part])
            alone = attention_results(subject, replace(arguments, **changes))
            fault = _difference(alone, {name: value[part] for name, value in together.items()})
            if fault is not None:
                return fault
    return None


def dropout_scales(subject: Subject, dtype: torch.dtype) -> str | None:
    """A weight is dropped, or grows by 1 / (1 - p); about p of them drop. Of SDPA's signature.

    With v the unit matrix, out is the weights themselves. Backends, whose dropout is a function
    of the seed, are held to the oracle's in every weight instead.
    """
    if not isinstance(subject, Sdpa):
        raise DeclinedError("held to the oracle's dropout, weight by weight")
    dropout_p, length = 0.25, 64
    draw = Draw(41, dtype)
    q, k = (draw.normal(4, 2, length, 16).to(subject.device) for _ in range(2))
    unit = torch.eye(length, dtype=dtype, device=subject.device).expand(4, 2, length, length)
    torch.manual_seed(7)
    dropped = subject.function(q, k, unit, dropout_p=dropout_p).double()
    whole = subject.function(q, k, unit).double() / (1 - dropout_p)
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
    "same bits again": same_bits_again,
    "any thread count": any_threads,
    "alone as in a batch": batch_invariance,
    "dropout scales": dropout_scales,
}


# --- row-wise functions ---------------------------------------------------------------------------


def _asked(subject: Subject, question: RowQuestion) -> Results:
    return question.ask(subject)


def rows_again(subject: Subject, op: str, dtype: torch.dtype) -> str | None:
    question = _row_question(op, dtype)
    first = _asked(subject, question)
    return _difference(_asked(subject, question), first)


def rows_any_threads(subject: Subject, op: str, dtype: torch.dtype) -> str | None:
    question = _row_question(op, dtype)
    return _on_threads(lambda: _asked(subject, question))


def rows_alone(subject: Subject, op: str, dtype: torch.dtype) -> str | None:
    """A row alone gives the bits that it gives among others."""
    question = _row_question(op, dtype)
    together = _asked(subject, question)
    row = 100
    inputs, found = {}, {}
    for name, tensor in question.inputs.items():
        inputs[name] = _row(tensor, row) if name in ("x", "residual", "scores") else tensor
    alone = replace(
        question, inputs=inputs, grads=tuple(_row(grad, row) for grad in question.grads)
    )
    for name, tensor in together.items():
        if name not in ("d_weight", "d_bias"):
            found[name] = _row(tensor, row)
    got = _asked(subject, alone)
    return _difference({name: got[name] for name in found}, found)


def rows_apart(subject: Subject, op: str, dtype: torch.dtype) -> str | None:
    """NaN in a row stays in it: all others keep their bits."""
    question = _row_question(op, dtype)
    expected = _asked(subject, question)
    name = "scores" if op == "masked_softmax" else "x"
    poisoned = question.inputs[name].clone()
    poisoned[..., 100, 3] = torch.nan
    got = _asked(subject, replace(question, inputs={**question.inputs, name: poisoned}))
    others = torch.arange(ROWS[0]) != 100
    kept = [key for key in expected if key not in ("d_weight", "d_bias")]
    if not bool(got["out"][..., 100, :].isnan().any()):
        return "out: a row that holds NaN gives numbers"
    return _difference(
        {key: got[key][..., others, :] for key in kept},
        {key: expected[key][..., others, :] for key in kept},
    )


ROW_WISE = {
    "same bits again": rows_again,
    "any thread count": rows_any_threads,
    "alone as in a batch": rows_alone,
    "NaN stays in its row": rows_apart,
}


# --- all of them ----------------------------------------------------------------------------------


def count(subject: Subject, ops: tuple[str, ...]) -> int:
    """How many `check` finds for each dtype."""
    here = [op for op in ops if op in subject.ops and op != "attention_varlen"]
    return sum(len(ATTENTION if op == "attention" else ROW_WISE) for op in here)


def check(subject: Subject, ops: tuple[str, ...], dtype: torch.dtype) -> Iterator[Invariant]:
    for op in ops:
        if op not in subject.ops or op == "attention_varlen":
            continue
        if op == "attention":
            for name, attention_check in ATTENTION.items():
                yield _checked(op, name, dtype, partial(attention_check, subject, dtype))
        else:
            for name, row_check in ROW_WISE.items():
                yield _checked(op, name, dtype, partial(row_check, subject, op, dtype))


def _checked(op: str, name: str, dtype: torch.dtype, run: Callable[[], str | None]) -> Invariant:
    try:
        return Invariant(op, name, dtype, run())
    except DeclinedError as error:
        return Invariant(op, name, dtype, None, str(error))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Invariant(op, name, dtype, f"{type(error).__name__}: {first}")


def _arguments(
    subject: Subject, dtype: torch.dtype, kind: Kind | None = None, sizes: Sizes = SIZES
) -> Arguments:
    draw = Draw(17, dtype)
    return attention_arguments(kind or Kind(), sizes, draw, with_lse=subject.with_lse)


def _several(subject: Subject, dtype: torch.dtype) -> Iterator[Arguments]:
    lengths = torch.tensor([70, 3, 23, 41])
    for kind, sizes in (
        (Kind(lambda s, draw: Causal()), SQUARE),
        (Kind(lambda s, draw: KeyLengths(lengths)), SIZES),
        (Kind(), DECODING),
    ):
        yield _arguments(subject, dtype, kind, sizes)


def _row_question(op: str, dtype: torch.dtype) -> RowQuestion:
    draw = Draw(23, dtype)
    if op == "masked_softmax":
        scores, grad = draw.normal(1, 1, *ROWS), draw.normal(1, 1, *ROWS)
        return RowQuestion(op, {"scores": scores}, (grad,))
    return norm_question(op, draw.normal(*ROWS), draw, ("weight", "bias"), {})


def _row(tensor: Tensor, row: int) -> Tensor:
    return tensor[..., row : row + 1, :]


def _faults(results: Results, question: AttentionQuestion, only: str | None = None) -> str | None:
    for found in judged(results, question):
        if found.fault is not None and only in (None, found.tensor):
            return f"{found.tensor}: {found.fault}"
    return None


def _difference(got: Results, expected: Results) -> str | None:
    """Where two results do not hold the same bits, NaN for NaN."""
    for name, tensor in got.items():
        other = expected[name]
        same = (tensor == other) | (tensor.isnan() & other.isnan())
        if not bool(same.all()):
            apart = float((tensor.double() - other.double()).abs().nan_to_num(torch.inf).max())
            share = 100 * float((~same).double().mean())
            return f"{name}: {share:.2g}% of the elements differ, by up to {apart:.2g}"
    return None


def _on_threads(run: Callable[[], Results]) -> str | None:
    with _threads(1):
        alone = run()
    for threads in (2, 3):
        with _threads(threads):
            fault = _difference(run(), alone)
        if fault is not None:
            return f"{threads} threads against one: {fault}"
    return None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
