"""Masks draw themselves: `mask.show()` as text, in notebooks and as `.svg()` as a picture.

What is drawn is the form that the kernels use (`MaskStructure`), not `dense`, which nobody can make
for a hundred thousand keys.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import fail_type, fail_value

if TYPE_CHECKING:
    from .masks import Mask, MaskStructure

USUAL = 16  # queries and keys where a mask itself has no size
EXACT = 2**24  # pairs up to which all are counted; of more, SAMPLED queries in a cell
SAMPLED = 8
ELEMENTS = 4  # batch elements in one drawing
WIDTH = 100  # columns of text
CELL = 8  # units of a picture
# Below a picture's cells. Attributes, for a <style> would be that of all the page it is put in.
NONE = 'fill="#888" opacity=".15"'


class Drawn:
    """A mask's drawing; `Mask` derives from it."""

    def parts(self) -> tuple[Mask, ...]:
        raise NotImplementedError

    def _structure(self, shape: tuple[int, int, int, int], like: Tensor) -> MaskStructure:
        raise NotImplementedError

    def show(
        self,
        Lq: int | None = None,
        Lk: int | None = None,
        *,
        batch: int | None = None,
        head: int = 0,
        most: int = 32,
    ) -> Drawing:
        """The mask as a drawing: text at a prompt and for `print`, a picture in a notebook.

        Queries go down, keys across. Where either has more than `most`, each cell stands for
        several and shows how much of it is allowed.

        Args:
            Lq, Lk: numbers of queries and keys. By default what the mask says (its document ids,
                its bool tensor, its longest length), for both where it says one, else 16.
            batch: the batch element to draw; by default the first four, where they may differ.
            head: the query head to draw, where a bool tensor has several.
            most: cells down and across.
        """
        given = {"Lq": Lq, "Lk": Lk, "batch": batch, "head": head, "most": most}
        for name, number in given.items():
            optional = name not in ("head", "most")
            if type(number) is not int and not (optional and number is None):
                fail_type("show", name, type(number).__name__, "an int" + ", or None" * optional)
        for x in _tensors(self.parts()):
            if not _has_values(x):
                got = f"a tensor of shape {tuple(x.shape)} without values, on {x.device}"
                fail_value("show", "mask", got, "one whose tensors have values")
        sizes = _sizes(self.parts())
        Lq, Lk = _lengths(Lq, Lk, sizes)
        B, H = sizes.get("B", 1), sizes.get("H", 1)
        if B == 0:
            fail_value("show", "mask", "one of no batch elements", "at least one to draw")
        for name, value, count in (("batch", batch or 0, B), ("head", head, H)):
            if not 0 <= value < count:
                fail_value("show", name, str(value), f"one of 0 to {count - 1}")
        for name, value in (("Lq", Lq), ("Lk", Lk), ("most", most)):
            if value < 1:
                fail_value("show", name, str(value), "a number above 0")
        cell = -(-max(Lq, Lk) // most)
        structure = self._structure((B, H, Lq, Lk), torch.empty(0, device=_device(self.parts())))
        elements = range(min(B, ELEMENTS)) if batch is None else (batch,)
        shares = [_shares(_one(structure, b, head), Lq, Lk, cell) for b in elements]
        title = f"{_title(self.parts())}: {Lq} queries x {Lk} keys"
        if H > 1:
            title += f", head {head} of {H}"
        if cell > 1:
            title += f", a cell stands for {cell} x {cell}"
        if 1 < len(elements) < B:
            title += f", the first {len(elements)} of {B} batch elements"
        names = [f"batch element {b}" if B > 1 else "" for b in elements]
        return Drawing(title, tuple(names), tuple(shares))

    def _repr_html_(self) -> str:
        """What a notebook shows of a mask: where its sizes alone draw none, the reason."""
        try:
            return self.show()._repr_html_()
        except (TypeError, ValueError) as error:
            return f"<pre>{html.escape(f'{_title(self.parts())} is not drawn: {error}')}</pre>"


@dataclass(frozen=True)
class Drawing:
    """What `mask.show()` returns: `str` and a prompt give the text, a notebook the picture.

    shares: of each batch element that is drawn, the share that is allowed of each cell.
    """

    title: str
    names: tuple[str, ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]

    def __str__(self) -> str:
        blocks = []
        for name, grid in zip(self.names, self.shares, strict=True):
            rows = ["".join(map(_characters, row)) for row in grid]
            lines = [name, *rows] if name else rows
            width = max(map(len, lines))
            blocks.append([line.ljust(width) for line in lines])
        if sum(len(block[0]) + 3 for block in blocks) <= WIDTH:
            lines = ["   ".join(row).rstrip() for row in zip(*blocks, strict=True)]
        else:
            lines = [line.rstrip() for block in blocks for line in block]
        return "\n".join((self.title, *lines))

    __repr__ = __str__

    def svg(self) -> str:
        """The same as a picture: what is allowed is dark."""
        parts, left = [], 0
        top = 2 * CELL if any(self.names) else 0
        for name, grid in zip(self.names, self.shares, strict=True):
            if name:
                parts.append(
                    f'<text x="{left}" y="{CELL + 3}" font-family="sans-serif" font-size="11" '
                    f'fill="#888">{html.escape(name)}</text>'
                )
            height, width = len(grid) * CELL, len(grid[0]) * CELL
            parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" {NONE}/>')
            parts += [
                f'<rect x="{left + start * CELL}" y="{top + at * CELL}" '
                f'width="{count * CELL - 1}" height="{CELL - 1}" '
                f'fill-opacity="{max(share, 0.15):.2f}"/>'
                for at, row in enumerate(grid)
                for start, count, share in _runs(row)
            ]
            left += max(width, 6 * len(name)) + 2 * CELL
        size = (left - 2 * CELL, top + CELL * len(self.shares[0]))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
            f'viewBox="0 0 {size[0]} {size[1]}" role="img" fill="#3b5bdb">'
            f"<title>{html.escape(self.title)}</title>"
            f"{''.join(parts)}</svg>"
        )

    def _repr_html_(self) -> str:
        return f"<figure>{self.svg()}<figcaption>{html.escape(self.title)}</figcaption></figure>"


