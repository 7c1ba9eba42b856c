"""LoRA: a frozen Llama, low-rank adapters by peft, rowmax below both.

pip install "rowmax[huggingface]" peft
"""

from __future__ import annotations

import copy

import torch
from in_turns import gain
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rowmax.kernels import swap


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    adapters = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    original = copy.deepcopy(model)

    print(swap(model))
    model.print_trainable_parameters()

    # counting up from anywhere, the shorter text padded
    ids = (torch.arange(192) + torch.randint(64, (4, 1))) % 64
    real = torch.arange(192) < torch.tensor([[192], [150], [120], [64]])
    batch = {"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, -100)}
    print(f"loss: {step(original, batch):.6f} before the swap, {step(model, batch):.6f} after")
    print(gain(lambda: step(original, batch), lambda: step(model, batch)))

    model.zero_grad()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(30):
        losses.append(step(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss of the adapters' training: {losses[0]:.2f}, after 30 steps {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
