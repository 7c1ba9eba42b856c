"""The operators called by hand: what is wrong is refused before memory is read, and named."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels.ops.operator_checks import checked
from rowmax.kernels.ops.operators import OPERATORS

from .. import tensors
from .backends import BACKENDS, device_of

NAN = float("nan")
rand = functools.partial(tensors.rand, dtype=torch.float32)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


Q, K, V = rand(2, 4, 5, 8), rand(2, 2, 7, 8), rand(2, 2, 7, 6)
OUT, LSE = rand(2, 4, 5, 6), rand(2, 4, 5, dtype=torch.float64)
X, W = rand(3, 8), rand(8)
MEAN = rand(3)
MASK: dict[str, Any] = {
    "dense": torch.ones(2, 1, 5, 7, dtype=torch.bool),
    "key_lengths": ints(7, 3),
    "query_lengths": ints(5, 2),
    "query_documents": torch.zeros(2, 5, dtype=torch.int64),
    "key_documents": torch.zeros(2, 7, dtype=torch.int64),
    "band": torch.tensor([[-3, 2], [-1, 0]]),
    "prefix_lengths": ints(0, 3),
    "band_lower": -4,
    "band_upper": 4,
}
ATTENTION: dict[str, Any] = {
    "query": Q,
    "key": K,
    "value": V,
    "bias": rand(1, 4, 5, 7),
    "alibi_slopes": rand(1, 4).abs(),
    "alibi_offset": ints(0),
    "sinks": rand(4),
    **MASK,
    "scale": 0.3,
    "softcap": 2.0,
    "dropout_p": 0.5,
    "seed": torch.tensor(3),
    "batch_start": 0,
    "query_starts": None,
    "key_starts": None,
    "longest_query": 0,
    "longest_key": 0,
}
PACKED: dict[str, Any] = ATTENTION | {
    **dict.fromkeys(("bias", *list(MASK)[:5])),
    "query": rand(1, 4, 6, 8),
    "key": rand(1, 2, 7, 8),
    "value": rand(1, 2, 7, 6),
    "query_starts": ints(0, 4, 6),
    "key_starts": ints(0, 2, 7),
    "longest_query": 4,
    "longest_key": 5,
}
NORM: dict[str, Any] = {"weight": W, "bias": W, "eps": 1e-5}
WORDS, TARGET = rand(4, 8), ints(0, 3, 3, -100, 1)
LOSS: dict[str, Any] = {
    "x": rand(5, 8),
    "weight": WORDS,
    "target": TARGET,
    "label_smoothing": 0.1,
    "ignore_index": -100,
    "mean": True,
    "x_grad": True,
    "weight_grad": True,
}
DROPOUT: dict[str, Any] = {"dropout_p": 0.5, "seed": torch.tensor(3)}
# what is called -> the operator, and all of its arguments but the backend, right ones, in order
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", ATTENTION),
    "packed": ("attention", PACKED),
    "attention_backward": (
        "attention_backward",
        {"grad_out": OUT, "grad_lse": LSE, "out": OUT, "lse": LSE}
        | {"bias_grad": True, "sinks_grad": True, **ATTENTION},
    ),
    "packed_backward": (
        "attention_backward",
        {"grad_out": rand(1, 4, 6, 6), "grad_lse": None, "out": rand(1, 4, 6, 6)}
        | {"lse": rand(1, 4, 6, dtype=torch.float64), "bias_grad": False, "sinks_grad": True}
        | PACKED,
    ),
    "masked_softmax": ("masked_softmax", {"scores": rand(2, 4, 5, 7), **MASK, "scale": 0.5}),
    "masked_softmax_backward": (
        "masked_softmax_backward",
        {"grad_weights": rand(2, 4, 5, 7), "weights": rand(2, 4, 5, 7).abs(), "scale": 0.5},
    ),
    "layer_norm": ("layer_norm", {"x": X, **NORM}),
    "layer_norm_backward": (
        "layer_norm_backward",
        {"grad_y": X, "mean": MEAN, "rstd": MEAN, "x": X, **NORM},
    ),
    "add_layer_norm": ("add_layer_norm", {"x": X, "residual": X, **NORM, **DROPOUT}),
    "add_layer_norm_backward": (
        "add_layer_norm_backward",
        {"grad_y": X, "grad_total": X, "total": X, "mean": MEAN, "rstd": MEAN, **NORM, **DROPOUT},
    ),
    "rms_norm": ("rms_norm", {"x": X, "weight": W, "eps": 1e-5}),
    "rms_norm_backward": (
        "rms_norm_backward",
        {"grad_y": X, "rstd": MEAN, "x": X, "weight": W, "eps": 1e-5},
    ),
    "linear_cross_entropy": ("linear_cross_entropy", LOSS),
    "linear_cross_entropy_backward": (
        "linear_cross_entropy_backward",
        {"grad_loss": torch.tensor(2.0), "d_x": rand(5, 8), "d_weight": WORDS, **LOSS},
    ),
}


def called(name: str, changed: dict[str, Any], backend: str) -> Any:
    operator, right = CALLS[name]
    assert set(changed) <= set(right)
    arguments = [
        argument.to(device_of(backend)) if isinstance(argument, Tensor) else argument
        for argument in (right | changed).values()
    ]
    return getattr(torch.ops.rowmax, operator)(*arguments, backend)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_right_arguments_are_taken(name: str, backend: str) -> None:
    found = called(name, {}, backend)
    assert isinstance(found, Tensor | tuple | list)


HALF, WIDE = torch.bfloat16, torch.float64
FORWARD = ("attention", "attention_backward")
PACKED_BOTH = ("packed", "packed_backward")
MASKED = (*FORWARD, "masked_softmax")
ROWS = ("layer_norm", "layer_norm_backward", "add_layer_norm", "add_layer_norm_backward")
NORMS = (*ROWS, "rms_norm", "rms_norm_backward")
LOSSES = ("linear_cross_entropy", "linear_cross_entropy_backward")
DROPPING = (*FORWARD, *PACKED_BOTH, "add_layer_norm", "add_layer_norm_backward")
# calls, the wrong arguments, the error, and the argument that it names
WRONG: list[tuple[tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    (FORWARD, {"query": Q.int()}, TypeError, "query"),
    (FORWARD, {"query": Q[0]}, ValueError, "query"),
    (FORWARD, {"query": Q.to_sparse()}, TypeError, "query"),
    (FORWARD, {"key": K.double()}, TypeError, "key"),
    (FORWARD, {"key": K[0]}, ValueError, "key"),
    (FORWARD, {"key": K[:1]}, ValueError, "key"),
    (FORWARD, {"key": K[..., :7]}, ValueError, "key"),
    (FORWARD, {"key": rand(2, 3, 7, 8), "value": rand(2, 3, 7, 6)}, ValueError, "key"),
    (FORWARD, {"key": K[:, :0], "value": V[:, :0]}, ValueError, "key"),
    (FORWARD, {"value": V.half()}, TypeError, "value"),
    (FORWARD, {"value": V[:, :, :6]}, ValueError, "value"),
    (FORWARD, {"value": V[:, :1]}, ValueError, "value"),
    (FORWARD, {"bias": torch.ones(1, 4, 5, 7, dtype=torch.bool)}, TypeError, "bias"),
    (FORWARD, {"bias": rand(4, 5, 7)}, ValueError, "bias"),
    (FORWARD, {"bias": rand(1, 4, 5, 6)}, ValueError, "bias"),
    (FORWARD, {"bias": rand(1, 2, 5, 7)}, ValueError, "bias"),
    (FORWARD, {"alibi_slopes": rand(4)}, ValueError, "alibi_slopes"),
    (FORWARD, {"alibi_slopes": rand(3, 4)}, ValueError, "alibi_slopes"),
    (FORWARD, {"alibi_slopes": ints(1, 2, 3, 4)[None]}, TypeError, "alibi_slopes"),
    (FORWARD, {"alibi_slopes": None}, ValueError, "alibi_slopes"),
    (FORWARD, {"alibi_offset": None}, ValueError, "alibi_offset"),
    (FORWARD, {"alibi_offset": ints(1, 2, 3)}, ValueError, "alibi_offset"),
    (FORWARD, {"alibi_offset": ints(1, dtype=torch.int32)}, TypeError, "alibi_offset"),
    (FORWARD, {"sinks": rand(3)}, ValueError, "sinks"),
    (FORWARD, {"sinks": ints(1, 2, 3, 4)}, TypeError, "sinks"),
    (FORWARD, {"softcap": 0.0}, ValueError, "softcap"),
    (FORWARD, {"batch_start": -1}, ValueError, "batch_start"),
    (FORWARD, {"query_starts": ints(0, 5)}, ValueError, "key_starts"),
    (FORWARD, {"key_starts": ints(0, 7)}, ValueError, "query_starts"),
    (FORWARD, {"query_starts": ints(0, 5), "key_starts": ints(0, 7)}, ValueError, "query"),
    ((*MASKED, "masked_softmax_backward"), {"scale": NAN}, ValueError, "scale"),
    (MASKED, {"dense": rand(2, 1, 5, 7)}, TypeError, "dense"),
    (MASKED, {"dense": MASK["dense"][:, 0]}, ValueError, "dense"),
    (MASKED, {"dense": MASK["dense"][..., :4]}, ValueError, "dense"),
    (MASKED, {"key_lengths": ints(7)}, ValueError, "key_lengths"),
    (MASKED, {"key_lengths": ints(7, 3, dtype=torch.int32)}, TypeError, "key_lengths"),
    (MASKED, {"query_lengths": ints(7, 3)[None]}, ValueError, "query_lengths"),
    (MASKED, {"query_lengths": rand(2)}, TypeError, "query_lengths"),
    (MASKED, {"query_documents": ints(0)[None]}, ValueError, "query_documents"),
    (MASKED, {"query_documents": None}, ValueError, "query_documents"),
    (MASKED, {"key_documents": MASK["query_documents"]}, ValueError, "key_documents"),
    (MASKED, {"key_documents": rand(2, 7)}, TypeError, "key_documents"),
    (MASKED, {"key_documents": None}, ValueError, "key_documents"),
    (MASKED, {"band": ints(0, 1)}, ValueError, "band"),
    (MASKED, {"band": MASK["band"].int()}, TypeError, "band"),
    (MASKED, {"prefix_lengths": ints(3)}, ValueError, "prefix_lengths"),
    (MASKED, {"prefix_lengths": rand(2)}, TypeError, "prefix_lengths"),
    (PACKED_BOTH, {"query_starts": ints(0, 4, 100000)}, ValueError, "query_starts"),
    (PACKED_BOTH, {"query_starts": ints(0, 4, 5)}, ValueError, "query_starts"),
    (PACKED_BOTH, {"query_starts": ints(1, 4, 6)}, ValueError, "query_starts"),
    (PACKED_BOTH, {"query_starts": ints(0, 7, 6)}, ValueError, "query_starts"),
    (PACKED_BOTH, {"query_starts": ints(0, 4, 6)[None]}, ValueError, "query_starts"),
    (PACKED_BOTH, {"query_starts": ints(0, 4, 6).int()}, TypeError, "query_starts"),
    (PACKED_BOTH, {"query_starts": ints()}, ValueError, "query_starts"),
    (PACKED_BOTH, {"key_starts": ints(0, -2, 7)}, ValueError, "key_starts"),
    (PACKED_BOTH, {"key_starts": ints(0, 2, 8)}, ValueError, "key_starts"),
    (PACKED_BOTH, {"key_starts": ints(0, 2, 5, 7)}, ValueError, "key_starts"),
    (PACKED_BOTH, {"longest_query": 3}, ValueError, "longest_query"),
    (PACKED_BOTH, {"longest_key": 4}, ValueError, "longest_key"),
    (PACKED_BOTH, {"band": MASK["band"][:1]}, ValueError, "band"),
    (PACKED_BOTH, {"key_lengths": ints(2, 5)}, ValueError, "key_lengths"),
    (PACKED_BOTH, {"bias": rand(1, 4, 6, 7)}, ValueError, "bias"),
    (FORWARD[1:], {"grad_out": OUT.double()}, TypeError, "grad_out"),
    (FORWARD[1:], {"grad_out": OUT[..., :5]}, ValueError, "grad_out"),
    (FORWARD[1:], {"grad_lse": LSE.float()}, TypeError, "grad_lse"),
    (FORWARD[1:], {"grad_lse": LSE[:, :3]}, ValueError, "grad_lse"),
    (FORWARD[1:], {"out": OUT[:1]}, ValueError, "out"),
    (FORWARD[1:], {"out": OUT.half()}, TypeError, "out"),
    (FORWARD[1:], {"lse": LSE[..., :4]}, ValueError, "lse"),
    (FORWARD[1:], {"lse": LSE.float()}, TypeError, "lse"),
    (FORWARD[1:], {"bias": None}, ValueError, "bias_grad"),
    (FORWARD[1:], {"sinks": None}, ValueError, "sinks_grad"),
    (("masked_softmax",), {"scores": rand(5, 7)}, ValueError, "scores"),
    (LOSSES, {"x": rand(2, 5, 8)}, ValueError, "x"),
    (LOSSES, {"x": rand(5, 8).long()}, TypeError, "x"),
    (LOSSES, {"weight": rand(4, 7)}, ValueError, "weight"),
    (LOSSES, {"weight": WORDS.double()}, TypeError, "weight"),
    (LOSSES, {"target": TARGET[:4]}, ValueError, "target"),
    (LOSSES, {"target": TARGET.int()}, TypeError, "target"),
    (LOSSES, {"label_smoothing": 1.5}, ValueError, "label_smoothing"),
    (LOSSES, {"label_smoothing": NAN}, ValueError, "label_smoothing"),
    (LOSSES[1:], {"d_x": rand(4, 8)}, ValueError, "d_x"),
    (LOSSES[1:], {"d_weight": rand(4, 8).half()}, TypeError, "d_weight"),
    (LOSSES[1:], {"grad_loss": rand(2)}, ValueError, "grad_loss"),
    (("masked_softmax",), {"scores": rand(2, 4, 5, 7).long()}, TypeError, "scores"),
    (("masked_softmax_backward",), {"weights": rand(5, 7)}, ValueError, "weights"),
    (("masked_softmax_backward",), {"grad_weights": rand(2, 4, 5, 6)}, ValueError, "grad_weights"),
    (("masked_softmax_backward",), {"grad_weights": rand(2, 4, 5, 7).half()}, TypeError, "grad_w"),
    (FORWARD, {"value": None}, TypeError, "value"),
    (("layer_norm_backward",), {"rstd": None}, TypeError, "rstd"),
    (DROPPING, {"dropout_p": 1.5}, ValueError, "dropout_p"),
    (DROPPING, {"seed": None}, ValueError, "seed"),
    (DROPPING, {"seed": ints(3, 4)}, ValueError, "seed"),
    (DROPPING, {"seed": torch.tensor(3.0)}, TypeError, "seed"),
    (NORMS, {"weight": W[:7]}, ValueError, "weight"),
    (NORMS, {"weight": W[None]}, ValueError, "weight"),
    (NORMS, {"weight": W.int()}, TypeError, "weight"),
    (NORMS, {"eps": -1.0}, ValueError, "eps"),
    (NORMS, {"eps": NAN}, ValueError, "eps"),
    (ROWS, {"bias": W[:1]}, ValueError, "bias"),
    (("layer_norm", "rms_norm", "add_layer_norm"), {"x": X.int()}, TypeError, "x"),
    (("layer_norm", "rms_norm", "add_layer_norm"), {"x": X[0, 0]}, ValueError, "x"),
    (("layer_norm", "rms_norm"), {"x": X.to_sparse()}, TypeError, "x"),
    (("layer_norm_backward", "rms_norm_backward"), {"x": X[:2]}, ValueError, "grad_y"),
    (("add_layer_norm",), {"residual": X[:2]}, ValueError, "residual"),
    (("add_layer_norm",), {"residual": X.double()}, TypeError, "residual"),
    (("add_layer_norm_backward",), {"total": X.double()}, TypeError, "mean"),
    (("add_layer_norm_backward",), {"grad_total": X[..., :7]}, ValueError, "grad_total"),
    (tuple(n for n in NORMS if "back" in n), {"grad_y": X[:1]}, ValueError, "grad_y"),
    (tuple(n for n in NORMS if "back" in n), {"grad_y": X.half()}, TypeError, "grad_y"),
    (tuple(n for n in NORMS if "back" in n), {"rstd": MEAN[:2]}, ValueError, "rstd"),
    (tuple(n for n in NORMS if "back" in n), {"rstd": MEAN.half()}, TypeError, "rstd"),
    (tuple(n for n in ROWS if "back" in n), {"mean": MEAN[None]}, ValueError, "mean"),
    (tuple(n for n in ROWS if "back" in n), {"mean": MEAN.double()}, TypeError, "mean"),
]


@pytest.mark.parametrize(
    "name,changed,error,argument",
    [
        pytest.param(name, changed, error, argument, id=f"{name}-{next(iter(changed))}")
        for names, changed, error, argument in WRONG
        for name in names
    ],
)
def test_wrong_arguments_are_named(
    name: str, changed: dict[str, Any], error: type[Exception], argument: str
) -> None:
    with pytest.raises(error, match=f"rowmax::{CALLS[name][0]}: `{argument}.*expected.*got"):
        called(name, changed, "auto")


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=f"rowmax::{CALLS[name][0]}: `backend`"):
        called(name, {}, "fastest")


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_elsewhere(name: str) -> None:
    """Each on another device; one among meta tensors would not come to an implementation."""
    operator, right = CALLS[name]
    check = checked(OPERATORS[operator], lambda *arguments: "taken")
    assert check(*right.values(), "auto") == "taken"
    for argument, tensor in right.items():
        if isinstance(tensor, Tensor):
            changed = right | {argument: tensor.to("meta")}
            with pytest.raises(
                ValueError, match=rf"rowmax::{operator}: `\w+`.*expected.*(meta|cpu)"
            ):
                check(*changed.values(), "auto")
