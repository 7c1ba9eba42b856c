"""FSDP2: two processes hold a half of each weight, and train what one process trains."""

from __future__ import annotations

import pytest

from .commands import ended, forkserver, free_port, variables

# What a process does. No function of this file: a new process can't import it.
WORK = """
import os
os.environ.update(environment)
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from rowmax.kernels import swap
from rowmax.transformer import EncoderDecoder, ModelConfig
from rowmax.transformer.packing import PackedBatch, pack

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()


def transformer():
    torch.manual_seed(0)
    config = ModelConfig(100, 2, 2, d_model=32, heads=2, d_ff=64, max_length=20, dropout=0.0)
    model = EncoderDecoder(config, "auto")
    # A decoder layer's keys and values are made outside its forward: of it, the feed-forward alone.
    return model, [*model.encoder, *(layer.feed_forward for layer in model.decoder)]


def transformer_loss(model, number):
    generator = torch.Generator().manual_seed(number)
    text = [torch.randint(4, 100, (n,), generator=generator).tolist() for n in (5, 9, 3)]
    shifted, _ = pack([[1, *each[:-1]] for each in text])
    tokens, packing = pack(text)
    return model.loss(PackedBatch(tokens, packing, shifted, tokens, packing), 0.1)


def swapped():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert swap(model).swapped
    return model, list(model.layers)


def swapped_loss(model, number):
    generator = torch.Generator().manual_seed(number)
    return model(torch.randn(2, 7, 32, generator=generator)).pow(2).mean()


build, loss_of = {
    "transformer": (transformer, transformer_loss),
    "swapped": (swapped, swapped_loss),
}[what]
alone, (sharded, parts) = build()[0], build()
for module in (*parts, sharded):
    fully_shard(module, mesh=mesh)
if what == "transformer":
    register_fsdp_forward_method(sharded, "loss")
one, half = (torch.optim.Adam(model.parameters(), lr=1e-3) for model in (alone, sharded))
for step in range(4):
    one.zero_grad()
    (sum(loss_of(alone, 2 * step + each) for each in range(2)) / 2).backward()
    one.step()
    half.zero_grad()
    loss_of(sharded, 2 * step + rank).backward()
    half.step()
for got, expected in zip(sharded.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(got.full_tensor(), expected, atol=1e-5, rtol=1e-5)
    assert got.to_local().numel() <= -(-len(expected) // 2) * expected[0].numel()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("what", ["transformer", "swapped"])
def test_two_processes_with_half_of_the_weights_each(what):
    context, port = forkserver(), free_port()
    processes = [
        context.Process(
            target=exec, args=(WORK, {"environment": variables(rank, 2, port), "what": what})
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert ended(processes) == [0, 0]
