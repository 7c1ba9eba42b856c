"""The pictures of docs/masks.md, by the masks themselves: `python docs/mask_pictures.py`."""

from __future__ import annotations

from pathlib import Path

import torch

from rowmax.kernels import Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window

FOLDER = Path(__file__).resolve().parent / "pictures" / "masks"
SIZE = 12
THREE = Documents(torch.tensor([[0] * 5 + [1] * 4 + [2] * 3]))
STRIDES = torch.arange(SIZE).view(-1, 1) % 3 == torch.arange(SIZE) % 3

# name of the file -> mask, queries, keys
MASKS: dict[str, tuple[Mask, int, int]] = {
    "causal": (Causal(), SIZE, SIZE),
    "lower-right": (Causal("lower_right"), 4, SIZE),
    "offset": (Causal(6), 4, SIZE),
    "prefix": (Causal(prefix=torch.tensor([5])), SIZE, SIZE),
    "window": (Window(2, 1), SIZE, SIZE),
    "sliding": (Window(3, 0), SIZE, SIZE),
    "key-lengths": (KeyLengths(torch.tensor([SIZE, 7])), SIZE, SIZE),
    "query-lengths": (QueryLengths(torch.tensor([SIZE, 7])), SIZE, SIZE),
    "documents": (THREE, SIZE, SIZE),
    "dense": (Dense(STRIDES), SIZE, SIZE),
    "causal-lengths": (Causal() & KeyLengths(torch.tensor([SIZE, 7])), SIZE, SIZE),
    "causal-documents": (Causal() & THREE, SIZE, SIZE),
    "window-documents": (Window(2, 2) & THREE, SIZE, SIZE),
    "causal-dense": (Causal() & Dense(STRIDES), SIZE, SIZE),
}


def pictures() -> dict[str, str]:
    """Each file's name and content."""
    return {f"{name}.svg": f"{mask.show(Lq, Lk).svg()}\n" for name, (mask, Lq, Lk) in MASKS.items()}


if __name__ == "__main__":
    for name, content in pictures().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
