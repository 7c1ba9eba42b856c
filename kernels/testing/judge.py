"""The assertion on a kernel: the rule of `tolerance.py` for every result of a case."""

from __future__ import annotations

from typing import get_args

import torch

from .cases import NamedCase
from .cross_entropy import CrossEntropyCase
from .oracle import AttentionCase, Kernel, PackedCase
from .rows import RowCase
from .tolerance import faults_of

AnyCase = NamedCase | AttentionCase | PackedCase | RowCase | CrossEntropyCase


def assert_as_accurate_as_naive(
    kernel: Kernel, case: AnyCase, *, device: torch.device | str | None = None
) -> None:
    """Assert that a kernel is as close to float64 as the naive path, outputs and gradients alike.

    For the largest error and the root mean square of all errors of each output and each gradient,

        error <= 2 * error(naive path in the same dtype) + rounding,

    where the rounding is one eps of the result and two eps of float32 (of float64 for float64
    inputs) of the sum's terms: see `rowmax.kernels.testing.tolerance`. The naive path is the
    unfused equation in PyTorch, its sums in float32 or wider; the oracle is the same in float64.
    Both run on the very inputs of the case, so that hard inputs allow more and easy ones less.

    Args:
        kernel: called with tensors that require gradients; it returns tensors that autograd can
            differentiate, in the dtype of the inputs (an lse in float32 or wider):
            attention: kernel(q, k, v, mask=..., bias=..., sinks=..., scale=..., softcap=...,
                dropout_p=..., seed=...) -> out (B, Hq, Lq, Dv), or out and lse (B, Hq, Lq), for
                q (B, Hq, Lq, D), k (B, Hkv, Lk, D) and v (B, Hkv, Lk, Dv);
            attention_varlen: kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, ...) -> out
                (total, Hq, Dv), or out and lse (Hq, total), for q (total, Hq, D), and so on;
            layer_norm, rms_norm: kernel(x, weight=..., bias=..., eps=...) -> y, like x
                (..., columns); add_layer_norm: kernel(x, residual, ...) -> y and x + residual;
            masked_softmax: kernel(scores, mask=..., scale=...) -> weights, like scores;
            linear_cross_entropy: kernel(x, weight, target, label_smoothing=..., ignore_index=...,
                reduction=...) -> loss () in float32 or wider, for x (T, N) and weight (V, N).
            Keywords that a case does not set are not passed. Dropout is that of `seed`, as in
            rowmax.kernels.
        case: one of `named_cases`, or an AttentionCase, PackedCase, RowCase or CrossEntropyCase of
            tensors of your own; float64, float32, bfloat16 or float16. Without gradients of the
            outputs in it, the forward pass alone is compared.
        device: where the kernel runs; the case's tensors stay where they are. None: there.

    Raises:
        AssertionError: a result is further off, has another shape or dtype, is missing, or holds
            NaN or infinity where float64 does not; the message names each.
        TypeError: `kernel` is not callable, or returns something else than tensors; `case` is
            none. Errors of the kernel itself pass through.
    """
    if not callable(kernel):
        raise TypeError(
            "assert_as_accurate_as_naive: `kernel`: expected a callable, got "
            f"{type(kernel).__name__}"
        )
    if not isinstance(case, get_args(AnyCase)):
        names = ", ".join(kind.__name__ for kind in get_args(AnyCase))
        raise TypeError(
            f"assert_as_accurate_as_naive: `case`: expected one of {names}, got "
            f"{type(case).__name__}"
        )
    test_case = case.case() if isinstance(case, NamedCase) else case
    results = test_case.run(kernel, device)
    if isinstance(test_case, AttentionCase | PackedCase) and "lse" not in results:
        test_case = test_case.without_lse()
    faults = faults_of(results, test_case.expected, test_case.sum_dtype)
    heading = f"{case}: " if isinstance(case, NamedCase) else ""
    if faults:
        raise AssertionError(heading + "; ".join(faults))
