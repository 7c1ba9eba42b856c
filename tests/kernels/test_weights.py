"""`return_weights`: what the weights are, and that asking for them changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rowmax.kernels import attention
from rowmax.kernels.backends.reference import naive_attention

from .cases import BY_NAME

NAMES = [
    "shape_gqa",
    "joined_everything",
    "documents_cross",
    "bias_BHQK",
    "bias_1H1K",
    "alibi_tensor",
    "sinks_masked_rows",
    "dropout_half",
    "everything",
    "keys_zero_and_beyond",
]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_naive_path(name: str) -> None:
    arguments = BY_NAME[name].build(torch.float64)
    _, heads, queries, _ = arguments.shape
    whole = naive_attention(arguments.naive_problem()).weights
    plain = attention(*arguments.tensors, **arguments.keywords)
    for chosen_heads, chosen_rows in (
        (None, None),
        ([heads - 1, 0], None),
        (None, [queries - 1, 2, 2]),
        ([heads - 1], [0, queries - 1]),
        ([], []),
    ):
        out, lse, weights = attention(
            *arguments.tensors,
            **arguments.keywords,
            return_lse=True,
            return_weights=True,
            weight_heads=chosen_heads,
            weight_rows=chosen_rows,
        )
        assert torch.equal(out, plain)
        assert lse.shape == out.shape[:3]
        expected = whole
        if chosen_heads is not None:
            expected = expected[:, chosen_heads]
        if chosen_rows is not None:
            expected = expected[:, :, chosen_rows]
        torch.testing.assert_close(weights, expected, rtol=0.0, atol=1e-13)


def test_weights_have_a_gradient_and_the_dtype_of_q() -> None:
    arguments = BY_NAME["shape_gqa"].build(torch.bfloat16)
    q = arguments.q.requires_grad_()
    _, weights = attention(q, arguments.k, arguments.v, return_weights=True, weight_rows=[3])
    assert weights.dtype == torch.bfloat16
    entropy = -(weights.float() * (weights.float() + 1e-9).log()).sum()
    (d_q,) = torch.autograd.grad(entropy, q)
    assert d_q[:, :, 3].abs().max() > 0
    assert d_q[:, :, :3].abs().max() == 0


def test_no_memory_but_that_of_the_chosen_weights() -> None:
    """2**16 x 2**16 weights would not fit anywhere."""
    q, k, v = (torch.zeros(1, 1, 2**16, 1) for _ in range(3))
    _, weights = attention(q[:, :, :8], k, v, return_weights=True, weight_rows=[5])
    assert weights.shape == (1, 1, 1, 2**16)
    assert (weights == 2.0**-16).all()


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"weight_heads": [0]}, ValueError, "weight_heads.*return_weights"),
        ({"return_weights": True, "weight_heads": [6]}, ValueError, "weight_heads.*0 to 5"),
        ({"return_weights": True, "weight_rows": [-1]}, ValueError, "weight_rows.*0 to 19"),
        ({"return_weights": True, "weight_rows": 3}, TypeError, "weight_rows.*sequence of ints"),
        ({"return_weights": True, "weight_rows": [0.5]}, TypeError, "weight_rows.*sequence"),
    ],
)
def test_what_is_chosen_is_checked(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = BY_NAME["shape_gqa"].build(torch.float32)
    with pytest.raises(error, match=message):
        attention(*arguments.tensors, **given)
