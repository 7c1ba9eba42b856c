"""The call that leaves out torch's dispatcher: what it takes, and that nothing is lost by it.

Everything else about it, parity and errors, is tested by all tests that name the backend "native".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels import Causal, Dense, KeyLengths, Mask, attention
from rowmax.kernels.backends import dispatch
from rowmax.kernels.ops import operators

from .fast_path_inputs import DTYPES, left_by_transforms, rand

pytestmark = pytest.mark.usefixtures("extension")


@pytest.fixture
def take(readable_tensors: None) -> Callable[..., Tensor | None]:
    """The backend's own way."""
    found = dispatch.fast_path_attention("native")
    assert found is not None
    return found


def in_general(*arguments: Any, **options: Any) -> Tensor:
    """The same by the general way, which a request for lse takes."""
    out: Tensor = attention(*arguments, **options, return_lse=True, backend="native")[0]
    return out


def heads_behind_length(*shape: int) -> Tensor:
    batch, heads, length, dim = shape
    return rand(batch, length, heads, dim).transpose(1, 2)


SHAPES = {
    "tiny": (rand(1, 1, 4, 8), rand(1, 1, 4, 8), rand(1, 1, 4, 8)),
    "tiles": (rand(2, 3, 70, 33), rand(2, 3, 130, 33), rand(2, 3, 130, 33)),
    "grouped": (rand(2, 8, 3, 16), rand(2, 2, 300, 16), rand(2, 2, 300, 16)),
    "values": (rand(2, 2, 20, 16), rand(2, 2, 20, 16), rand(2, 2, 20, 24)),
    "heads": tuple(heads_behind_length(2, 3, 20, 16) for _ in range(3)),
    "sliced": (rand(2, 2, 20, 40)[..., 3:19], rand(2, 2, 40, 16)[:, :, ::2], rand(2, 2, 20, 16)),
}


