"""`verify`: the whole suite run on the backends here, or on a stranger's function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from types import ModuleType
from typing import Any

import torch

from ...console import from_extra
from ...kernels.backends import dispatch
from ...kernels.testing import DTYPES as ALL_DTYPES
from ...kernels.testing.cases import NamedCase, Shape, dtype_text
from ...kernels.testing.suite import ALL_KINDS, OPS, named_cases
from ..candidate import Candidate, load
from ..candidate.interface import OPS as CANDIDATE_OPS
from ..conduct.guard import Guard
from ..machine.host import describe
from . import cheating, invariants, mutation
from .contracts import CONTRACTS
from .implementations import Backend, Foreign, Implementation
from .outcome import Findings, Report
from .runs import Run
from .runs import run as run_case

DTYPES = {dtype_text(dtype): dtype for dtype in ALL_DTYPES}
QUICK_DTYPES = ("float32", "bfloat16")
CHECKS = ("oracle", "accuracy", "invariants", "determinism", "mutations", "cheats")


@dataclass(frozen=True)
class Settings:
    """The selection of checks; every name is one of OPS, ALL_KINDS, DTYPES and CHECKS."""

    ops: tuple[str, ...] = OPS
    kinds: tuple[str, ...] = ALL_KINDS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    checks: tuple[str, ...] = CHECKS
    shapes: tuple[Shape, ...] = ()  # of attention, in place of the suite's own
    quick: bool = False
    contract: str = "rowmax"  # of CONTRACTS


class Listener:
    """Callbacks of a run's progress, which do nothing here."""

    def opened(self, report: Report) -> None: ...  # to which all that is found will be added
    def begin(self, total: int) -> None: ...
    def step(self, description: str) -> None: ...
    def ran(self, implementation: str, run: Run) -> None: ...


def verify(
    function: Callable[..., Any] | str | None = None,
    *,
    name: str | None = None,
    backends: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
    shapes: Sequence[Sequence[int]] = (),
    quick: bool = False,
    contract: str = "rowmax",
    layout: str | None = None,
    backward: bool = True,
    device: torch.device | str = "cpu",
    listener: Listener | None = None,
) -> Report:
    """Holds kernels to the float64 oracle, forward and every gradient, and reports what it finds.

    Args:
        function: an attention, norm or softmax, run on `device`, or where it is to be found, as
            `--function` says it; its arguments are known by their names. What it computes is said
            by `ops`, where that is one, or else by its own name; attention by default. None takes
            the backends of rowmax.kernels.
        name: what the report calls `function`; its own name when None.
        backends: names of backends, without `function`; those that work here when None.
        ops: of "attention", "attention_varlen", "layer_norm", "add_layer_norm", "rms_norm",
            "masked_softmax", "linear_cross_entropy". kinds: of masks and options, see `ALL_KINDS`.
        dtypes: of "float64", "float32", "bfloat16", "float16"; all when None, with `quick`
            float32 and bfloat16.
        checks: of "oracle" (against mpmath), "accuracy" (adversarial inputs too), "invariants",
            "determinism" (those of them that ask for the same bits: again, on any number of
            threads, alone as in a batch), "mutations" (of kernels broken on purpose: whether the
            suite notices), "cheats" (of candidates that look faster or more right than they are);
            all when None.
        shapes: (B, Hq, Hkv, Lq, Lk, D, Dv) each, for attention in place of the suite's own.
        contract: "rowmax", or "torch" for what promises no more than torch's functions do: what
            is not promised is reported, but is no failure.
        layout: of q, k and v: "bhld", "blhd" or "packed", which cu_seqlens_q tells by itself.
        backward: False where `function` has no gradients.
        quick: fewer shapes and dtypes: less than a minute once kernels are compiled.

    Returns:
        a `Report`: `print(report)`, `report.passed`, `report.as_json()`, `report.as_html()`.

    Raises:
        TypeError: `function` is not callable. ValueError: an unknown name, a shape that is none.
        RuntimeError: a named backend that does not work here.
    """
    chosen = None if dtypes is None and not quick else (dtypes or QUICK_DTYPES)
    settings = Settings(
        ops=_names("ops", ops, OPS),
        kinds=_names("kinds", kinds, ALL_KINDS),
        dtypes=_names("dtypes", chosen, tuple(DTYPES)),
        checks=_names("checks", checks, CHECKS),
        shapes=tuple(sizes_of(shape) for shape in shapes),
        quick=quick,
        contract=_names("contract", (contract,), tuple(CONTRACTS))[0],
    )
    if function is None and contract != "rowmax":
        raise ValueError(f"verify: contract: backends have rowmax's, got {contract!r}")
    if function is None:
        return run(list(map(Backend, available(backends))), settings, listener or Listener())
    guard = Guard()
    op = None if ops is None else named_op(settings.ops)
    if isinstance(function, str):
        candidate = load(function, op=op, layout=layout, backward=backward)
    else:
        try:
            candidate = Candidate(function, name, op=op, layout=layout, backward=backward)
        except (TypeError, ValueError) as error:
            raise type(error)(f"verify: {error}") from error
    one = Foreign(candidate, name, device, guard, CONTRACTS[settings.contract])
    return run([one], with_ops_of(settings, one), listener or Listener())


def named_op(ops: Sequence[str]) -> str | None:
    """What a stranger's function computes, where the ops asked for say it."""
    known = ["attention" if op == "attention_varlen" else op for op in ops]
    chosen = [op for op in dict.fromkeys(known) if op in CANDIDATE_OPS]
    return chosen[0] if len(chosen) == 1 else None


