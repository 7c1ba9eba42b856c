"""Every `F.scaled_dot_product_attention` of the process, on the CPU, by torch's own registry.

torch lets an implementation take the place of its flash-attention kernels
(`torch.nn.attention.register_flash_attention_impl`). Registered here are the CPU's two operators,
forward and backward; the dispatcher keeps the ones they cover and has them back afterwards.
"""

from __future__ import annotations

import warnings
from types import TracebackType

import torch
from torch import Tensor

from ..api.attention import attention_problem
from ..api.masks import Causal, Mask
from ..backends import dispatch
from ..ops.problem import AttentionProblem, BackwardInputs
from .tensor_masks import mask_of_forbidden

NAME = "rowmax"

NOT_REACHED = (
    (
        "calls with dropout_p > 0, with a mask that wants a gradient, or with Ev != E: torch takes "
        "its unfused path before it asks for a kernel"
    ),
    "nn.MultiheadAttention with need_weights=True, which multiplies by itself",
    "the inference fast path of nn.TransformerEncoderLayer and nn.MultiheadAttention, one C++ call",
    "calls inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and tensors not on the CPU",
)


class SdpaRoute:
    """The route that `attention_as_sdpa` opened: close it by `restore()`, or use it in `with`."""

    not_reached = NOT_REACHED

    def __init__(self, before: str | None) -> None:
        self._before = before
        self._open = True

    def restore(self) -> None:
        """torch's own kernels again, or those of the implementation that was active before."""
        from torch.nn.attention import (
            activate_flash_attention_impl,
            current_flash_attention_impl,
            restore_flash_attention_impl,
        )

        if not self._open:
            return
        self._open = False
        if current_flash_attention_impl() != NAME:
            return  # someone has restored or replaced it since
        restore_flash_attention_impl()
        if self._before is not None:
            activate_flash_attention_impl(self._before)

    def __enter__(self) -> SdpaRoute:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return (
            "\n".join([f"<SdpaRoute, {state}; not reached:", *(f"  {x}" for x in NOT_REACHED)])
            + ">"
        )


def attention_as_sdpa() -> SdpaRoute:
    """Make every fused `F.scaled_dot_product_attention` on the CPU run rowmax's kernels.

    For the whole process, until the result's `restore()`, or for a block:
    `with attention_as_sdpa():`. Importing rowmax opens nothing. `not_reached` of the result lists
    the calls that torch never hands to a registered kernel; `swap` reaches them in a model's
    modules.

    Raises:
        RuntimeError: this torch has no registry for such implementations, or the route is open.
    """
    try:
        from torch.nn.attention import (
            activate_flash_attention_impl,
            current_flash_attention_impl,
            register_flash_attention_impl,
        )
    except ImportError as error:
        raise RuntimeError(
            f"attention_as_sdpa: torch {torch.__version__} has no "
            "torch.nn.attention.register_flash_attention_impl; expected a torch that has it. "
            "rowmax.kernels.swap and rowmax.kernels.scaled_dot_product_attention need no registry"
        ) from error
    before = current_flash_attention_impl()
    if before == NAME:
        raise RuntimeError("attention_as_sdpa: it is open already; restore that one first")
    register_flash_attention_impl(NAME, register_fn=_Kernels)
    activate_flash_attention_impl(NAME)
    return SdpaRoute(before)


class _Kernels:
    """The registered operators; `remove` takes them back."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # torch warns that a kernel is overridden, which is what was asked for
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name, function in (
                ("_scaled_dot_product_flash_attention_for_cpu", _forward),
                ("_scaled_dot_product_flash_attention_for_cpu_backward", _backward),
            ):
                self._library.impl(name, function, "CPU")

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
        self._library = None


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> AttentionProblem:
    mask: Mask | None = Causal(align="upper_left") if is_causal else None
    bias = None
    if attn_mask is not None:
        leading = (1,) * (4 - attn_mask.dim())
        batch, heads, query_len, _ = query.shape
        found = mask_of_forbidden(
            attn_mask.view(*leading, *attn_mask.shape), (batch, heads, query_len, key.shape[2])
        )
        if isinstance(found, Tensor):
            bias = found
        else:
            mask = found
    return attention_problem(
        *(query, key, value, mask, bias, scale, None, dropout_p, None, None), draw_seed=False
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, H, L, E), log-sum-exp (B, H, L); torch takes this path without dropout alone."""
    problem = _problem(query, key, value, dropout_p, is_causal, attn_mask, scale)
    out, lse = dispatch.choose("auto", problem).attention(problem)
    wide = torch.promote_types(query.dtype, torch.float32)
    # in the layout that torch's description of the operator promises to compiled graphs
    return out, lse.to(wide).transpose(1, 2).contiguous().transpose(1, 2)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(query, key, value, dropout_p, is_causal, attn_mask, scale)
    gradients = dispatch.choose("auto", problem).attention_backward(
        problem, BackwardInputs(grad_out, None, out, logsumexp)
    )[:3]
    d_query, d_key, d_value = (
        gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in gradients
    )
    return d_query, d_key, d_value
