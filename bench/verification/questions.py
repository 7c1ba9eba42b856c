"""A question put to a subject: inputs, and the oracle's answer, found once for all subjects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels.testing.oracle import Arguments, Results, gradients_of, magnitudes, naive, oracle
from ...kernels.testing.tolerance import SUMMATION, Judgement, judge
from .subjects import DeclinedError, Subject


class Answer(NamedTuple):
    """What is right for one tensor, how far off the naive path is, and the terms' magnitudes."""

    exact: Tensor  # float64
    plain: Tensor  # in the dtype that the result is to have
    magnitude: Tensor  # float64


class Question(Protocol):
    """Inputs of one function in one dtype."""

    @property
    def computed(self) -> torch.dtype:
        """The dtype that its sums are in."""

    @property
    def answers(self) -> dict[str, Answer]: ...

    def ask(self, subject: Subject) -> Results:
        """Outputs and gradients, on the CPU. Raises DeclinedError."""


@dataclass(frozen=True)
class Case:
    """A question by its name; made when it is put, with an lse or without."""

    op: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[bool], Question]

    @cached_property
    def _questions(self) -> dict[bool, Question]:
        return {}

    def question(self, with_lse: bool) -> Question:
        if with_lse not in self._questions:
            self._questions[with_lse] = self.make(with_lse)
        return self._questions[with_lse]

    def forget(self) -> None:
        """Gives back the memory of questions and answers."""
        self._questions.clear()

    def text(self) -> str:
        sizes = ",".join(map(str, self.shape))
        return f"{self.op} {self.kind} ({sizes}) {dtype_text(self.dtype)}"


@dataclass(frozen=True)
class Verdict:
    """What came of a case: judgements, or why there are none."""

    case: Case
    judgements: tuple[Judgement, ...] = ()
    declined: str | None = None  # the subject does not do this
    error: str | None = None  # it raised an error

    @property
    def passed(self) -> bool:
        return self.error is None and all(found.fault is None for found in self.judgements)

    @property
    def ratio(self) -> float:
        return max((found.ratio for found in self.judgements), default=0.0)

    @property
    def of_limit(self) -> float:
        return max((found.of_limit for found in self.judgements), default=0.0)

    @property
    def faults(self) -> list[str]:
        found = [f"{one.tensor}: {one.fault}" for one in self.judgements if one.fault is not None]
        return found if self.error is None else [self.error]


def put(case: Case, subject: Subject) -> Verdict:
    """The case judged; an error that the subject raises is a verdict, not the end of the run."""
    question = case.question(subject.with_lse)
    try:
        results = question.ask(subject)
    except DeclinedError as error:
        return Verdict(case, declined=str(error))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return Verdict(case, error=f"{type(error).__name__}: {lines[0]}")
    return Verdict(case, judged(results, question))


def judged(results: Results, question: Question) -> tuple[Judgement, ...]:
    answers = question.answers
    missing = [Judgement(name, "is missing") for name in answers if name not in results]
    found = [
        judge(name, got, *answers[name], question.computed)
        if name in answers
        else Judgement(name, "is no result of this function")
        for name, got in results.items()
    ]
    return (*found, *missing)


def answers_of(
    exact: Results, plain: Results, sizes: Results, dtype: torch.dtype, terms: int
) -> dict[str, Answer]:
    """The answers from sums of at most `terms` terms.

    In float64 the oracle is as wide as what it judges, and the naive path's error is not known. A
    sum of n terms, in whatever order, is then allowed the error that is to be expected of it,
    sqrt(n) * eps / 2 times their magnitudes (Higham & Mary 2019, theorem 2.4).
    """
    factor = max(1.0, terms**0.5 / (2 * SUMMATION)) if dtype == torch.float64 else 1.0
    return {name: Answer(exact[name], plain[name], sizes[name] * factor) for name in exact}


class AttentionQuestion:
    """`attention` on padded tensors."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments

    @property
    def computed(self) -> torch.dtype:
        return torch.promote_types(self.arguments.q.dtype, torch.float32)

    @cached_property
    def answers(self) -> dict[str, Answer]:
        exact, plain = oracle(self.arguments), naive(self.arguments)
        sizes = magnitudes(self.arguments)
        return answers_of(exact, plain, sizes, self.arguments.q.dtype, max(self.arguments.shape))

    def ask(self, subject: Subject) -> Results:
        return attention_results(subject, self.arguments)


def attention_results(subject: Subject, arguments: Arguments) -> Results:
    """out, lse where the subject has one, and the gradients, on the CPU."""
    leaves = arguments.on(subject.device).leaves()
    results = gradients_of(leaves, *subject.attention(leaves))
    return {name: tensor.cpu() for name, tensor in results.items()}


class PackedQuestion:
    """`attention_varlen`; the oracle sees the sequences padded, with lengths as masks.

    `arguments` hold the padded tensors, (B, H, L, D), without those masks.
    """

    def __init__(self, arguments: Arguments, padded: Arguments, lengths: tuple[Tensor, Tensor]):
        self._arguments, self._padded = arguments, padded
        self._lengths = lengths

    @property
    def computed(self) -> torch.dtype:
        return torch.promote_types(self._arguments.q.dtype, torch.float32)

    @cached_property
    def answers(self) -> dict[str, Answer]:
        exact, plain, sizes = (
            {name: self._pack(name, tensor) for name, tensor in results.items()}
            for results in (oracle(self._padded), naive(self._padded), magnitudes(self._padded))
        )
        return answers_of(exact, plain, sizes, self._arguments.q.dtype, max(self._padded.shape))

    def ask(self, subject: Subject) -> Results:
        arguments = self._arguments
        packed = replace(
            arguments,
            q=self._pack("q", arguments.q),
            k=self._pack("k", arguments.k),
            v=self._pack("v", arguments.v),
            grad_out=None if arguments.grad_out is None else self._pack("out", arguments.grad_out),
            grad_lse=None if arguments.grad_lse is None else self._pack("lse", arguments.grad_lse),
        )
        leaves = packed.on(subject.device).leaves()
        starts = [
            torch.cat((length.new_zeros(1), length.cumsum(0))).to(subject.device)
            for length in self._lengths
        ]
        results = gradients_of(leaves, *subject.packed(leaves, *starts))
        return {name: tensor.cpu() for name, tensor in results.items()}

    def _pack(self, name: str, tensor: Tensor) -> Tensor:
        """(B, H, L, D) -> (total, H, D), and lse (B, H, L) -> (H, total)."""
        if name.endswith("sinks"):
            return tensor
        of_keys = name.removeprefix("d_") in ("k", "v")
        lengths = self._lengths[1 if of_keys else 0]
        parts = [tensor[b, :, :length] for b, length in enumerate(lengths.tolist())]
        if name == "lse":
            return torch.cat(parts, dim=1)
        return torch.cat([part.transpose(0, 1) for part in parts])


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
