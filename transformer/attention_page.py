"""One self-contained HTML page: point at a token and see where it looks."""

from __future__ import annotations

import json
from importlib import resources

from .attend import KINDS, Attention


def page(attention: Attention, kind: str, layer: int, head: int | None) -> str:
    """The page, with every kind, layer and head in it; opened at these."""
    data = {
        "arch": attention.arch,
        "sentence": attention.sentence,
        "translation": attention.translation,
        "kind": kind,
        "layer": layer,
        "head": head,
        "kinds": {
            name: {
                "title": KINDS[name],
                "queries": attention.tokens(name)[0],
                "keys": attention.tokens(name)[1],
                "layers": [
                    [
                        [[round(weight, 4) for weight in row] for row in one_head]
                        for one_head in weights.tolist()
                    ]
                    for weights in layers
                ],
            }
            for name, layers in attention.weights.items()
        },
    }
    # "<" could end the script element, whatever the sentence holds.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("attention_page.html").read_text("utf-8")
    return template.replace("/*DATA*/", text)
