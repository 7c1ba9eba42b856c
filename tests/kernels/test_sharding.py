"""DTensors on two processes: the placements that results have, and their values and gradients."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rowmax.kernels as rk

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="a torch without torch.distributed"
)

WHOLE = None  # or the dimension that is sharded
# tensors, how each is placed, how the outputs are
Case = tuple[Callable[..., Any], str, tuple[int | None, ...], int | None]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "q": normal(3, 4, 5, 8),
        "k": normal(3, 2, 5, 8),
        "v": normal(3, 2, 5, 8),
        "one": normal(3, 1, 5, 8),
        "two": normal(3, 1, 5, 8),
        "bias": normal(4, 1, 5),
        "full": normal(3, 1, 5, 5),
        "sinks": normal(4),
        "lengths": torch.tensor([3, 5, 0]),
        "x": normal(3, 6, 8),
        "r": normal(3, 6, 8),
        "w": normal(8),
        "b": normal(8),
    }


def everything(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, n: Tensor) -> Any:
    mask = rk.KeyLengths(n) & rk.Causal()
    return rk.attention(q, k, v, mask, bias, sinks=sinks, return_lse=True)


_ALL = "q k v bias sinks lengths"
CASES: dict[str, Case] = {
    "replicated": (everything, _ALL, (WHOLE,) * 6, WHOLE),
    "batch": (everything, _ALL, (0, 0, 0, WHOLE, WHOLE, 0), 0),
    "batch_and_bias": (everything, "q k v full sinks lengths", (0, 0, 0, 0, WHOLE, 0), 0),
    "heads": (everything, _ALL, (1, 1, 1, 0, 0, WHOLE), 1),
    "heads_from_mixed": (everything, _ALL, (1, 1, 0, WHOLE, 0, WHOLE), 1),
    "alibi": (
        lambda q, k, v, s: rk.attention(q, k, v, bias=rk.ALiBi(s.detach().abs())),
        "q k v sinks",
        (1, 1, 1, 0),
        1,
    ),
    # groups that would be torn apart, and what counts from the beginning, are gathered
    "one_key_head": (rk.attention, "q one two", (1, WHOLE, WHOLE), WHOLE),
    "dropout": (
        lambda q, k, v: rk.attention(q, k, v, dropout_p=0.5, seed=3),
        "q k v",
        (0, 0, 0),
        WHOLE,
    ),
    "softmax_batch": (
        lambda s, n: rk.masked_softmax(s, rk.KeyLengths(n)),
        "full lengths",
        (0, 0),
        0,
    ),
    "softmax_rows": (lambda s: rk.masked_softmax(s), "full", (2,), WHOLE),
    "columns": (rk.layer_norm, "x w b", (2, WHOLE, WHOLE), WHOLE),
    "dropped_rows": (
        lambda x, r, w, b: rk.add_layer_norm(x, r, w, b, dropout_p=0.3, seed=1),
        "x r w b",
        (1, 1, WHOLE, WHOLE),
        WHOLE,
    ),
    **{
        f"{name}_{at}": (function, names, (at,) * rows + (WHOLE,) * parameters, at)
        for at in (0, 1)
        for name, function, names, rows, parameters in (
            ("layer_norm", rk.layer_norm, "x w b", 1, 2),
            ("layer_norm_bare", rk.layer_norm, "x", 1, 0),
            ("add_layer_norm", rk.add_layer_norm, "x r w b", 2, 2),
            ("rms_norm", rk.rms_norm, "x w", 1, 1),
        )
    },
}


def on_two_processes(rank: int, meeting: str) -> None:
    """All checks in one pair of processes, which take seconds to start."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, case in CASES.items():
        _check(mesh, name, *case)
    for kind in (nn.LayerNorm, nn.RMSNorm):
        _check_sequence_parallel(mesh, rank, kind)
    _check_other_calls(mesh)
    dist.destroy_process_group()


def _check(
    mesh: Any,
    name: str,
    function: Callable[..., Any],
    names: str,
    sharded: tuple[int | None, ...],
    expected: int | None,
) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    made = tensors()
    plain = [made[key].requires_grad_(made[key].is_floating_point()) for key in names.split()]
    spread = [
        distribute_tensor(tensor.detach(), mesh, [_placement(at)]).requires_grad_(
            tensor.requires_grad
        )
        for tensor, at in zip(plain, sharded, strict=True)
    ]
    found = []
    for leaves in (spread, plain):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if leaves is spread:
            for output in outputs:
                assert output.placements == (_placement(expected),), f"{name}: {output.placements}"
        losses = [
            output.masked_fill(output == -torch.inf, 0.0).square().sum() for output in outputs
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(sum(losses), wanted, allow_unused=True)
        found.append((*outputs, *gradients))
    for got, exact in zip(*found, strict=True):
        if exact is not None:
            whole = got.full_tensor() if isinstance(got, DTensor) else got
            torch.testing.assert_close(whole, exact, msg=lambda text: f"{name}: {text}")


def _placement(at: int | None) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return Replicate() if at is None else Shard(at)


def _check_sequence_parallel(mesh: Any, rank: int, kind: type[nn.Module]) -> None:
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    original = kind(8, dtype=torch.float64)
    changed = copy.deepcopy(original)
    rk.swap(changed)
    x = tensors()["x"]
    found = []
    for module in (changed, original):
        own = x.chunk(2, 1)[rank].contiguous().requires_grad_()
        out = parallelize_module(module, mesh, SequenceParallel())(own)
        out.square().sum().backward()
        assert out.placements == (_placement(1),)
        found.append((out.full_tensor(), own.grad, module.weight.grad.full_tensor()))
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got, exact)


def _check_other_calls(mesh: Any) -> None:
    """In inference mode; and with a bias that wants a gradient after one that did not."""
    from torch.distributed.tensor import distribute_tensor

    made = tensors()
    q, k, v, bias = (
        distribute_tensor(made[name], mesh, [_placement(at)])
        for name, at in {"q": 0, "k": 0, "v": 0, "bias": WHOLE}.items()
    )
    expected = rk.attention(made["q"], made["k"], made["v"], bias=made["bias"])
    with torch.inference_mode():
        inferred: Any = rk.attention(q, k, v)
        assert inferred.placements == (_placement(0),)
    for wants in (False, True):
        out: Any = rk.attention(q.requires_grad_(), k, v, bias=bias.detach().requires_grad_(wants))
        torch.testing.assert_close(out.full_tensor(), expected)
        out.sum().backward()
    bias.requires_grad_()
    (gradient,) = torch.autograd.grad(rk.attention(q, k, v, bias=bias).sum(), bias)
    assert gradient.shape == bias.shape


def test_two_processes(tmp_path: Path) -> None:
    # as scripts: a spawned process would look for this module's package, which is on no path
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, __file__]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, error in zip(both, errors, strict=True):
        assert process.returncode == 0, error


def test_nothing_distributed_is_loaded_without_need() -> None:
    code = (
        "import sys, torch, rowmax.kernels as k; x = torch.randn(2, 8, requires_grad=True);"
        "torch.ops.rowmax.layer_norm(x, None, None, 1e-5, 'auto')[0].sum().backward();"
        "assert 'torch.distributed.tensor' not in sys.modules"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd="/")


if __name__ == "__main__":
    on_two_processes(int(sys.argv[2]), sys.argv[3])
