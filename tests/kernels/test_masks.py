"""What each mask means, by loops; and that the kernels' form of a mask means the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch

from rowmax.kernels import Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window
from rowmax.kernels.api.masks import as_mask, structure_of

from .cases import CASES, Case, lengths

B, HQ, LQ, LK = 2, 3, 5, 8
IDS = torch.tensor([[0, 0, 1, 1, 7], [3, 1, 1, 3, 2]])
KEY_IDS = torch.tensor([[0, 0, 0, 1, 1, 7, 9, 9], [2, 1, 3, 3, 1, 1, 0, 5]])
TABLE = torch.rand(B, 1, LQ, LK, generator=torch.Generator().manual_seed(0)) < 0.6

Rule = Callable[[int, int, int, int], bool]
# mask -> may query i of head h in batch element b attend key j?
DEFINITIONS: list[tuple[str, Mask, Rule]] = [
    ("upper_left", Causal("upper_left"), lambda b, h, i, j: j <= i),
    ("lower_right", Causal("lower_right"), lambda b, h, i, j: j <= i + 3),
    ("offset", Causal(2), lambda b, h, i, j: j <= i + 2),
    ("offset_negative", Causal(-2), lambda b, h, i, j: j <= i - 2),
    ("offset_tensor", Causal(lengths(4, -1)), lambda b, h, i, j: j <= i + (4, -1)[b]),
    ("prefix", Causal(-1, lengths(3, 99)), lambda b, h, i, j: j <= i - 1 or j < (3, 99)[b]),
    (
        "prefix_offset_tensor",
        Causal(lengths(2, -3), lengths(-1, 6)),
        lambda b, h, i, j: j <= i + (2, -3)[b] or j < (-1, 6)[b],
    ),
    (
        "prefix_window",
        Causal(0, lengths(4, 6)) & Window(2, None, lengths(1, 0)),
        lambda b, h, i, j: (j <= i or j < (4, 6)[b]) and j >= i + (1, 0)[b] - 2,
    ),
    ("window", Window(1, 2, "upper_left"), lambda b, h, i, j: i - 1 <= j <= i + 2),
    ("window_left", Window(1, None, 3), lambda b, h, i, j: i + 3 - 1 <= j),
    ("window_right", Window(None, 2, -1), lambda b, h, i, j: j <= i - 1 + 2),
    ("window_none", Window(None, None, 0), lambda b, h, i, j: True),
    ("window_zero", Window(0, 0, "lower_right"), lambda b, h, i, j: j == i + 3),
    ("window_tensor", Window(1, 0, lengths(0, 2)), lambda b, h, i, j: -1 <= j - i - (0, 2)[b] <= 0),
    ("keys", KeyLengths(lengths(0, 6)), lambda b, h, i, j: j < (0, 6)[b]),
    ("keys_beyond", KeyLengths(lengths(99, -1)), lambda b, h, i, j: j < (99, -1)[b]),
    ("queries", QueryLengths(lengths(3, 99)), lambda b, h, i, j: i < (3, 99)[b]),
    ("documents", Documents(IDS, KEY_IDS), lambda b, h, i, j: bool(IDS[b, i] == KEY_IDS[b, j])),
    ("dense", Dense(TABLE), lambda b, h, i, j: bool(TABLE[b, 0, i, j])),
    (
        "joined",
        Causal(1) & KeyLengths(lengths(7, 2)) & Dense(TABLE),
        lambda b, h, i, j: j <= i + 1 and j < (7, 2)[b] and bool(TABLE[b, 0, i, j]),
    ),
]
BY_ID = pytest.mark.parametrize(
    "mask,rule", [entry[1:] for entry in DEFINITIONS], ids=[entry[0] for entry in DEFINITIONS]
)


@BY_ID
def test_dense_is_the_definition(mask: Mask, rule: Rule) -> None:
    expected = [
        [[[rule(b, h, i, j) for j in range(LK)] for i in range(LQ)] for h in range(HQ)]
        for b in range(B)
    ]
    dense = mask.dense(B, HQ, LQ, LK)
    assert dense.dtype == torch.bool
    assert dense.tolist() == expected


@pytest.mark.parametrize("other", [Causal(2), Window(3, 1), Causal(prefix=lengths(1, 2))])
def test_a_prefix_is_the_only_upper_bound(other: Mask) -> None:
    prefix = Causal(prefix=lengths(3, 4))
    for one, two in ((prefix, other), (other, prefix), (prefix & KeyLengths(lengths(1, 2)), other)):
        with pytest.raises(ValueError, match="`prefix`.*expected no other.*got a second"):
            one & two


@pytest.mark.parametrize("prefix", [torch.tensor([0.5, 1.0]), torch.tensor(3), 3])
def test_a_prefix_is_integers(prefix: object) -> None:
    with pytest.raises((TypeError, ValueError), match="Causal: `prefix`.*expected.*got"):
        Causal(prefix=prefix)  # type: ignore[arg-type]


def test_square_masks_need_no_alignment() -> None:
    assert torch.equal(Causal().dense(1, 1, 4, 4)[0, 0], torch.ones(4, 4).tril().bool())
    assert torch.equal(Window(1, 0).dense(1, 1, 4, 4), Window(1, 0, 0).dense(1, 1, 4, 4))
    shared = Documents(IDS).dense(B, HQ, LQ, LQ)
    assert torch.equal(shared, (IDS[:, None, :, None] == IDS[:, None, None]).expand_as(shared))


@pytest.mark.parametrize("case", [case for case in CASES if case.mask], ids=lambda case: case.name)
def test_the_structure_allows_what_dense_allows(case: Case) -> None:
    mask = as_mask("test", case.build(torch.float32).mask)
    assert mask is not None
    shape = case.shape.scores
    structure = structure_of(mask, shape, torch.empty(0))
    allowed = structure.allowed(*shape[2:], torch.device("cpu"))
    dense = mask.dense(*shape)
    if allowed is None:
        assert dense.all()
    else:
        assert torch.equal(allowed.expand(shape), dense)


@BY_ID
def test_masks_are_values(mask: Mask, rule: Rule) -> None:
    dense = mask.dense(B, HQ, LQ, LK)
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
        assert torch.equal(twin.dense(B, HQ, LQ, LK), dense)
    name = next(iter(vars(mask)))
    with pytest.raises(FrozenInstanceError):
        setattr(mask, name, None)


def test_conjunction_is_flat_and_takes_masks_only() -> None:
    a, b, c = Causal(), KeyLengths(lengths(1)), QueryLengths(lengths(2))
    assert ((a & b) & c).parts() == (a & (b & c)).parts() == (a, b, c)
    with pytest.raises(TypeError):
        a & torch.ones(1, dtype=torch.bool)


def test_documents_of_any_ids_join() -> None:
    """Ids far apart, negative, beyond 32 bits: joined, they agree where both pairs agree."""
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([-(2**63), -1, 0, 3, 2**40, 2**63 - 1])
    first, second = (
        Documents(
            values[torch.randint(6, (B, LQ), generator=generator)],
            values[torch.randint(6, (B, LK), generator=generator)],
        )
        for _ in "ab"
    )
    structure = structure_of(first & second, (B, HQ, LQ, LK), torch.empty(0))
    allowed = structure.allowed(LQ, LK, torch.device("cpu"))
    assert allowed is not None
    assert torch.equal(allowed.expand(B, HQ, LQ, LK), (first & second).dense(B, HQ, LQ, LK))
