"""What every architecture owes to a beam search."""

from __future__ import annotations

import torch
from torch import Tensor

from rowmax.transformer import TranslationModel


@torch.no_grad()
def assert_beams_go_on(model: TranslationModel, highest: int = 39) -> None:
    """Beams that change places, and sentences that leave, against reading each beam anew."""
    generator = torch.Generator().manual_seed(5)
    sentences, beams = 4, 3
    source = torch.randint(3, highest, (sentences, 7), generator=generator)
    lengths = torch.tensor([7, 3, 1, 5])
    state = model.start(source, lengths, beams=beams)
    past = torch.empty(sentences, beams, 0, dtype=torch.int64)
    there = torch.arange(sentences)
    for step in range(7):
        tokens = torch.randint(3, highest, (len(there), beams), generator=generator)
        past = torch.cat((past, tokens[..., None]), dim=2)
        got = model.decode(tokens, state)
        torch.testing.assert_close(got, anew(model, source, lengths, past), rtol=0, atol=1e-12)
        origin = torch.randint(beams, (len(there), beams), generator=generator)
        state.reorder(origin)
        past = past.gather(1, origin[..., None].expand_as(past))
        if step in (2, 4):
            left = torch.tensor([0, 2, 3] if step == 2 else [1])
            state.keep(left)
            there, source, lengths, past = there[left], source[left], lengths[left], past[left]


def anew(model: TranslationModel, source: Tensor, lengths: Tensor, past: Tensor) -> Tensor:
    """The scores (B, K, V) behind the last token of each beam's `past` (B, K, T)."""
    beams = past.shape[1]
    logits = model(
        source.repeat_interleave(beams, 0), lengths.repeat_interleave(beams), past.flatten(0, 1)
    )
    return logits[:, -1].unflatten(0, (-1, beams))
