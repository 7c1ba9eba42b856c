"""The backend "native" as users meet it: through the public functions and `explain`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rowmax.kernels import layer_norm

from ..processes import printed, python
from ..tensors import rand

pytestmark = pytest.mark.usefixtures("extension")


@pytest.mark.parametrize(
    "x",
    [
        rand(2, 3, 24),
        rand(24),
        rand(2, 5, 24).transpose(0, 1),
        rand(3, 48)[:, ::2],
        rand(4, 48)[:, :24],
        rand(0, 3, 24),
    ],
    ids=["3-D", "1-D", "transposed", "strided", "sliced", "empty"],
)
def test_agrees_with_the_reference(x: Tensor) -> None:
    weight, bias = rand(24), rand(24) + 1
    results = {}
    for backend in ("native", "reference"):
        inputs = tuple(t.detach().requires_grad_() for t in (x, weight, bias))
        y = layer_norm(inputs[0], inputs[1], inputs[2], backend=backend)
        grads = torch.autograd.grad(y, inputs, torch.cos(y.detach()))
        results[backend] = [y.detach(), *grads]
    for got, expected in zip(results["native"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
def test_gradcheck(parameters: str) -> None:
    x = rand(3, 10).requires_grad_()
    weight = rand(10).requires_grad_() if parameters in ("both", "weight") else None
    bias = rand(10).requires_grad_() if parameters in ("both", "bias") else None
    present = [tensor for tensor in (x, weight, bias) if tensor is not None]

    # gradcheck differentiates by the arguments in place, so the closure sees each change.
    assert torch.autograd.gradcheck(
        lambda *_: layer_norm(x, weight, bias, backend="native"), present
    )


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(
        lambda x, w: layer_norm(x.sin(), w, backend="native"), fullgraph=True, backend="aot_eager"
    )
    x, weight = rand(4, 6).requires_grad_(), rand(6).requires_grad_()
    got = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
    plain = layer_norm(x.sin(), weight, backend="native").sum()
    for compiled_grad, grad in zip(got, torch.autograd.grad(plain, (x, weight)), strict=True):
        torch.testing.assert_close(compiled_grad, grad)


EACH_WIDTH = """
import torch
from rowmax.kernels import Causal, attention, layer_norm
torch.manual_seed(0)
q = torch.randn(1, 2, 70, 24, dtype=torch.float64, requires_grad=True)
results = []
for backend in ("native", "reference"):
    y = layer_norm(attention(q, q.cos(), q.sin(), Causal(), backend=backend), backend=backend)
    results.append((y, torch.autograd.grad(y.square().sum(), q)[0]))
for one, other in zip(*results):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
print(torch.ops.rowmax_native.vector_bits())
"""


@pytest.mark.parametrize("bits", [512, 256, 128])
def test_every_width_up_to_the_processors_own(bits: int) -> None:
    """One library holds the kernels of all instruction sets; the environment picks a narrower."""
    own = torch.ops.rowmax_native.vector_bits()
    if bits > own:
        pytest.skip(f"this processor's vectors have {own} bits")
    assert printed("-c", EACH_WIDTH, ROWMAX_VECTOR_BITS=str(bits)) == f"{bits}\n"


@pytest.mark.parametrize("bits", ["64", "1024", "wide", ""])
def test_a_width_that_is_none(bits: str) -> None:
    done = python("-c", EACH_WIDTH, ROWMAX_VECTOR_BITS=bits)
    assert done.returncode != 0
    assert "ROWMAX_VECTOR_BITS: expected one of (512, 256, 128), at most" in done.stderr
    assert f"got '{bits}'" in done.stderr


BFLOAT16 = """
import torch
from rowmax.kernels import Causal, attention
torch.manual_seed(0)
q, k, v = (torch.randn(2, 3, 130, 65).bfloat16() for _ in range(3))
out = attention(q, k, v, Causal(), backend="native")
exact = attention(q.double(), k.double(), v.double(), Causal(), backend="reference")
naive = attention(q, k, v, Causal(), backend="reference")
assert (out - exact).square().mean() <= 2 * (naive - exact).square().mean()

# One key has all the weight: d_value is the sum of grad_out, in numbers that the instructions of
# pairs take for zeros.
key = torch.zeros(1, 1, 1, 16).bfloat16().requires_grad_()
query = torch.zeros(1, 1, 4, 16).bfloat16()
out = attention(query, key, key, backend="native")
(d_value,) = torch.autograd.grad(out, key, torch.full_like(out, 2.0**-130))
assert d_value.eq(0.0 if torch.ops.rowmax_native.bfloat16_dots() else 2.0**-128).all()
print(torch.ops.rowmax_native.bfloat16_dots())
"""


def test_bfloat16_with_and_without_dot_products() -> None:
    assert printed("-c", BFLOAT16, ROWMAX_BFLOAT16_DOTS="0") == "False\n"
    printed("-c", BFLOAT16, ROWMAX_BFLOAT16_DOTS="1")
    done = python("-c", BFLOAT16, ROWMAX_BFLOAT16_DOTS="yes")
    assert "ROWMAX_BFLOAT16_DOTS: expected 0 or 1, got 'yes'" in done.stderr


def test_a_missing_extension_is_named() -> None:
    """In a fresh interpreter where the extension can't be found: the reason, and what to do."""
    script = """
import sys
import torch
sys.modules["rowmax.kernels._C"] = None
from rowmax.kernels import layer_norm
try:
    layer_norm(torch.ones(2, 3), backend="native")
except RuntimeError as error:
    print(error)
print(layer_norm(torch.ones(2, 3), backend="reference").sum().item())
"""
    output = printed("-c", script)
    assert "the C++ extension is not built" in output
    assert "pip install --no-deps --force-reinstall --no-cache-dir ." in output
    assert output.endswith("0.0\n")
