"""Fine-tuning a BERT-like classifier with Hugging Face's Trainer, padding packed away.

pip install "rowmax[huggingface]" accelerate
"""

from __future__ import annotations

import copy
import tempfile

import torch
from in_turns import gain
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from rowmax.kernels import swap

WORDS, MARKER = 200, 7


def example() -> dict[str, Tensor]:
    """A text of 4 to 96 words; its class says whether the marker is among them."""
    ids = torch.randint(8, WORDS, (int(torch.randint(4, 97, ())),))
    label = torch.randint(2, ())
    ids[torch.randint(len(ids), ())] = MARKER if label else MARKER + 1
    return {"input_ids": ids, "labels": label}


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    texts = [one["input_ids"] for one in examples]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = torch.stack([one["labels"] for one in examples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def main() -> None:
    torch.manual_seed(0)
    data = [example() for _ in range(1280)]
    config = BertConfig(
        vocab_size=WORDS, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    original = copy.deepcopy(model)

    print(swap(model, pack=True))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            *(folder,), per_device_train_batch_size=32, learning_rate=1e-3, num_train_epochs=2,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=20,
        )  # fmt: skip
        Trainer(model, arguments, data_collator=collate, train_dataset=data).train()
    test = collate([example() for _ in range(256)])
    with torch.no_grad():
        right = model.eval()(**test).logits.argmax(-1) == test["labels"]
    print(f"accuracy on new texts: {right.float().mean():.3f}")

    original.load_state_dict(model.state_dict())  # the names are the same, swapped or not
    model.train()
    batch = collate(data[:32])
    print(gain(lambda: original(**batch).loss.backward(), lambda: model(**batch).loss.backward()))


if __name__ == "__main__":
    main()
