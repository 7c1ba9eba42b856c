"""One implementation run on one named case."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ...kernels.testing.cases import NamedCase
from ...kernels.testing.tolerance import Accuracy, accuracies
from ..options import told
from .implementations import DeclinedError, Implementation, contract_of


@dataclass(frozen=True)
class Run:
    """How accurate each result is, or why there is none."""

    case: NamedCase
    accuracies: tuple[Accuracy, ...] = ()
    declined: str | None = None  # the implementation does not do this
    error: str | None = None  # it raised an error
    promised: bool = True  # by the contract that it is held to; else a fault is no failure

    @property
    def passed(self) -> bool:
        return self.error is None and all(found.fault is None for found in self.accuracies)

    @property
    def failed(self) -> bool:
        """Whether it is not as it was promised."""
        return self.promised and not self.passed

    @property
    def ratio(self) -> float:
        return max((found.ratio for found in self.accuracies), default=0.0)

    @property
    def of_limit(self) -> float:
        """The worst error in units of what is allowed: 1 is the limit, and inf no number."""
        numbers = [
            inf if one.fault and one.of_limit <= 1 else one.of_limit for one in self.accuracies
        ]
        return inf if self.error is not None else max(numbers, default=0.0)

    @property
    def faults(self) -> list[str]:
        found = [f"{one.tensor}: {one.fault}" for one in self.accuracies if one.fault is not None]
        return found if self.error is None else [self.error]


def run(case: NamedCase, implementation: Implementation) -> Run:
    """An error that the implementation raises is a result, not the end of the run."""
    contract = contract_of(implementation)
    promised = contract.promises(case.op, case.kind)
    test_case = case.case(with_lse=implementation.with_lse, backward=implementation.backward)
    try:
        results = test_case.run(implementation.kernel(case.op), implementation.device)
    except DeclinedError as error:
        return Run(case, declined=str(error))
    except Exception as error:
        return Run(case, error=told(error), promised=promised)
    expected = contract.expected(test_case, test_case.expected)
    factor = contract.factor(case.dtype)
    found = accuracies(results, expected, test_case.sum_dtype, factor)
    return Run(case, found, promised=promised)
