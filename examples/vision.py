"""A ViT from timm: its attention by torch's registry, its norms by swap.

pip install rowmax timm

timm's Attention calls `F.scaled_dot_product_attention` itself, which no swap of modules reaches:
`attention_as_sdpa` does. Its LayerNorm has a forward of its own; `norm_layer` asks for torch's.
"""

from __future__ import annotations

import copy
from functools import partial

import timm
import torch
from in_turns import gain
from torch import Tensor, nn

from rowmax.kernels import attention_as_sdpa, swap


@torch.no_grad()
def classify(model: nn.Module, images: Tensor) -> Tensor:
    scores: Tensor = model(images)
    return scores


def by_rowmax(model: nn.Module, images: Tensor) -> Tensor:
    with attention_as_sdpa():  # a program of your own calls it once, at its start
        return classify(model, images)


def main() -> None:
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = timm.create_model("vit_tiny_patch16_384", depth=4, norm_layer=norm, num_classes=10)
    original = copy.deepcopy(model.eval())

    print(swap(model))
    fused = sum(block.attn.fused_attn for block in model.blocks)
    print(f"{fused} of {len(model.blocks)} blocks call F.scaled_dot_product_attention")

    images = torch.randn(2, 3, 384, 384)
    before, after = classify(original, images), by_rowmax(model, images)
    print(f"largest difference of a score: {(before - after).abs().max():.1e}")
    print(gain(lambda: classify(original, images), lambda: by_rowmax(model, images)))


if __name__ == "__main__":
    main()
