"""`python -m rowmax.bench training`: steps of the reference Transformer beside nn.Transformer.

The same batch of sentence pairs of unequal lengths, as packed tokens and padded, and padded in an
nn.Transformer of equal sizes with torch's SDPA: forward, backward, and an update by fused Adam.
Timed in turns in one process; tokens are real ones, padding does not count.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.testing.memory import peak_bytes
from ...transformer.config import ModelConfig
from ...transformer.data import Batch, pad
from ...transformer.model import EncoderDecoder, sinusoids
from ...transformer.packing import PackedBatch, pack
from ...transformer.tokenizer import BOS, PAD
from . import figures

SIZES: dict[str, ModelConfig] = {
    "base": ModelConfig(10_000, 6, 6, d_model=512, heads=8, d_ff=2048, max_length=64),
    "medium": ModelConfig(10_000, 3, 3, d_model=256, heads=4, d_ff=1024, max_length=64),
    "small": ModelConfig(8_000, 2, 2, d_model=128, heads=4, d_ff=512, max_length=64),
}
SMOOTHING = 0.1
_LENGTHS = (8, 40)
Step = Callable[[], float]


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", choices=SIZES, default="base", help="default: base")
    command.add_argument("--pairs", type=int, default=32, help="of a batch; default: 32")
    command.add_argument(
        "--equal", action="store_true", help="sentences of one length: batches without padding"
    )
    command.add_argument(
        "--bfloat16", action="store_true", help="under autocast, packed and nn.Transformer, too"
    )
    command.add_argument(
        "--busy",
        type=int,
        metavar="N",
        help="time all again while N other processes want a CPU each; how OpenMP's threads wait "
        "follows GOMP_SPINCOUNT and OMP_WAIT_POLICY",
    )
    figures.add_options(command, 60.0)


def run(options: argparse.Namespace) -> int:
    machine = figures.begin(options, "pairs", *(() if options.busy is None else ("busy",)))
    config = SIZES[options.size]
    padded, packed = batches(config.vocab_size, options.pairs, equal=options.equal)
    every = steps(config, padded, packed, options.backend, narrow=options.bfloat16)
    memory = {name: _peak(step) for name, step in every.items()}
    timings, slowed = figures.timed(options, every, 5), {}
    if options.busy is not None:
        with figures.busy(options.busy):
            slowed = figures.timed(options, every, 5)
    places = padded.source.numel() + padded.target_out.numel()
    print(
        f"\n{options.size}: {config.encoder_layers} + {config.decoder_layers} layers of "
        f"{config.d_model}, vocabulary {config.vocab_size}, {options.pairs} pairs, "
        f"{packed.tokens} tokens, {100 * packed.tokens / places:.0f}% of the padded batch"
    )
    print(
        f"{'':24} {'ms':>8} {'spread':>7} {'tokens/s':>9} {'ratio':>6} {'MiB':>7}"
        + (f" {f'ms, {options.busy} busy':>12} {'slower':>7}" if slowed else "")
    )
    found: dict[str, Any] = {}
    theirs = timings["nn.Transformer"].median
    for name, timing in timings.items():
        peak = memory[name]
        line = (
            f"{name:24} {1e3 * timing.median:8.1f} {100 * timing.spread:6.0f}% "
            f"{packed.tokens / timing.median:9.0f} {theirs / timing.median:6.2f}"
        )
        line += " " * 8 if peak is None else f" {peak / 2**20:7.0f}"
        found[name] = {"seconds": timing.median, "spread": timing.spread, "peak_bytes": peak}
        if slowed:
            median = slowed[name].median
            line += f" {1e3 * median:12.1f} {median / timing.median:7.2f}"
            found[name]["seconds_while_busy"] = median
        print(line)
    document = {"machine": machine, "size": options.size, "found": found, "busy": options.busy}
    document |= {"pairs": options.pairs, "tokens": packed.tokens, "places": places}
    figures.write(options, document)
    return 0


def batches(vocabulary: int, pairs: int, *, equal: bool) -> tuple[Batch, PackedBatch]:
    """Random pairs, their lengths uniform in `_LENGTHS`, or all its mean; padded and packed."""
    rng = np.random.default_rng(0)
    low, high = ((sum(_LENGTHS) // 2,) * 2) if equal else _LENGTHS
    sides = [
        [rng.integers(3, vocabulary, size).tolist() for size in rng.integers(low, high + 1, pairs)]
        for _ in range(2)
    ]
    sources, targets = sides
    shifted = [[BOS, *target[:-1]] for target in targets]
    source, source_lengths = pad(sources)
    target, target_lengths = pad(targets)
    padded = Batch(source, source_lengths, pad(shifted)[0], target, target_lengths)
    (source, source_packing), (target, target_packing) = pack(sources), pack(targets)
    return padded, PackedBatch(source, source_packing, pack(shifted)[0], target, target_packing)


def steps(
    config: ModelConfig, padded: Batch, packed: PackedBatch, backend: str, *, narrow: bool = False
) -> dict[str, Step]:
    """A training step of each kind; it returns the loss."""
    torch.manual_seed(0)
    ours = [EncoderDecoder(config, backend).train() for _ in range(2)]
    theirs = TorchTransformer(config).train()
    losses: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "packed": (ours[0], lambda: ours[0].loss(packed, SMOOTHING)),
        "padded": (ours[1], lambda: ours[1].loss(padded, SMOOTHING)),
        "nn.Transformer": (theirs, lambda: theirs.loss(padded, SMOOTHING)),
    }

    if narrow:
        losses |= {
            f"{name}, bfloat16": (model, _narrow(loss_of))
            for name, (model, loss_of) in losses.items()
            if name != "padded"
        }

    def step_of(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)

        def step() -> float:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    return {name: step_of(*each) for name, each in losses.items()}


def _narrow(loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The loss with products in bfloat16."""

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of()

    return loss


class TorchTransformer(nn.Module):
    """nn.Transformer between the same embedding, positions and tied projection."""

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.weight = nn.Parameter(torch.randn(config.vocab_size, width) * width**-0.5)
        self.register_buffer("positions", sinusoids(config.max_length, width))
        self.transformer = nn.Transformer(
            *(width, config.heads, config.encoder_layers, config.decoder_layers, config.d_ff),
            dropout=config.dropout,
            batch_first=True,
        )
        self.dropout = config.dropout

    def embed(self, tokens: Tensor) -> Tensor:
        scaled = F.embedding(tokens, self.weight) * math.sqrt(self.weight.shape[1])
        return F.dropout(scaled + self.positions[: tokens.shape[1]], self.dropout, self.training)

    def loss(self, batch: Batch, smoothing: float) -> Tensor:
        longest = batch.source.shape[1]
        padding = torch.arange(longest) >= batch.source_lengths[:, None]
        causal = nn.Transformer.generate_square_subsequent_mask(batch.target_in.shape[1])
        out = self.transformer(
            *(self.embed(batch.source), self.embed(batch.target_in)),
            tgt_mask=causal,
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        logits = F.linear(out, self.weight).flatten(0, 1)
        return F.cross_entropy(
            logits, batch.target_out.flatten(), ignore_index=PAD, label_smoothing=smoothing
        )


def _peak(step: Step) -> int | None:
    """Of a step behind the first, in which kernels are compiled and Adam's state is made."""
    step()
    return peak_bytes(step, "cpu")