def masks_for(q: Tensor, k: Tensor) -> list[Mask | None]:
    batch, heads, query_len, key_len = *q.shape[:3], k.shape[2]
    lengths = (torch.arange(batch) * 3 + 1).clamp(max=key_len + 1)
    allowed = rand(batch, heads, query_len, key_len) > 0
    every: list[Mask | None] = [None, Causal("upper_left"), Causal("lower_right")]
    every += [KeyLengths(lengths), KeyLengths(torch.zeros_like(lengths))]
    dense = (allowed, allowed[:1], allowed[:, :1], allowed[:, :, :1], allowed[..., :1])
    return every + [Dense(each) for each in (*dense, allowed.mT.contiguous().mT)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_and_layout_are_those_of_the_general_way(
    shape: str, dtype: torch.dtype, take: Callable[..., Tensor | None]
) -> None:
    q, k, v = (tensor.to(dtype) for tensor in SHAPES[shape])
    for mask in masks_for(q, k):
        for scale in (None, 0.3):
            out = take(q, k, v, mask, scale)
            assert out is not None
            expected = in_general(q, k, v, mask, scale=scale)
            assert torch.equal(out, expected)
            assert out.stride() == expected.stride()
            assert torch.equal(attention(q, k, v, mask, scale=scale, backend="native"), expected)


def test_the_public_function_takes_it(
    monkeypatch: pytest.MonkeyPatch, take: Callable[..., Tensor | None]
) -> None:
    q = rand(1, 2, 4, 8)
    built: list[str] = []
    monkeypatch.setattr(dispatch, "choose", lambda *_: built.append("a problem"))
    attention(q, q, q, backend="native")
    attention(q, q, q, Causal(), backend="native")
    attention(q, q, q, KeyLengths(torch.tensor([3])), backend="native")
    attention(q, q, q, Dense(torch.ones(1, 1, 4, 4, dtype=torch.bool)), backend="native")
    with torch.no_grad():
        out = attention(q.clone().requires_grad_(), q, q, backend="native")
    with torch.inference_mode():
        inferred = attention(q, q, q, backend="native")
    assert not built
    assert not out.requires_grad
    assert inferred.is_inference()


Q, LENGTH = rand(1, 2, 4, 8), torch.tensor([2])
MARKED = type("Marked", (Tensor,), {})
NOT_PLAIN: dict[str, tuple[Any, ...]] = {
    "other dtype": (Q, Q.double(), Q, None, None),
    "ints": (Q.long(), Q.long(), Q.long(), None, None),
    "complex": (Q.to(torch.complex64),) * 3 + (None, None),
    "three dimensions": (Q[0], Q[0], Q[0], None, None),
    "other batch": (Q, Q.expand(2, 2, 4, 8), Q.expand(2, 2, 4, 8), None, None),
    "other lengths": (Q, Q, Q[:, :, :3], None, None),
    "other head size": (Q, Q[..., :7], Q, None, None),
    "heads that don't divide": (rand(1, 3, 4, 8), Q, Q, None, None),
    "no heads": (Q[:, :0], Q[:, :0], Q[:, :0], None, None),
    "no columns": (Q[..., :0], Q[..., :0], Q, None, None),
    "columns apart": (Q.mT.contiguous().mT, Q, Q, None, None),
    "negated": (torch._neg_view(Q), Q, Q, None, None),
    "zeros without memory": (Q, Q, torch._efficientzerotensor(Q.shape), None, None),
    "a view of such zeros": (torch._efficientzerotensor((1, 2, 9, 8))[:, :, 5:], Q, Q, None, None),
    "functional": (torch._to_functional_tensor(Q), Q, Q, None, None),
    "not a tensor": (Q, None, Q, None, None),
    "on no device": (Q.to("meta"), Q, Q, None, None),
    "a subclass": (Q, Q, Q.as_subclass(MARKED), None, None),
    "sparse": (Q.to_sparse(), Q, Q, None, None),
    "scale of NaN": (Q, Q, Q, None, float("nan")),
    "scale of text": (Q, Q, Q, None, "1"),
    "causal without align": (Q, rand(1, 2, 5, 8), rand(1, 2, 5, 8), Causal(), None),
    "causal by number": (Q, Q, Q, Causal(1), None),
    "causal by tensor": (Q, Q, Q, Causal(torch.tensor([1])), None),
    "causal with a prefix": (Q, Q, Q, Causal(prefix=torch.tensor([2])), None),
    "lengths of int32": (Q, Q, Q, KeyLengths(torch.tensor([2], dtype=torch.int32)), None),
    "lengths of two": (Q, Q, Q, KeyLengths(torch.tensor([2, 2])), None),
    "lengths of a subclass": (Q, Q, Q, KeyLengths(LENGTH.as_subclass(MARKED)), None),
    "lengths on no device": (Q, Q, Q, KeyLengths(LENGTH.to("meta")), None),
    "lengths and causal": (Q, Q, Q, KeyLengths(LENGTH) & Causal(), None),
    "no mask object": (Q, Q, Q, torch.ones(1, 1, 4, 4, dtype=torch.bool), None),
    "dense of two dimensions": (Q, Q, Q, Dense(torch.ones(4, 4, dtype=torch.bool)), None),
    "dense of other heads": (Q, Q, Q, Dense(torch.ones(1, 3, 4, 4, dtype=torch.bool)), None),
    "dense of other keys": (Q, Q, Q, Dense(torch.ones(1, 1, 4, 5, dtype=torch.bool)), None),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_is_left_alone(name: str, take: Callable[..., Tensor | None]) -> None:
    assert take(*NOT_PLAIN[name]) is None


@pytest.mark.parametrize("length", [2, 90])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", ["key", "value"])
def test_what_no_query_attends_is_never_read(
    at: str, value: float, length: int, take: Callable[..., Tensor | None]
) -> None:
    """By decoding's kernel and by tiles; the general way puts zeros there."""
    q, k, v = rand(1, 2, length, 8), rand(1, 2, 70, 8), rand(1, 2, 70, 8)
    mask = Dense(torch.arange(70).view(1, 1, 1, 70) != 3)
    expected = attention(q, k, v, mask, backend="native")
    (k if at == "key" else v)[:, :, 3] = value
    assert torch.equal(attention(q, k, v, mask, backend="native"), expected)
    taken = take(q, k, v, mask, None)
    assert taken is None or torch.equal(taken, expected)


def test_what_a_transform_left_behind_is_left_alone(take: Callable[..., Tensor | None]) -> None:
    for kept in left_by_transforms(Q):
        assert take(kept, Q, Q, None, None) is None


def test_a_gradient_needs_the_general_way() -> None:
    leaf = Q.clone().requires_grad_()
    assert operators.fast_path_attention(leaf, Q, Q, None, None, "native") is None
    assert attention(leaf, Q, Q, backend="native").requires_grad


def test_a_wrong_number_of_arguments(extension: Any) -> None:
    with pytest.raises(TypeError, match="expected 7 arguments, got 3"):
        extension.fast_path_attention(Q, Q, Q)
