"""Masks draw what they mean: cell by cell, shrunk, of sizes that they know or are told."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rowmax.kernels import Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window
from rowmax.kernels.api import drawing
from rowmax.kernels.api.masks import MaskStructure

from .cases import lengths
from .test_masks import BY_ID, HQ, IDS, KEY_IDS, LK, LQ, TABLE, B, Rule


@BY_ID
@pytest.mark.parametrize("b", range(B))
def test_each_cell_is_a_pair(mask: Mask, rule: Rule, b: int) -> None:
    drawn = mask.show(LQ, LK, batch=b if "batch element" in str(mask.show(LQ, LK)) else None)
    expected = [["██" if rule(b, 0, i, j) else "· " for j in range(LK)] for i in range(LQ)]
    lines = str(drawn).splitlines()[-LQ:]
    assert lines == ["".join(row).rstrip() for row in expected]


def test_a_combination_with_its_batch_elements_side_by_side() -> None:
    assert str((Causal() & KeyLengths(lengths(4, 2))).show()) == (
        "Causal() & KeyLengths([4, 2]): 4 queries x 4 keys\n"
        "batch element 0   batch element 1\n"
        "██· · ·           ██· · ·\n"
        "████· ·           ████· ·\n"
        "██████·           ████· ·\n"
        "████████          ████· ·"
    )


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_large_is_shrunk(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell has the share of its pairs; where these are too many, of some of the queries."""
    if not exact:
        monkeypatch.setattr(drawing, "EXACT", 0)
    Lq, Lk, cell = 90, 105, 11
    documents = Documents(torch.arange(Lq)[None] // 25, torch.arange(Lk)[None] // 30)
    mask = Window(40, 9, "lower_right") & documents & KeyLengths(lengths(99))
    (shares,) = mask.show(Lq, Lk, most=10).shares
    dense = mask.dense(1, 1, Lq, Lk)[0, 0].double()
    for at, row in enumerate(shares):
        for to, share in enumerate(row):
            block = dense[at * cell : (at + 1) * cell, to * cell : (to + 1) * cell]
            assert abs(share - block.mean()) <= (1e-6 if exact else 0.15)
            assert not share or block.any()
    assert (len(shares), len(shares[0])) == (9, 10)
    assert "90 queries x 105 keys, a cell stands for 11 x 11" in mask.show(Lq, Lk, most=10).title


def test_what_is_drawn_alone_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large batch the elements that are not drawn cost nothing."""
    made: list[int] = []
    allowed = MaskStructure.allowed

    def noted(structure: MaskStructure, Lq: int, Lk: int, device: torch.device) -> Tensor | None:
        found = allowed(structure, Lq, Lk, device)
        assert found is not None
        made.append(found.numel() // (Lq * Lk))
        return found

    monkeypatch.setattr(MaskStructure, "allowed", noted)
    table = torch.ones(40, HQ, 6, 6, dtype=torch.bool)
    documents = Documents(torch.zeros(40, 6, dtype=torch.int64))
    aligned = Causal(torch.zeros(40, dtype=torch.int64))
    (Dense(table) & documents & aligned & KeyLengths(lengths(*range(1, 41)))).show(head=1)
    assert made == [1] * 6 * 4


def test_a_million_keys() -> None:
    (shares,) = Causal().show(10**6, most=4).shares
    assert [[["none", "part", "all"][(x > 0) + (x == 1)] for x in row] for row in shares] == [
        [*("all",) * at, "part", *("none",) * (3 - at)] for at in range(4)
    ]


def test_parts_are_shades() -> None:
    quarter = torch.zeros(4, 4, dtype=torch.bool)
    quarter[:2, :2] = torch.tensor([[True, False], [False, False]])
    quarter[:2, 2:] = torch.tensor([[True, True], [False, False]])
    quarter[2:, :2] = torch.tensor([[True, True], [True, False]])
    assert str(Dense(quarter).show(most=2)).splitlines()[1:] == ["░░▒▒", "▓▓·"]


@pytest.mark.parametrize(
    "mask,sizes",
    [
        (Causal(), (16, 16)),
        (KeyLengths(lengths(5, 9)), (9, 9)),
        (QueryLengths(lengths(5, 9)) & KeyLengths(lengths(12, 3)), (12, 12)),
        (Documents(IDS), (5, 5)),
        (Documents(IDS, KEY_IDS), (5, 8)),
        (Dense(TABLE), (5, 8)),
        (Dense(torch.ones(2, 1, 1, 7, dtype=torch.bool)), (7, 7)),  # padding, for any query
        (Dense(torch.ones(6, 1, dtype=torch.bool)) & KeyLengths(lengths(3)), (6, 6)),
        (Causal(1) & Dense(TABLE), (5, 8)),
        (KeyLengths(lengths(0, 0)), (1, 1)),
    ],
)
def test_sizes_that_masks_know(mask: Mask, sizes: tuple[int, int]) -> None:
    for grid in mask.show().shares:
        assert (len(grid), len(grid[0])) == sizes


def test_titles() -> None:
    assert Window(3, None).show().title.startswith("Window(3, None): 16")
    assert Causal(prefix=lengths(2)).show().title.startswith("Causal(prefix=[2]): ")
    assert Documents(IDS, KEY_IDS).show().title.startswith("Documents((2, 5), (2, 8)): ")
    heads = Dense(torch.eye(6, dtype=torch.bool).expand(1, HQ, 6, 6))
    assert heads.show(head=2).title.endswith("6 keys, head 2 of 3")
    many = KeyLengths(torch.arange(1, 10)).show()
    assert many.title.endswith("9 keys, the first 4 of 9 batch elements")
    assert many.names == tuple(f"batch element {b}" for b in range(4))


def test_a_head_is_its_own() -> None:
    tables = torch.rand(2, HQ, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    for b in range(2):
        for head in range(HQ):
            (shares,) = Dense(tables).show(batch=b, head=head).shares
            assert shares == tuple(map(tuple, tables[b, head].double().tolist()))


@pytest.mark.parametrize("mask", [Causal(), Dense(TABLE), KeyLengths(lengths(30, 70)) & Causal()])
def test_the_picture_shows_the_same(mask: Mask) -> None:
    drawn = mask.show(most=20)
    svg = ElementTree.fromstring(drawn.svg())
    allowed = 0.0
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        if "fill-opacity" in rect.attrib:
            cells = (float(rect.attrib["width"]) + 1) / drawing.CELL
            allowed += cells * float(rect.attrib["fill-opacity"])
    expected = sum(max(x, 0.15) for grid in drawn.shares for row in grid for x in row if x)
    assert allowed == pytest.approx(expected, abs=0.01 * expected)
    assert drawn.svg() in drawn._repr_html_()
    assert mask._repr_html_() == mask.show()._repr_html_()
    assert repr(drawn) == str(drawn)


def test_names_in_a_picture_are_text() -> None:
    """And no markup."""
    drawn = drawing.Drawing("a < b & c", ("<b>",), (((1.0,),),))
    assert "<b>" not in drawn._repr_html_()
    ElementTree.fromstring(drawn._repr_html_())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"batch": 2}, "`batch`: expected one of 0 to 1, got 2"),
        ({"head": 1}, "`head`: expected one of 0 to 0, got 1"),
        ({"Lq": 0}, "`Lq`: expected a number above 0, got 0"),
        ({"most": 0}, "`most`"),
        ({"Lq": 3}, "`align` is needed"),
    ],
)
def test_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        (Causal() & KeyLengths(lengths(4, 2))).show(Lk=5, **options)


def test_a_picture_styles_nothing_but_itself() -> None:
    """In a page, where a style sheet within it would be one of the page."""
    svg = ElementTree.fromstring(KeyLengths(lengths(3, 2)).show().svg())
    assert {element.tag.partition("}")[2] for element in svg.iter()} == {
        "svg",
        "title",
        "rect",
        "text",
    }
    assert all("class" not in element.attrib for element in svg.iter())


@pytest.mark.parametrize(
    "mask,reason",
    [
        (Causal() & Dense(TABLE), "Causal() &amp; Dense((2, 1, 5, 8)) is not drawn: mask: `align`"),
        (KeyLengths(lengths(1)[:0]), "one of no batch elements"),
        (Causal(torch.tensor(3)), "`align`: expected shape (B,)"),
        (KeyLengths(lengths(3, 1).to("meta")), "(2,) without values, on meta"),
        (Causal() & Dense(TABLE.to("meta")), "(2, 1, 5, 8) without values, on meta"),
    ],
)
def test_a_notebook_says_why_it_shows_no_picture(mask: Mask, reason: str) -> None:
    """Not by an error, which a cell that only names the mask did not ask for."""
    with pytest.raises(ValueError, match="expected|needed"):
        mask.show()
    assert reason in mask._repr_html_()
    ElementTree.fromstring(mask._repr_html_())


@pytest.mark.parametrize("kind", ["meta", "fake", "vmap"])
def test_a_mask_without_values_is_refused(kind: str) -> None:
    def drawn(x: Tensor) -> Tensor:
        mask = KeyLengths(x) & Causal()
        with pytest.raises(ValueError, match="`mask`: expected one whose tensors have values"):
            mask.show(4, 4)
        assert "KeyLengths((2,)) &amp; Causal() is not drawn: show: `mask`" in mask._repr_html_()
        return x

    if kind == "vmap":
        torch.vmap(drawn)(torch.ones(3, 2, dtype=torch.int64))
    elif kind == "fake":
        with FakeTensorMode():
            drawn(torch.ones(2, dtype=torch.int64))
    else:
        drawn(torch.ones(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("name", ["Lq", "Lk", "batch", "head", "most"])
@pytest.mark.parametrize("value", [2.0, "2", True])
def test_sizes_are_ints(name: str, value: object) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(TypeError, match=f"show: `{name}`: expected an int"):
        Causal().show(**given)
