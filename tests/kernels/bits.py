"""`python -m tests.kernels.bits`: a hash of the bits that every operation of a backend computes.

A change that is to move or rename code leaves these hashes as they were on the same machine:

    python -m tests.kernels.bits > before; ...; python -m tests.kernels.bits | diff before -
"""

from __future__ import annotations

import argparse
import hashlib
import warnings
from functools import partial

import torch
from torch import Tensor

from rowmax import kernels
from rowmax.kernels import KeyLengths
from rowmax.kernels.testing.cases import Draw
from rowmax.kernels.testing.cross_entropy import cross_entropy_case

from .cases import CASES
from .support import DTYPES, run

_ROWS, _COLUMNS = 37, 83


def _hash(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def attention_bits(backend: str, dtype: torch.dtype) -> str:
    """Of outputs and gradients of all cases."""
    found: list[Tensor] = []
    for case in CASES:
        found += run(backend, case.build(dtype, "cpu")).values()
    return _hash([tensor.reshape(tensor.shape or (1,)) for tensor in found])


def row_bits(operation: str, backend: str, dtype: torch.dtype) -> str:
    """Of a norm or of masked softmax, with its gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, residual = (draw(_ROWS, _COLUMNS).requires_grad_() for _ in range(2))
    weight, bias = (draw(_COLUMNS).requires_grad_() for _ in range(2))
    outputs: tuple[Tensor, ...]
    if operation == "layer_norm":
        leaves = [x, weight, bias]
        outputs = (kernels.layer_norm(x, weight, bias, backend=backend),)
    elif operation == "rms_norm":
        leaves = [x, weight]
        outputs = (kernels.rms_norm(x, weight, backend=backend),)
    elif operation == "add_layer_norm":
        leaves = [x, residual, weight, bias]
        outputs = kernels.add_layer_norm(
            x, residual, weight, bias, dropout_p=0.3, seed=1, backend=backend
        )
    else:
        leaves = [x]
        mask = KeyLengths(torch.arange(_ROWS) % (_COLUMNS + 1))
        scores = x.view(_ROWS, 1, 1, _COLUMNS)
        outputs = (kernels.masked_softmax(scores, mask=mask, backend=backend),)
    weights = [draw(*output.shape) for output in outputs]
    return _hash([*outputs, *torch.autograd.grad(outputs, leaves, weights)])


def loss_bits(backend: str, dtype: torch.dtype) -> str:
    case = cross_entropy_case("ignored", (_ROWS, 24, _COLUMNS), Draw(7, dtype))
    kernel = partial(kernels.linear_cross_entropy, backend=backend)
    return _hash(list(case.run(kernel).values()))


def main() -> None:
    """Print a line for each operation, backend and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", default=["reference", "numba", "native"])
    chosen = parser.parse_args().backends
    warnings.simplefilter("ignore")
    for backend in chosen:
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            print(f"{backend} attention {name} {attention_bits(backend, dtype)}", flush=True)
            bits = loss_bits(backend, dtype)
            print(f"{backend} linear_cross_entropy {name} {bits}", flush=True)
            for operation in ("layer_norm", "rms_norm", "add_layer_norm", "masked_softmax"):
                bits = row_bits(operation, backend, dtype)
                print(f"{backend} {operation} {name} {bits}", flush=True)


if __name__ == "__main__":
    main()
