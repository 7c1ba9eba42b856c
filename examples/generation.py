"""Generation with a small Llama and a static cache, prompts padded on the left.

pip install "rowmax[huggingface]"
"""

from __future__ import annotations

import copy

import torch
from in_turns import gain
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rowmax.kernels import swap


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    original = copy.deepcopy(model)

    print(swap(model))

    ids = torch.randint(2, 1000, (4, 256))
    real = torch.arange(256) >= torch.tensor([[0], [56], [156], [206]])

    def generate(llama: LlamaForCausalLM) -> Tensor:
        return llama.generate(
            ids.where(real, 0), attention_mask=real.long(), max_new_tokens=24, do_sample=False,
            cache_implementation="static", pad_token_id=0,
        )  # fmt: skip

    before, after = generate(original), generate(model)
    print(f"the same tokens: {torch.equal(before, after)}")
    print(gain(lambda: generate(original), lambda: generate(model)))


if __name__ == "__main__":
    main()