def with_ops_of(settings: Settings, one: Implementation) -> Settings:
    """The ops that it has, of those asked for."""
    return replace(settings, ops=tuple(op for op in settings.ops if op in one.ops))


def available(names: Sequence[str] | None = None) -> list[str]:
    """The backends that work here, or those of `names`. Raises ValueError, RuntimeError."""
    if names is None:
        return [name for name, reason in dispatch.installation().items() if reason is None]
    for name in _names("backends", names, dispatch.NAMES):
        reason = dispatch.unavailable(name)
        if reason is not None:
            raise RuntimeError(f"verify: backend {name} does not work here: {reason}")
    return list(names)


def run(
    implementations: Sequence[Implementation], settings: Settings, listener: Listener
) -> Report:
    """All checks, dtype by dtype, so that each oracle serves all and is then let go."""
    started, began = perf_counter(), process_time()
    report = Report(
        describe(), {**vars(settings), "implementations": [one.name for one in implementations]}
    )
    report.findings = [Findings(implementation.name) for implementation in implementations]
    listener.opened(report)
    cases = {name: cases_of(settings, DTYPES[name]) for name in settings.dtypes}
    listener.begin(_steps(implementations, settings, cases))
    if "oracle" in settings.checks:
        for check in _high_precision().check(settings.ops):
            report.oracle.append(check)
            listener.step("oracle")
    for name, of_dtype in cases.items():
        dtype = DTYPES[name]
        for implementation, findings in zip(implementations, report.findings, strict=True):
            description = f"{implementation.name}, {name}"
            if "accuracy" in settings.checks:
                for case in of_dtype:
                    if case.op in implementation.ops:
                        findings.runs.append(run_case(case, implementation))
                        listener.ran(implementation.name, findings.runs[-1])
                    listener.step(description)
            if {"invariants", "determinism"} & set(settings.checks):
                only = _invariants_of(settings)
                for invariant in invariants.check(implementation, settings.ops, dtype, only):
                    findings.invariants.append(invariant)
                    listener.step(description)
        if "mutations" in settings.checks:
            full = _mutation_cases(settings, of_dtype, dtype)
            for found in mutation.check(settings.ops, dtype, full, thorough=False):
                report.mutations.append(found)
                listener.step(f"mutants, {name}")
        for case in of_dtype:
            case.forget()
    if _has_cheats(settings):
        for found in cheating.check():
            report.mutations.append(found)
            listener.step("cheats")
    report.seconds = perf_counter() - started
    report.processor_seconds = process_time() - began
    return report


def cases_of(settings: Settings, dtype: torch.dtype) -> list[NamedCase]:
    return named_cases(
        settings.ops, dtype, settings.kinds, shapes=settings.shapes, quick=settings.quick
    )


def _mutation_cases(
    settings: Settings, cases: list[NamedCase], dtype: torch.dtype
) -> list[NamedCase]:
    """The cases of mutants: all kinds, however the run was narrowed, at the quick shapes.

    A mutant of dropout is right wherever nothing is dropped: that is no fault of the tolerance.
    """
    wanted = replace(settings, kinds=ALL_KINDS, shapes=(), quick=True)
    known = {(case.op, case.kind, case.shape): case for case in cases}
    return [known.get((case.op, case.kind, case.shape), case) for case in cases_of(wanted, dtype)]


def _steps(
    implementations: Sequence[Implementation], settings: Settings, cases: dict[str, list[NamedCase]]
) -> int:
    total = 0
    if "oracle" in settings.checks:
        total += _high_precision().count(settings.ops)
    if _has_cheats(settings):
        total += cheating.count()
    for name, of_dtype in cases.items():
        if "accuracy" in settings.checks:
            total += len(implementations) * len(of_dtype)
        if {"invariants", "determinism"} & set(settings.checks):
            only = _invariants_of(settings)
            total += sum(invariants.count(one, settings.ops, only) for one in implementations)
        if "mutations" in settings.checks:
            total += mutation.count(settings.ops, DTYPES[name])
    return total


def _invariants_of(settings: Settings) -> tuple[str, ...] | None:
    """Determinism is a part of them; None: all of them."""
    return None if "invariants" in settings.checks else invariants.DETERMINISM


def _has_cheats(settings: Settings) -> bool:
    here = "attention" in settings.ops and dtype_text(cheating.DTYPE) in settings.dtypes
    return "cheats" in settings.checks and here


def _high_precision() -> ModuleType:
    """Imported where the oracle is to be checked: nothing else needs mpmath."""
    with from_extra("bench"):
        from . import high_precision
    return high_precision


def _names(argument: str, names: Iterable[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The names given, in the order of `known`; all of them when None."""
    if names is None:
        return tuple(known)
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"verify: {argument}: expected names of {known}, got {name!r}")
    return tuple(name for name in known if name in chosen)


def sizes_of(shape: Sequence[int]) -> Shape:
    expected = "7 ints >= 1, (B, Hq, Hkv, Lq, Lk, D, Dv), Hq a multiple of Hkv"
    if len(shape) != 7 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"verify: shapes: expected {expected}, got {tuple(shape)}")
    sizes = Shape(*shape)
    if sizes.Hq % sizes.Hkv != 0:
        raise ValueError(f"verify: shapes: expected {expected}, got {tuple(shape)}")
    return sizes
