"""The norms' call past torch's dispatcher: what it takes, and that nothing is lost by it.

Everything else about it, parity and errors, is tested by all tests that name the backend "native".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels import add_layer_norm, layer_norm, rms_norm
from rowmax.kernels.backends import dispatch
from rowmax.kernels.backends.cpu_common.constants import ADVISED_BYTES
from rowmax.kernels.ops import operators
from rowmax.kernels.ops.problem import AddLayerNormProblem, LayerNormProblem, RMSNormProblem

from .fast_path_inputs import DTYPES, left_by_transforms, rand

pytestmark = pytest.mark.usefixtures("extension")
Take = Callable[..., tuple[Tensor, Tensor] | None]


@pytest.fixture
def take(readable_tensors: None) -> Take:
    """The backend's own way."""
    found = dispatch.fast_path_norm("native")
    assert found is not None
    return found


def in_general(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    subtract_mean: bool,
) -> tuple[Tensor, Tensor]:
    if residual is not None:
        problem = AddLayerNormProblem(x, residual, weight, bias, eps, 0.0, None)
        return operators.add_layer_norm(problem, "native")
    if subtract_mean:
        y = operators.layer_norm(LayerNormProblem(x, weight, bias, eps), "native")
    else:
        y = operators.rms_norm(RMSNormProblem(x, weight, eps), "native")
    return y, y


SHAPES = ((1,), (7,), (3, 5), (2, 3, 70), (64, 512), (5, 1600), (1, 4, 1, 33), (5000, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_general_way(
    shape: tuple[int, ...], dtype: torch.dtype, take: Take
) -> None:
    x, other = 3 * rand(*shape, dtype=dtype) + 1, rand(2, *shape, dtype=dtype)[1]
    for parameter_dtype in DTYPES:
        weight, bias = rand(shape[-1], dtype=parameter_dtype), rand(2, shape[-1])[1]
        for given in ((weight, bias), (weight, None), (None, bias), (None, None)):
            for residual, subtract_mean in ((None, True), (None, False), (other, True)):
                bias_given = given[1] if subtract_mean else None
                arguments = (x, residual, given[0], bias_given, 1e-5, subtract_mean)
                found = take(*arguments)
                assert found is not None
                for got, expected in zip(found, in_general(*arguments), strict=True):
                    assert (got.dtype, got.is_contiguous()) == (dtype, True)
                    assert torch.equal(got, expected)
                assert (found[0] is found[1]) == (residual is None)


def test_the_public_functions_take_it(monkeypatch: pytest.MonkeyPatch, take: Take) -> None:
    x, weight = rand(4, 8), torch.nn.Parameter(rand(8))
    called: list[str] = []
    monkeypatch.setattr(operators, "call", lambda name, *_: called.append(name))
    with torch.no_grad():
        normal = layer_norm(x, weight, weight, backend="native")
        assert not rms_norm(x, weight, backend="native").requires_grad
        assert not add_layer_norm(x, x, weight, backend="native")[0].requires_grad
    with torch.inference_mode():
        assert layer_norm(x, weight, backend="native").is_inference()
    assert not called
    expected = torch.nn.functional.layer_norm(x, (8,), weight, weight)
    torch.testing.assert_close(normal, expected.detach())


def test_shared_sizes_of_one_have_any_stride(take: Take) -> None:
    x = rand(4, 8).as_strided((4, 1, 8), (8, 77, 1))
    assert take(x, None, None, None, 1e-5, True) is not None
    assert take(x, x, None, None, 1e-5, True) is not None


X, ROW = rand(4, 8), rand(8)
NOT_PLAIN: dict[str, tuple[Any, ...]] = {
    "ints": (X.long(), ROW, ROW, 1e-5),
    "complex": (X.to(torch.complex64), None, None, 1e-5),
    "no dimension": (X[0, 0], None, None, 1e-5),
    "no row": (X[:0], ROW, ROW, 1e-5),
    "no column": (X[:, :0], None, None, 1e-5),
    "rows apart": (rand(4, 16)[:, :8], ROW, ROW, 1e-5),
    "columns apart": (rand(8, 4).T, ROW, ROW, 1e-5),
    "expanded": (ROW.expand(4, 8), ROW, ROW, 1e-5),
    "negated": (torch._neg_view(X), ROW, ROW, 1e-5),
    "weight negated": (X, torch._neg_view(ROW), ROW, 1e-5),
    "zeros without memory": (torch._efficientzerotensor((4, 8)), ROW, ROW, 1e-5),
    "a view of such zeros": (torch._efficientzerotensor((9, 8))[5:], ROW, ROW, 1e-5),
    "bias of such zeros": (X, ROW, torch._efficientzerotensor((8,)), 1e-5),
    "functional": (torch._to_functional_tensor(X), ROW, ROW, 1e-5),
    "a view of a functional one": (torch._to_functional_tensor(rand(9, 8))[5:], ROW, ROW, 1e-5),
    "weight too short": (X, ROW[:7], ROW, 1e-5),
    "weight of two dimensions": (X, ROW[None], ROW, 1e-5),
    "weight apart": (X, rand(16)[::2], ROW, 1e-5),
    "bias of ints": (X, ROW, ROW.long(), 1e-5),
    "bias a number": (X, ROW, 1.0, 1e-5),
    "not a tensor": ([1.0], ROW, ROW, 1e-5),
    "on no device": (X.to("meta"), None, None, 1e-5),
    "a subclass": (X.as_subclass(type("Marked", (Tensor,), {})), ROW, ROW, 1e-5),
    "sparse": (X.to_sparse(), ROW, ROW, 1e-5),
    "eps of an int": (X, ROW, ROW, 1),
    "eps below 0": (X, ROW, ROW, -1e-5),
    "eps of NaN": (X, ROW, ROW, float("nan")),
    "eps without end": (X, ROW, ROW, float("inf")),
    "eps of text": (X, ROW, ROW, "1e-5"),
    "large": (torch.empty(ADVISED_BYTES // 32, 8), ROW, ROW, 1e-5),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_is_left_alone(name: str, take: Take) -> None:
    x, *others = NOT_PLAIN[name]
    assert take(x, None, *others, True) is None


@pytest.mark.parametrize(
    "residual",
    [
        *(X.double(), X[:3], X[None], X.long(), rand(8, 4).T, rand(4, 16)[:, :8], ROW.expand(4, 8)),
        *(torch._neg_view(X), torch._efficientzerotensor((4, 8)), X.to("meta"), X.to_sparse(), 1.0),
    ],
    ids=range(12),
)
def test_a_residual_that_is_not_as_x_is_left_alone(residual: Any, take: Take) -> None:
    assert take(X, residual, ROW, ROW, 1e-5, True) is None


def test_what_a_transform_left_behind_is_left_alone(take: Take) -> None:
    for kept in left_by_transforms(X):
        assert take(kept, None, None, None, 1e-5, True) is None
        assert take(X, kept, None, None, 1e-5, True) is None


@pytest.mark.parametrize("which", range(4))
def test_a_gradient_needs_the_general_way(which: int) -> None:
    arguments = [X, X, ROW, ROW]
    arguments[which] = arguments[which].clone().requires_grad_()
    x, residual, weight, bias = arguments
    taken = operators.fast_path_norm(
        *(x, residual, weight, bias, 1e-5, "native"), subtract_mean=True
    )
    assert taken is None
    assert add_layer_norm(x, residual, weight, bias, backend="native")[0].requires_grad


def test_a_wrong_number_of_arguments(extension: Any) -> None:
    with pytest.raises(TypeError, match="fast_path_norm: expected 6 arguments, got 1"):
        extension.fast_path_norm(X)
