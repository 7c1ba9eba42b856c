"""A Lightning module: swap in its __init__, everything else as ever.

pip install rowmax pytorch-lightning
"""

from __future__ import annotations

import copy

import pytorch_lightning as lightning
import torch
from in_turns import gain
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rowmax.kernels import swap

WORDS, MARKER, LONGEST = 100, 2, 64


class Classifier(lightning.LightningModule):
    """Is the marker among the words of a text? 0 is padding."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 2)
        self.report = swap(self.encoder, pack=True)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)
        return self.head(states[:, 0])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def texts(count: int) -> tuple[Tensor, Tensor]:
    lengths, labels = torch.randint(4, LONGEST + 1, (count, 1)), torch.randint(2, (count,))
    ids = torch.randint(MARKER + 1, WORDS, (count, LONGEST))
    ids.scatter_(1, (torch.rand(count, 1) * lengths).long(), MARKER + 1 - labels.unsqueeze(1))
    return ids * (torch.arange(LONGEST) < lengths), labels


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    model = Classifier()
    print(model.report)

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(*texts(1280)), batch_size=32))
    ids, labels = texts(256)
    right = model.eval()(ids).argmax(-1) == labels
    print(f"accuracy on new texts: {right.float().mean():.3f}")

    model.train().report.restore()
    original = copy.deepcopy(model)
    swap(model, pack=True)
    ids = ids[:32]
    print(gain(lambda: original(ids).sum().backward(), lambda: model(ids).sum().backward()))


if __name__ == "__main__":
    main()