def _characters(share: float) -> str:
    if share in (0.0, 1.0):
        return "██" if share else "· "
    return 2 * "░▒▓"[min(int(3 * share), 2)]


def _runs(row: Sequence[float]) -> list[tuple[int, int, float]]:
    """(start, count, share) of neighbours that allow the same, something at all."""
    runs: list[tuple[int, int, float]] = []
    for at, share in enumerate(row):
        if runs and sum(runs[-1][:2]) == at and runs[-1][2] == share:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, share)
        elif share:
            runs.append((at, 1, share))
    return runs


def _one(structure: MaskStructure, b: int, head: int) -> MaskStructure:
    """The structure of one batch element and head, of which the tensors may have one for all."""
    fields: dict[str, Any] = {
        name: value[b : b + 1] if value.shape[0] > 1 else value
        for name, value in structure._asdict().items()
        if isinstance(value, Tensor)
    }
    if structure.dense is not None and structure.dense.shape[1] > 1:
        fields["dense"] = fields["dense"][:, head : head + 1]
    return structure._replace(**fields)


def _shares(structure: MaskStructure, Lq: int, Lk: int, cell: int) -> tuple[tuple[float, ...], ...]:
    """Of each cell x cell queries and keys, how many may attend; `structure` is `_one`'s."""
    device = next((x.device for x in structure if isinstance(x, Tensor)), torch.device("cpu"))

    def allowed(start: int, count: int) -> Tensor:
        found = structure.rows(start, count).allowed(count, Lk, device)
        if found is None:
            return torch.ones(count, Lk)
        return found[0, 0].expand(count, Lk).to("cpu", torch.float32)

    grid = []
    for start in range(0, Lq, cell):
        count = min(cell, Lq - start)
        if Lq * Lk <= EXACT or count <= SAMPLED:
            rows = allowed(start, count).mean(0)
        else:
            steps = (start + (count - 1) * n // (SAMPLED - 1) for n in range(SAMPLED))
            rows = torch.cat([allowed(step, 1) for step in steps]).mean(0)
        pooled = F.avg_pool1d(rows[None], min(cell, Lk), ceil_mode=True, count_include_pad=False)
        grid.append(tuple(pooled[0].tolist()))
    return tuple(grid)


def _sizes(parts: Sequence[Mask]) -> dict[str, int]:
    """What the tensors of the masks say of B, H, Lq and Lk; "longest" of lengths is only a hint."""
    sizes: dict[str, int] = {}

    def note(name: str, size: int) -> None:
        sizes[name] = max(sizes.get(name, 0), size)

    for part in parts:
        for name, value in vars(part).items():
            if not isinstance(value, Tensor):
                continue
            if name == "tensor":  # of one that is broadcast nothing is known
                for side, size in zip(("Lk", "Lq", "H", "B"), value.shape[::-1], strict=False):
                    if size > 1:
                        note(side, size)
                continue
            if value.dim() > 0:
                note("B", value.shape[0])
            if name in ("ids", "key_ids"):
                note("Lk" if name == "key_ids" else "Lq", value.shape[1])
                if vars(part)["key_ids"] is None:
                    note("Lk", value.shape[1])
            elif name == "lengths" and value.numel():
                note("longest", max(1, int(value.max())))
    return sizes


def _lengths(Lq: int | None, Lk: int | None, sizes: dict[str, int]) -> tuple[int, int]:
    Lq, Lk = (sizes.get(name) if own is None else own for name, own in (("Lq", Lq), ("Lk", Lk)))
    usual = sizes.get("longest", USUAL) if Lq is None and Lk is None else Lq or Lk or 0
    return usual if Lq is None else Lq, usual if Lk is None else Lk


def _tensors(parts: Sequence[Mask]) -> list[Tensor]:
    return [x for part in parts for x in vars(part).values() if isinstance(x, Tensor)]


def _has_values(x: Tensor) -> bool:
    """Not on the meta device, under `FakeTensorMode`, or within `vmap`."""
    try:
        x.reshape(-1)[:1].tolist()
    except RuntimeError:
        return False
    return True


def _device(parts: Sequence[Mask]) -> torch.device:
    return next((x.device for x in _tensors(parts)), torch.device("cpu"))


def _title(parts: Sequence[Mask]) -> str:
    return " & ".join(map(_words, parts))


def _words(part: Mask) -> str:
    """The mask as it was written, but for long tensors."""
    words, named = [], False
    for name, value in vars(part).items():
        if value is getattr(type(part), name, MISSING):
            named = True
            continue
        if isinstance(value, Tensor):
            few = value.numel() <= ELEMENTS and _has_values(value)
            text = f"{value.tolist()}" if few else f"{tuple(value.shape)}"
        else:
            text = f"{value!r}"
        words.append(f"{name}={text}" if named else text)
    return f"{type(part).__name__}({', '.join(words)})"
