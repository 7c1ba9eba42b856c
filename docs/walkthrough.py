"""One sentence through the Transformer, step by step; docs/walkthrough.md explains the steps.

Each step is computed here from the model's own matrices by the plain formula, in float64, and held
against what the model computes. Run from anywhere: python docs/walkthrough.py
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowmax.transformer import EncoderDecoder, ModelConfig, Tokenizer, corpus
from rowmax.transformer.interface import recording
from rowmax.transformer.model import AddNorm, MultiHeadAttention
from rowmax.transformer.tokenizer import BOS, EOS

SOURCE = "지영은 도서관에서 책을 읽어요."
TARGET = "Jiyeong reads a book at the library."


def show(step: str, what: str, value: Tensor) -> None:
    print(f"{step:<3}{what:<46}{tuple(value.shape)}")


def agree(what: str, by_hand: Tensor, by_model: Tensor) -> None:
    """The same but for roundings of float64; anything else ends the script."""
    largest = (by_hand - by_model).abs().max().item()
    allowed = 1e-12 * max(1.0, by_model.abs().max().item())
    if not largest <= allowed:
        sys.exit(f"{what}: by hand and by the model differ by {largest:.1e}")
    print(f"   = {what}")


def add_norm(layer: AddNorm, sublayer: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm(residual + sublayer)."""
    total = residual + sublayer
    centred = total - total.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * layer.weight + layer.bias


def scores_of(layer: MultiHeadAttention, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Scores over sqrt(D) (B, H, Lq, Lk), and values (B, H, Lk, D)."""
    q = layer.split_heads(layer.w_q(x))
    k, v = layer.keys_values(memory)
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), v


def concatenated(heads: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H * D)."""
    return heads.transpose(1, 2).flatten(2)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto", help="the model's kernels")
    backend = parser.parse_args().backend

    pairs = corpus.generate(2_000)
    tokenizer = Tokenizer.train((side for pair in pairs for side in pair), 2_000)
    torch.manual_seed(0)
    config = ModelConfig(tokenizer.vocab_size)  # the base model of the paper, untrained
    model: Any = EncoderDecoder(config, backend).double().eval()
    source = torch.tensor([[*tokenizer.encode([SOURCE])[0], EOS]])
    target = torch.tensor([[BOS, *tokenizer.encode([TARGET])[0]]])
    lengths = torch.tensor([source.shape[1]])
    print(" ".join(tokenizer.pieces(source[0].tolist())))
    print(" ".join(tokenizer.pieces(target[0].tolist())))
    kinds = model.attention_layers()
    with recording([layer for same in kinds.values() for layer in same]):
        logits = model(source, lengths, target)
        weights = {kind: same[0].recorded for kind, same in kinds.items()}
    state = model.start(source, lengths)

    print("\nEncoder, first layer")
    show("0", "source tokens", source)
    x = F.embedding(source, model.embedding.weight) * math.sqrt(config.d_model)
    show("1", "embedding * sqrt(512)", x)
    x = x + model.embedding.positions[: source.shape[1]]
    show("2", "+ positions", x)
    agree("model.embedding", x, model.embedding(source))
    layer = model.encoder[0]
    attention = layer.self_attention
    q = attention.split_heads(attention.w_q(x))
    show("3", "q = x W_q, in 8 heads; k and v likewise", q)
    scores, v = scores_of(attention, x, x)
    show("4", "scores = q k^T / sqrt(64)", scores)
    a = scores.softmax(-1)
    show("5", "weights = softmax(scores), rows sum to 1", a)
    agree("return_weights of the first encoder layer", a, weights["encoder"][0])
    heads = a @ v
    show("6", "weights v, one result a head", heads)
    z = concatenated(heads)
    show("7", "heads side by side", z)
    z = attention.w_o(z)
    show("8", "times W_0", z)
    x = add_norm(layer.add_norm_1, z, x)
    show("9", "add and normalise", x)
    inner = torch.relu(layer.feed_forward.w_1(x))
    show("10", "feed-forward, inside", inner)
    x = add_norm(layer.add_norm_2, layer.feed_forward.w_2(inner), x)
    show("11", "feed-forward, out, add and normalise", x)
    embedded = model.embedding(source)
    agree("model.encoder[0]", x, layer(embedded, embedded, state.source_mask)[0])

    memory = model.encode(source, state.source_mask)
    show("12", "after 6 layers: what the decoder looks at", memory)

    print("\nDecoder, first layer")
    y = model.embedding(target)
    show("13", "target so far, embedded, with positions", y)
    layer = model.decoder[0]
    scores, v = scores_of(layer.self_attention, y, y)
    mask = torch.ones(scores.shape[-2:]).triu(1).bool()
    show("14", "mask: no position sees a later one", mask)
    a = scores.masked_fill(mask, -math.inf).softmax(-1)
    show("15", "masked weights", a)
    agree("return_weights of the masked attention", a, weights["decoder"][0])
    y = add_norm(layer.add_norm_1, layer.self_attention.w_o(concatenated(a @ v)), y)
    scores, v = scores_of(layer.source_attention, y, memory)
    a = scores.softmax(-1)
    show("16", "encoder-decoder weights: target by source", a)
    agree("return_weights of the encoder-decoder attention", a, weights["cross"][0])
    y = add_norm(layer.add_norm_2, layer.source_attention.w_o(concatenated(a @ v)), y)
    inner = torch.relu(layer.feed_forward.w_1(y))
    y = add_norm(layer.add_norm_3, layer.feed_forward.w_2(inner), y)
    show("17", "feed-forward, add and normalise", y)
    for layer in list(model.decoder)[1:]:
        scores, v = scores_of(layer.self_attention, y, y)
        a = scores.masked_fill(mask, -math.inf).softmax(-1)
        y = add_norm(layer.add_norm_1, layer.self_attention.w_o(concatenated(a @ v)), y)
        scores, v = scores_of(layer.source_attention, y, memory)
        heads = scores.softmax(-1) @ v
        y = add_norm(layer.add_norm_2, layer.source_attention.w_o(concatenated(heads)), y)
        inner = torch.relu(layer.feed_forward.w_1(y))
        y = add_norm(layer.add_norm_3, layer.feed_forward.w_2(inner), y)
    show("18", "after 6 layers", y)

    print("\nOut")
    by_hand = y @ model.embedding.weight.T
    show("19", "linear: a score for each subword", by_hand)
    agree("model(source, lengths, target)", by_hand, logits)
    probabilities = by_hand.softmax(-1)
    show("20", "softmax: probabilities, rows sum to 1", probabilities)


if __name__ == "__main__":
    main()
