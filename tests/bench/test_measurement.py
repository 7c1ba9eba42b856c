"""`speed` as a function: a column for anyone's own attention, and none for one that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from rowmax.bench import speed

pytestmark = pytest.mark.usefixtures("small_machine")

SMALL: dict[str, Any] = {
    "shapes": [(1, 2, 16, 8)],
    "kinds": ["causal"],
    "peers": ["sdpa"],
    "seconds": 0.01,
    "backend": "reference",
    "backward": False,
}


def test_ones_own_attention_has_a_column() -> None:
    def mine(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    found = speed(mine, name="mine", **SMALL)
    (row,) = found.rows
    assert set(row.timings) == {"rowmax", "sdpa", "mine"}
    assert " mine " in str(found)


def test_a_former_kind() -> None:
    with pytest.warns(DeprecationWarning, match="kinds: 'plain' is deprecated: use 'full'"):
        (row,) = speed(**{**SMALL, "kinds": ["plain"]}).rows
    assert row.case.kind == "full"


def test_one_that_is_wrong_is_not_timed() -> None:
    def mine(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return 1.1 * F.scaled_dot_product_attention(query, key, value, **options)

    (row,) = speed(mine, **SMALL).rows
    assert "yours" not in row.timings
    assert "largest error" in row.faults["yours"]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"kinds": ["odd"]}, "kinds: expected full"),
        ({"shapes": [(1, 2)]}, "shapes: expected 4, 5 or 6 sizes"),
        ({"peers": ["nobody"]}, "got 'nobody'"),
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ({"name": "sdpa"}, "the name of another column"),
        ({"kinds": ["cross"]}, "nothing to measure"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        speed(**{**SMALL, **changed})
