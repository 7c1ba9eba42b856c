"""Training nn.Transformer with dropout and padding: torch's own modules, swapped in place.

pip install rowmax
"""

from __future__ import annotations

import copy

import torch
from in_turns import gain
from torch import Tensor, nn

from rowmax.kernels import swap

WORDS, LONGEST, WIDTH = 40, 64, 128


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 4 * WIDTH, dropout=0.1, batch_first=True)
        self.out = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length, padding = target.shape[1], source == 0
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.out(
            self.transformer(
                *(self.words(source), self.words(target)), tgt_mask=causal, tgt_is_causal=True,
                src_key_padding_mask=padding, memory_key_padding_mask=padding,
                tgt_key_padding_mask=padding,
            )
        )  # fmt: skip


def texts(size: int = 32) -> Tensor:
    """Counting up by a step that differs, to 8 to 64 words, 0 where the text has ended."""
    counted = torch.randint(38, (size, 1)) + torch.arange(LONGEST) * torch.randint(1, 4, (size, 1))
    return (2 + counted % 38) * (torch.arange(LONGEST) < torch.randint(8, LONGEST + 1, (size, 1)))


def step(model: nn.Module, source: Tensor) -> float:
    begun = nn.functional.pad(source, (1, 0), value=1)[:, :-1]
    logits = model(source, begun)
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), source, ignore_index=0)
    loss.backward()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    original = copy.deepcopy(model)

    print(swap(model, pack=True))

    batch = texts()
    print(gain(lambda: step(original, batch), lambda: step(model, batch)))

    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        losses.append(step(model, texts()))
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss of the training: {losses[0]:.2f}, after {len(losses)} steps {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
