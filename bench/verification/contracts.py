"""What an implementation promises: rowmax's contract, or no more than torch's functions do.

What is not promised is reported all the same, but is no failure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.testing.oracle import AttentionCase, Results
from ...kernels.testing.tolerance import Expected
from ..measure.gate import PEER_FACTORS


@dataclass(frozen=True)
class Contract:
    """`kinds` of cases, of one op where it stands before, and `invariants` that are not promised.

    Without `exact`, results are held to the rule that `speed` has for peers: a larger factor, of
    the naive path in the dtype of the inputs throughout.
    """

    name: str
    kinds: frozenset[str] = frozenset()
    invariants: frozenset[str] = frozenset()
    exact: bool = True

    def promises(self, op: str, kind: str) -> bool:
        """Whether cases of this kind are among what it promises."""
        return kind not in self.kinds and f"{op} {kind}" not in self.kinds

    def factor(self, dtype: torch.dtype) -> float | None:
        return None if self.exact else PEER_FACTORS[dtype]

    def expected(self, case: object, found: dict[str, Expected]) -> dict[str, Expected]:
        """What the results of `case` are held to, from what rowmax's are."""
        if self.exact or not isinstance(case, AttentionCase):
            return found
        plain = _plain(case)
        return {
            name: one._replace(naive=plain[name]) if name in plain else one
            for name, one in found.items()
        }


ROWMAX = Contract("rowmax")
CONTRACTS = {
    one.name: one
    for one in (
        ROWMAX,
        Contract(
            "torch",
            # torch.softmax gives NaN in a row that allows nothing, and the gradient of torch's
            # rms_norm loses its digits where rows are large
            kinds=frozenset(
                {
                    *("poisoned-padding", "poisoned-bias"),
                    *("masked_softmax key-lengths", "rms_norm large-rows"),
                }
            ),
            invariants=frozenset(
                {
                    *("NaN in padding", "rows without keys", "same bits again"),
                    *("any thread count", "alone as in a batch"),
                }
            ),
            exact=False,
        ),
    )
}


def _plain(case: AttentionCase) -> Results:
    """Attention as the equation has it, under autograd, in the dtype of the inputs throughout."""

    def kernel(*_tensors: object, **_options: object) -> torch.Tensor:
        problem = leaves.naive_problem()
        q, k, v = problem.query, problem.key, problem.value
        groups = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        scores = (q * problem.scale) @ k.transpose(-1, -2)
        if problem.bias is not None:
            scores = scores + problem.bias
        allowed = problem.mask.allowed(q.shape[2], k.shape[2], q.device)
        if allowed is None:
            return scores.softmax(-1) @ v
        none = ~allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(none, 0.0)
        return scores.softmax(-1).masked_fill(none, 0.0) @ v

    leaves = case.without_lse().leaves()
    return leaves._results(kernel())
