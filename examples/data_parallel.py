"""DDP: swap, then wrap. Two processes, gloo.

pip install rowmax
"""

from __future__ import annotations

import copy
import tempfile

import torch
import torch.distributed as dist
from in_turns import gain
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from rowmax.kernels import swap


def train(rank: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    original = DistributedDataParallel(copy.deepcopy(model))
    report = swap(model, pack=True)
    parallel = DistributedDataParallel(model)
    x = torch.randn(2, 8, 128, 128)[rank]  # another half of the batch in each process
    padding = torch.arange(128) >= torch.linspace(16, 128, 8).view(-1, 1)

    def step(module: nn.Module) -> None:
        out = module(x, src_key_padding_mask=padding)
        nn.functional.mse_loss(out[~padding], x[~padding]).backward()

    step(original)
    step(parallel)
    own, other = (next(each.parameters()).grad for each in (original, parallel))
    assert own is not None
    assert other is not None
    words = gain(lambda: step(original), lambda: step(parallel), seconds=0)
    if rank == 0:
        print(report)
        print(f"largest difference of a summed gradient: {(own - other).abs().max():.1e}")
        print(words)
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(train, (f"{folder}/store",), nprocs=2)


if __name__ == "__main__":
    main()
