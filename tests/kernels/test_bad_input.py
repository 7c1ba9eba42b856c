"""Every wrong argument is refused before any work, by an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rowmax.kernels import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    KeyLengths,
    QueryLengths,
    Window,
    add_layer_norm,
    attention,
    attention_varlen,
    explain,
    layer_norm,
    linear_cross_entropy,
    masked_softmax,
    rms_norm,
)
from rowmax.kernels.api.attention import attention_problem
from rowmax.kernels.backends import dispatch

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
META = torch.zeros(2, 4, 5, 8, device="meta")
NAN = float("nan")

# the function, what is wrong, the error, and what its message must name
ATTENTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q_list": ({"q": [1.0]}, TypeError, "`q`.*torch.Tensor.*list"),
    "k_none": ({"k": None}, TypeError, "`k`.*NoneType"),
    "q_int": ({"q": Q.long()}, TypeError, "`q`.*float64.*int64"),
    "q_complex": ({"q": Q.to(torch.complex64)}, TypeError, "`q`.*complex64"),
    "q_bool": ({"q": Q.bool()}, TypeError, "`q`.*bool"),
    "k_dtype": ({"k": K.double()}, TypeError, r"`k`.*float32, that of `q`.*float64"),
    "v_dtype": ({"v": V.half()}, TypeError, "`v`.*float32.*float16"),
    "k_device": ({"k": K.to("meta")}, ValueError, "`k`.*cpu, as `q`.*meta"),
    "q_3d": ({"q": Q[0]}, ValueError, r"`q`.*\(B, Hq, Lq, D\).*\(4, 5, 8\)"),
    "v_5d": ({"v": V[None]}, ValueError, r"`v`.*\(B, Hkv, Lk, Dv\)"),
    "k_batch": ({"k": K[:1], "v": V[:1]}, ValueError, "`k`.*B = 2"),
    "k_head_dim": ({"k": K[..., :4]}, ValueError, "`k`.*D = 8"),
    "v_length": ({"v": V[:, :, :3]}, ValueError, r"`v`.*\(2, 2, 7, Dv\).*\(2, 2, 3, 6\)"),
    "v_heads": ({"v": V[:, :1]}, ValueError, "`v`"),
    "heads": ({"k": K[:, [0, 1, 0]], "v": V[:, [0, 1, 0]]}, ValueError, "`k`.*divides the 4"),
    "heads_none": ({"k": K[:, :0], "v": V[:, :0]}, ValueError, "`k`.*divides the 4"),
    "heads_more": ({"q": Q[:, :1]}, ValueError, "`k`.*divides the 1"),
    "mask_str": ({"mask": "causal"}, TypeError, "`mask`.*Causal.*str"),
    "mask_class": ({"mask": Causal}, TypeError, "`mask`"),
    "mask_true": ({"mask": True}, TypeError, "`mask`.*bool"),
    "mask_float": ({"mask": torch.zeros(5, 7)}, TypeError, "bool, True = may attend.*`bias`"),
    "mask_shape": ({"mask": torch.ones(5, 6).bool()}, ValueError, r"broadcasts to.*\(2, 4, 5, 7\)"),
    "mask_5d": ({"mask": torch.ones(1, 2, 4, 5, 7).bool()}, ValueError, "broadcasts"),
    "mask_device": ({"mask": torch.ones(5, 7, device="meta").bool()}, ValueError, "meta"),
    "causal_unaligned": ({"mask": Causal()}, ValueError, "`align`.*Lq = 5.*Lk = 7"),
    "window_unaligned": ({"mask": Window(2, 0)}, ValueError, "`align`"),
    "align_word": ({"mask": Causal("bottom")}, ValueError, "`align`.*upper_left.*'bottom'"),  # type: ignore[arg-type]
    "align_float": ({"mask": Causal(1.5)}, ValueError, "`align`.*1.5"),  # type: ignore[arg-type]
    "align_true": ({"mask": Causal(True)}, ValueError, "`align`.*True"),
    "align_float_tensor": ({"mask": Causal(torch.zeros(2))}, TypeError, "`align`.*float32"),
    "align_batch": ({"mask": Causal(torch.tensor([1, 2, 3]))}, ValueError, r"`align`.*\(2,\)"),
    "lengths_batch": ({"mask": KeyLengths(torch.tensor([1]))}, ValueError, r"`lengths`.*\(2,\)"),
    "query_lengths_batch": ({"mask": QueryLengths(torch.tensor([1]))}, ValueError, "`lengths`"),
    "lengths_device": (
        {"mask": KeyLengths(torch.ones(2, device="meta").int())},
        ValueError,
        "`lengths`.*meta",
    ),
    "documents_length": (
        {"mask": Documents(torch.zeros(2, 5).long())},
        ValueError,
        r"`ids`.*\(2, 7\)",
    ),
    "documents_keys": (
        {"mask": Documents(torch.zeros(2, 5).long(), torch.zeros(2, 6).long())},
        ValueError,
        r"`key_ids`.*\(2, 7\)",
    ),
    "joined": ({"mask": Causal(0) & KeyLengths(torch.tensor([1]))}, ValueError, "`lengths`"),
    "bias_bool": ({"bias": torch.ones(5, 7).bool()}, TypeError, "`bias`.*`mask`"),
    "bias_int": ({"bias": torch.ones(5, 7).int()}, TypeError, "`bias`.*int32"),
    "bias_number": ({"bias": 0.5}, TypeError, "`bias`.*float"),
    "bias_shape": ({"bias": torch.ones(3, 5, 7)}, ValueError, r"`bias`.*\(2, 4, 5, 7\)"),
    "bias_device": ({"bias": torch.ones(5, 7, device="meta")}, ValueError, "`bias`.*meta"),
    "slopes_heads": ({"bias": ALiBi(torch.ones(3), 0)}, ValueError, r"`slopes`.*\(4,\)"),
    "slopes_unaligned": ({"bias": ALiBi(torch.ones(4))}, ValueError, "`align`"),
    "slopes_device": ({"bias": ALiBi(torch.ones(4, device="meta"), 0)}, ValueError, "`slopes`"),
    "scale_text": ({"scale": "0.5"}, TypeError, "`scale`.*number.*str"),
    "scale_tensor": ({"scale": torch.tensor(0.5)}, TypeError, "`scale`.*number.*Tensor"),
    "scale_nan": ({"scale": NAN}, ValueError, "`scale`.*nan"),
    "scale_inf": ({"scale": float("inf")}, ValueError, "`scale`.*inf"),
    "softcap_zero": ({"softcap": 0}, ValueError, "`softcap`.*> 0.*0"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "`softcap`"),
    "softcap_nan": ({"softcap": NAN}, ValueError, "`softcap`"),
    "softcap_list": ({"softcap": [1]}, TypeError, "`softcap`.*list"),
    "dropout_above": ({"dropout_p": 1.5}, ValueError, r"`dropout_p`.*\[0, 1\].*1.5"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, "`dropout_p`"),
    "dropout_nan": ({"dropout_p": NAN}, ValueError, "`dropout_p`"),
    "dropout_none": ({"dropout_p": None}, TypeError, "`dropout_p`.*NoneType"),
    "seed_float": ({"seed": 1.0, "dropout_p": 0.1}, TypeError, "`seed`.*float"),
    "seed_unused_float": ({"seed": 1.0}, TypeError, "`seed`.*float"),
    "seed_int32": ({"seed": torch.tensor(1).int(), "dropout_p": 0.1}, TypeError, "`seed`.*int32"),
    "seed_1d": ({"seed": torch.tensor([1]), "dropout_p": 0.1}, TypeError, "`seed`.*0-d"),
    "seed_wide": ({"seed": 2**63, "dropout_p": 0.1}, ValueError, "`seed`.*64 bits"),
    "sinks_shape": ({"sinks": torch.zeros(2)}, ValueError, r"`sinks`.*\(4,\).*\(2,\)"),
    "sinks_int": ({"sinks": torch.zeros(4).int()}, TypeError, "`sinks`.*int32"),
    "sinks_device": ({"sinks": torch.zeros(4, device="meta")}, ValueError, "`sinks`.*meta"),
    "backend_unknown": ({"backend": "cuda"}, ValueError, "`backend`.*auto.*reference.*'cuda'"),
    "backend_type": ({"backend": None}, TypeError, "`backend`.*str.*NoneType"),
}


@pytest.mark.parametrize("changes,error,match", ATTENTION.values(), ids=ATTENTION.keys())
def test_attention(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": K, "v": V, "backend": "reference"} | changes
    with pytest.raises(error, match=match):
        attention(**arguments)
    if not changes.keys() & {"seed", "backend"}:
        del arguments["backend"]
        with pytest.raises(error, match=match):
            explain(**arguments)


PACKED = (torch.zeros(9, 4, 8), torch.zeros(11, 2, 8), torch.zeros(11, 2, 6))
CU_Q, CU_K = torch.tensor([0, 4, 9]), torch.tensor([0, 5, 11])
VARLEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q_4d": ({"q": Q}, ValueError, r"`q`.*\(total, H, D\)"),
    "q_int": ({"q": PACKED[0].int()}, TypeError, "`q`.*int32"),
    "v_rows": ({"v": PACKED[2][:9]}, ValueError, "`v`.*11"),
    "k_dtype": ({"k": PACKED[1].double()}, TypeError, "`k`"),
    "k_heads": ({"k": PACKED[1][:, :0], "v": PACKED[2][:, :0]}, ValueError, "`k`.*divides the 4"),
    "starts_list": ({"cu_seqlens_q": [0, 4, 9]}, TypeError, "`cu_seqlens_q`.*list"),
    "starts_float": ({"cu_seqlens_q": CU_Q.float()}, TypeError, "`cu_seqlens_q`.*float32"),
    "starts_2d": ({"cu_seqlens_k": CU_K[None]}, ValueError, "`cu_seqlens_k`"),
    "starts_none": ({"cu_seqlens_q": CU_Q[:0]}, ValueError, "`cu_seqlens_q`"),
    "starts_first": ({"cu_seqlens_q": torch.tensor([1, 4, 9])}, ValueError, "begin with 0"),
    "starts_last": ({"cu_seqlens_k": torch.tensor([0, 5, 10])}, ValueError, "end with 11"),
    "starts_fall": ({"cu_seqlens_k": torch.tensor([0, 12, 11])}, ValueError, "never fall"),
    "starts_count": ({"cu_seqlens_k": torch.tensor([0, 11])}, ValueError, "`cu_seqlens_k`.*2 entr"),
    "bound_alone": ({"max_seqlen_q": 5}, ValueError, "`max_seqlen_k`.*both or neither"),
    "bound_float": ({"max_seqlen_q": 5.0, "max_seqlen_k": 6}, TypeError, "`max_seqlen_q`.*float"),
    "bound_below_0": ({"max_seqlen_q": 5, "max_seqlen_k": -1}, ValueError, "`max_seqlen_k`.*-1"),
    "bound_small": ({"max_seqlen_q": 4, "max_seqlen_k": 6}, ValueError, "`max_seqlen_q`.*least 5"),
    "mask_tensor": ({"mask": torch.ones(1).bool()}, TypeError, "`mask`.*Causal, Window.*Tensor"),
    "mask_lengths": ({"mask": KeyLengths(torch.tensor([1]))}, TypeError, "`mask`.*KeyLengths"),
    "mask_joined": ({"mask": Causal(0) & Dense(torch.ones(1).bool())}, TypeError, "`mask`.*Dense"),
    "mask_align": ({"mask": Causal(torch.tensor([1, 2]))}, TypeError, "`mask`.*`align`"),
    "mask_unaligned": ({"mask": Causal()}, ValueError, "`align`"),
    "bias_tensor": ({"bias": torch.zeros(1)}, TypeError, "`bias`.*ALiBi.*Tensor"),
    "bias_align": ({"bias": ALiBi(torch.ones(4), torch.tensor([0]))}, TypeError, "`bias`.*`align`"),
    "scale": ({"scale": "1"}, TypeError, "`scale`"),
    "softcap": ({"softcap": 0.0}, ValueError, "`softcap`"),
    "dropout_p": ({"dropout_p": 2}, ValueError, "`dropout_p`"),
    "dropout_text": ({"dropout_p": "0.1"}, TypeError, "`dropout_p`"),
    "seed": ({"dropout_p": 0.5, "seed": "1"}, TypeError, "`seed`"),
    "sinks": ({"sinks": torch.zeros(3)}, ValueError, "`sinks`"),
    "backend": ({"backend": "gpu"}, ValueError, "`backend`"),
}


@pytest.mark.parametrize("changes,error,match", VARLEN.values(), ids=VARLEN.keys())
def test_varlen(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    q, k, v = PACKED
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    with pytest.raises(error, match=match):
        attention_varlen(**(arguments | {"backend": "reference"} | changes))


X, W = torch.zeros(3, 8), torch.zeros(8)
IDS = torch.tensor([2, 0, 1])
OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "layer_norm_x": (lambda: layer_norm(X.int()), TypeError, "layer_norm: `x`.*int32"),
    "layer_norm_none": (lambda: layer_norm(None), TypeError, "layer_norm: `x`"),  # type: ignore[arg-type]
    "layer_norm_0d": (lambda: layer_norm(torch.tensor(1.0)), ValueError, "`x`.*0-d"),
    "layer_norm_weight": (lambda: layer_norm(X, W[:7]), ValueError, r"`weight`.*\(8,\).*\(7,\)"),
    "layer_norm_weight_2d": (lambda: layer_norm(X, W[None]), ValueError, "`weight`"),
    "layer_norm_bias": (lambda: layer_norm(X, W, W.int()), TypeError, "`bias`.*int32"),
    "layer_norm_device": (lambda: layer_norm(X, W.to("meta")), ValueError, "`weight`.*meta"),
    "layer_norm_eps": (lambda: layer_norm(X, eps=-1.0), ValueError, "`eps`.*-1"),
    "layer_norm_eps_nan": (lambda: layer_norm(X, eps=NAN), ValueError, "`eps`.*nan"),
    "layer_norm_eps_text": (lambda: layer_norm(X, eps="1"), TypeError, "`eps`.*str"),  # type: ignore[arg-type]
    "layer_norm_backend": (lambda: layer_norm(X, backend="c"), ValueError, "`backend`"),
    "rms_norm_x": (lambda: rms_norm(X.bool()), TypeError, "rms_norm: `x`.*bool"),
    "rms_norm_weight": (lambda: rms_norm(X, W[:1]), ValueError, "rms_norm: `weight`"),
    "rms_norm_eps": (lambda: rms_norm(X, eps=float("inf")), ValueError, "`eps`"),
    "rms_norm_backend": (lambda: rms_norm(X, backend=""), ValueError, "`backend`"),
    "add_x": (lambda: add_layer_norm("x", X), TypeError, "add_layer_norm: `x`"),  # type: ignore[arg-type]
    "add_residual": (lambda: add_layer_norm(X, X.int()), TypeError, "`residual`.*int32"),
    "add_residual_shape": (lambda: add_layer_norm(X, X[:1]), ValueError, r"`residual`.*\(3, 8\)"),
    "add_residual_dtype": (lambda: add_layer_norm(X, X.double()), TypeError, "`residual`.*float64"),
    "add_residual_device": (lambda: add_layer_norm(X, X.to("meta")), ValueError, "`residual`"),
    "add_weight": (lambda: add_layer_norm(X, X, W[:2]), ValueError, "`weight`"),
    "add_eps": (lambda: add_layer_norm(X, X, eps=None), TypeError, "`eps`"),  # type: ignore[arg-type]
    "add_dropout": (lambda: add_layer_norm(X, X, dropout_p=1.1), ValueError, "`dropout_p`"),
    "add_seed": (lambda: add_layer_norm(X, X, dropout_p=0.5, seed="a"), TypeError, "`seed`"),  # type: ignore[arg-type]
    "add_backend": (lambda: add_layer_norm(X, X, backend="x"), ValueError, "`backend`"),
    "softmax_scores": (lambda: masked_softmax(X.int()), TypeError, "masked_softmax: `scores`"),
    "softmax_0d": (lambda: masked_softmax(torch.tensor(1.0)), ValueError, "`scores`.*1 to 4"),
    "softmax_5d": (lambda: masked_softmax(Q[None]), ValueError, "`scores`.*1 to 4"),
    "softmax_mask": (lambda: masked_softmax(X, X), TypeError, "bool"),
    "softmax_mask_type": (lambda: masked_softmax(X, 3), TypeError, "masked_softmax: `mask`"),  # type: ignore[arg-type]
    "softmax_mask_shape": (lambda: masked_softmax(X, W[:3].bool()), ValueError, "broadcasts"),
    "softmax_align": (lambda: masked_softmax(X, Causal()), ValueError, "`align`"),
    "softmax_scale": (lambda: masked_softmax(X, scale=NAN), ValueError, "`scale`"),
    "softmax_scale_none": (lambda: masked_softmax(X, scale=None), TypeError, "`scale`"),  # type: ignore[arg-type]
    "softmax_backend": (lambda: masked_softmax(X, backend="x"), ValueError, "`backend`"),
    "loss_x": (lambda: linear_cross_entropy(X.int(), X, IDS), TypeError, "`x`.*int32"),
    "loss_x_0d": (lambda: linear_cross_entropy(X[0, 0], X, IDS[0]), ValueError, "`x`.*0-d"),
    "loss_weight": (lambda: linear_cross_entropy(X, X.t(), IDS), ValueError, r"`weight`.*\(V, 8\)"),
    "loss_weight_dtype": (lambda: linear_cross_entropy(X, X.half(), IDS), TypeError, "`weight`"),
    "loss_weight_device": (
        lambda: linear_cross_entropy(X, X.to("meta"), IDS),
        *(ValueError, "`weight`"),
    ),
    "loss_target": (lambda: linear_cross_entropy(X, X, IDS[:2]), ValueError, r"`target`.*\(3,\)"),
    "loss_target_dtype": (lambda: linear_cross_entropy(X, X, IDS.int()), TypeError, "`target`"),
    "loss_target_soft": (lambda: linear_cross_entropy(X, X, X), TypeError, "`target`.*int64"),
    "loss_smoothing": (
        lambda: linear_cross_entropy(X, X, IDS, 1.1),
        *(ValueError, "`label_smoothing`.*1.1"),
    ),
    "loss_ignored": (
        lambda: linear_cross_entropy(X, X, IDS, ignore_index=None),  # type: ignore[arg-type]
        *(TypeError, "`ignore_index`.*NoneType"),
    ),
    "loss_ignored_too_large": (
        lambda: linear_cross_entropy(X, X, IDS, ignore_index=2**63),
        *(ValueError, "`ignore_index`.*64 bits"),
    ),
    "loss_reduction": (
        lambda: linear_cross_entropy(X, X, IDS, reduction="none"),
        *(ValueError, "`reduction`.*mean, sum"),
    ),
    "loss_backend": (
        lambda: linear_cross_entropy(X, X, IDS, backend="x"),
        *(ValueError, "`backend`"),
    ),
    "window_left": (lambda: Window(-1, 0), ValueError, "Window: `left`.*-1"),
    "window_right": (lambda: Window(0, 1.5), ValueError, "Window: `right`.*1.5"),  # type: ignore[arg-type]
    "lengths_list": (lambda: KeyLengths([1, 2]), TypeError, "KeyLengths: `lengths`.*list"),  # type: ignore[arg-type]
    "lengths_float": (lambda: KeyLengths(W), TypeError, "KeyLengths: `lengths`.*float32"),
    "lengths_2d": (lambda: QueryLengths(X.int()), ValueError, r"QueryLengths: `lengths`.*\(B,\)"),
    "ids_1d": (lambda: Documents(W.int()), ValueError, r"Documents: `ids`.*\(B, L\)"),
    "key_ids": (lambda: Documents(X.int(), X), TypeError, "Documents: `key_ids`.*float32"),
    "dense_float": (lambda: Dense(X), TypeError, "Dense: `tensor`.*float32"),
    "dense_list": (lambda: Dense([[True]]), TypeError, "Dense: `tensor`.*list"),  # type: ignore[arg-type]
    "slopes_int": (lambda: ALiBi(W.int()), TypeError, "ALiBi: `slopes`.*int32"),
    "slopes_grad": (lambda: ALiBi(W.clone().requires_grad_()), ValueError, "`slopes`.*gradient"),
    "slopes_list": (lambda: ALiBi([1.0]), TypeError, "ALiBi: `slopes`.*list"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call,error,match", OTHERS.values(), ids=OTHERS.keys())
def test_the_others(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


ROW = torch.zeros(3, 8)
HEADS = torch.zeros(1, 2, 3, 8)
ALLOWED, LENGTHS = torch.ones(3, 3, dtype=torch.bool), torch.tensor([3])
SEQUENCES = torch.tensor([0, 3])
IN_ONE = HEADS[0].transpose(0, 1)
# function and argument -> how it is called, and with what before it is made special
DENSE: dict[str, tuple[Callable[[Any], Any], torch.Tensor]] = {
    "attention: `q`": (lambda t: attention(t, HEADS, HEADS), HEADS),
    "attention: `k`": (lambda t: attention(HEADS, t, HEADS), HEADS),
    "attention: `v`": (lambda t: attention(HEADS, HEADS, t, return_weights=True), HEADS),
    "attention: `bias`": (lambda t: attention(HEADS, HEADS, HEADS, bias=t), ALLOWED.float()),
    "attention: `sinks`": (lambda t: attention(HEADS, HEADS, HEADS, sinks=t), ROW[0, :2]),
    "attention_varlen: `v`": (
        lambda t: attention_varlen(IN_ONE, IN_ONE, t, SEQUENCES, SEQUENCES),
        IN_ONE,
    ),
    "attention_varlen: `cu_seqlens_k`": (
        lambda t: attention_varlen(IN_ONE, IN_ONE, IN_ONE, SEQUENCES, t),
        SEQUENCES,
    ),
    "Dense: `tensor`": (lambda t: attention(HEADS, HEADS, HEADS, t), ALLOWED),
    "KeyLengths: `lengths`": (lambda t: attention(HEADS, HEADS, HEADS, KeyLengths(t)), LENGTHS),
    "ALiBi: `slopes`": (lambda t: ALiBi(t), ROW[0, :2]),
    "masked_softmax: `scores`": (lambda t: masked_softmax(t), ROW),
    "layer_norm: `x`": (lambda t: layer_norm(t), ROW),
    "layer_norm: `weight`": (lambda t: layer_norm(ROW, t), ROW[0]),
    "layer_norm: `bias`": (lambda t: layer_norm(ROW, None, t), ROW[0]),
    "add_layer_norm: `x`": (lambda t: add_layer_norm(t, ROW), ROW),
    "add_layer_norm: `residual`": (lambda t: add_layer_norm(ROW, t), ROW),
    "linear_cross_entropy: `x`": (lambda t: linear_cross_entropy(t, ROW, IDS), ROW),
    "linear_cross_entropy: `weight`": (lambda t: linear_cross_entropy(ROW, t, IDS), ROW),
    "rms_norm: `x`": (lambda t: rms_norm(t), ROW),
    "rms_norm: `weight`": (lambda t: rms_norm(ROW, t), ROW[0]),
}
NESTED = "a nested tensor of layout torch."
SPECIAL: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse": (lambda t: t.to_sparse(), "a tensor of layout torch.sparse_coo"),
    "mkldnn": (lambda t: t.float().to_mkldnn(), "a tensor of layout torch._mkldnn"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t[:1]]), NESTED + "strided"),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged),
        NESTED + "jagged",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta)")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("named", DENSE)
def test_tensors_without_rows_in_memory(named: str, kind: str) -> None:
    if kind == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    (call, tensor), (made, got) = DENSE[named], SPECIAL[kind]
    special = made(tensor)
    for gradients in (True, False):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises(TypeError, match=f"^{named}: expected a dense tensor.*got {got}$"),
        ):
            call(special)


def test_a_seed_elsewhere() -> None:
    """A kernel on the CPU reads it there."""
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="attention: `seed`.*cpu.*meta"):
        attention(HEADS, HEADS, HEADS, dropout_p=0.5, seed=seed)
    with pytest.raises(ValueError, match="add_layer_norm: `seed`.*cpu.*meta"):
        add_layer_norm(ROW, ROW, dropout_p=0.5, seed=seed)


def test_misspelt_options_are_refused() -> None:
    for call in (attention, explain):
        with pytest.raises(TypeError, match="is_causal"):
            call(Q, K, V, is_causal=True)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["numba", "native", "triton"])
def test_a_device_that_a_backend_does_not_know(name: str) -> None:
    """A named backend refuses with its reason; it never crashes on memory that is not there."""
    reason = f"tensors on meta, not on {'c' if name == 'triton' else 'the CPU'}"
    q = META[:1, :1]
    problem = attention_problem(
        *(q, q, q, None, None, None, None, 0.0, None, None), draw_seed=False
    )
    if dispatch.unavailable(name) is None:
        with pytest.raises(RuntimeError, match=f"backend '{name}' can't do this: .*{reason}"):
            dispatch.choose(name, problem)
