"""nn.MultiheadAttention on the fused kernels, with all of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...api.attention import attention
from ...api.masks import Causal, Mask
from ...api.varlen import attention_varlen
from ...ops.torch_internals import tracing_state
from ...ops.tracing import untraced
from ..packing import Packing
from ..tensor_masks import Sizes, mask_of_forbidden
from .instances import Form, Swapped, has_own


class SwappedMultihead(Swapped, nn.MultiheadAttention):
    """What torch's computes, but zeros and not NaN for a query that may attend nothing.

    need_weights returns the weights before dropout. Projections are torch's; q, k and v are handed
    to the kernels as they come out of them, uncopied.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | Packing | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(key_padding_mask, Packing):
            own = Causal() if is_causal else None
            return self._packed(query, key_padding_mask, own), None
        restored = not isinstance(self, Form)
        if restored or any(tensor.is_nested for tensor in (query, key, value)):
            result: tuple[Tensor, Tensor | None] = nn.MultiheadAttention.forward(
                self,
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
            return result
        untraced(self._check, query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        k, v, appended = self._append_keys(k, v)
        mask, bias = _masks(
            (q.shape[0], self.num_heads, q.shape[1], k.shape[1]),
            key_padding_mask,
            attn_mask,
            is_causal,
            need_weights,
            appended,
        )
        dropout_p, backend = self.dropout if self.training else 0.0, self.rowmax_options.backend
        q, k, v = (self._heads(tensor) for tensor in (q, k, v))
        weights = None
        if need_weights:
            out, weights = attention(
                *(q, k, v, mask, bias), dropout_p=dropout_p, backend=backend, return_weights=True
            )
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = attention(q, k, v, mask, bias, dropout_p=dropout_p, backend=backend)
        joined = self._out(out.transpose(1, 2).flatten(2))
        if not batched:
            return joined.squeeze(0), None if weights is None else weights.squeeze(0)
        return joined if self.batch_first else joined.transpose(0, 1), weights

    def _packed(self, tokens: Tensor, packing: Packing, mask: Mask | None) -> Tensor:
        """Self-attention of packed tokens (total, E)."""
        total = tokens.shape[0]
        q, k, v = (
            tensor.view(total, self.num_heads, self.head_dim)
            for tensor in self._project(*(tokens,) * 3)
        )
        out = attention_varlen(
            *(q, k, v, packing.cu_seqlens, packing.cu_seqlens),
            mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.rowmax_options.backend,
            max_seqlen_q=packing.length,
            max_seqlen_k=packing.length,
        )
        return self._out(out.flatten(1))

    def _out(self, joined: Tensor) -> Tensor:
        return F.linear(joined, self.out_proj.weight, self.out_proj.bias)

    def _heads(self, tensor: Tensor) -> Tensor:
        """(B, L, E) seen as (B, H, L, E / H)."""
        return tensor.view(*tensor.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., E); inputs that are one and the same are multiplied once."""
        size, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                F.linear(tensor, weight, own)
                for tensor, weight, own in zip((query, key, value), weights, biases, strict=True)
            )
            return q, k, v
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            return q, k, v
        weight = self.in_proj_weight
        own_bias = None if bias is None else bias[:size]
        q = F.linear(query, weight[:size], own_bias)
        if key is value:
            k, v = F.linear(key, weight[size:], None if bias is None else bias[size:]).chunk(2, -1)
            return q, k, v
        parts = (slice(size, 2 * size), slice(2 * size, None))
        k, v = (
            F.linear(tensor, weight[part], None if bias is None else bias[part])
            for tensor, part in zip((key, value), parts, strict=True)
        )
        return q, k, v

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v (B, L, E) with the learned key, then the zero key, and how many these are."""
        rows = (k.shape[0], 1, k.shape[2])
        more_k, more_v = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            more_k.append(self.bias_k.to(k.dtype).expand(rows))
            more_v.append(self.bias_v.to(v.dtype).expand(rows))
        if self.add_zero_attn:
            more_k.append(k.new_zeros(rows))
            more_v.append(v.new_zeros(rows))
        appended = len(more_k) - 1
        if appended == 0:
            return k, v, 0
        return torch.cat(more_k, 1), torch.cat(more_v, 1), appended

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Shapes and types, before any work."""
        dims = query.dim()
        if dims not in (2, 3) or not dims == key.dim() == value.dim():
            raise ValueError(
                "MultiheadAttention: `query`, `key`, `value`: expected all of 3 dimensions, or all "
                f"of 2 (unbatched), got {dims}, {key.dim()} and {value.dim()}"
            )
        if query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"MultiheadAttention: `query`: expected {self.embed_dim} features (embed_dim), got "
                f"{query.shape[-1]}"
            )
        at = 0 if dims == 2 else 1 if self.batch_first else 0
        batch = 1 if dims == 2 else query.shape[1 - at]
        query_len, key_len = query.shape[at], key.shape[at]
        expected: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
            "key_padding_mask": (
                key_padding_mask,
                ((key_len,),) if dims == 2 else ((batch, key_len),),
            ),
            "attn_mask": (
                attn_mask,
                ((query_len, key_len), (batch * self.num_heads, query_len, key_len)),
            ),
        }
        for name, (mask, shapes) in expected.items():
            if mask is None:
                continue
            if tuple(mask.shape) not in shapes:
                raise ValueError(
                    f"MultiheadAttention: `{name}`: expected shape "
                    f"{' or '.join(map(str, shapes))}, got {tuple(mask.shape)}"
                )
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(
                    f"MultiheadAttention: `{name}`: expected a bool or float mask, got {mask.dtype}"
                )
        if is_causal and attn_mask is None:
            raise ValueError(
                "MultiheadAttention: `is_causal`: it is a hint about `attn_mask`, so expected "
                "`attn_mask` too, got None"
            )


def recognise(module: nn.Module) -> tuple[type[Swapped] | None, str] | None:
    """The form for an nn.MultiheadAttention, or None and why not; None for other modules."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    own = has_own(module, nn.MultiheadAttention, "forward")
    return (None, own) if own else (SwappedMultihead, "attention")


def packs(module: nn.Module) -> bool:
    """Whether self-attention over packed tokens is possible: keys of its own belong to no token."""
    return (
        isinstance(module, SwappedMultihead)
        and has_own(module, SwappedMultihead, "forward") is None
        and module.bias_k is None
        and not module.add_zero_attn
        and module._qkv_same_embed_dim
    )


def _masks(
    sizes: Sizes,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    appended: int,
) -> tuple[Mask | None, Tensor | None]:
    """mask and bias of `attention`, from torch's masks, in which True forbids.

    As torch does, the hint `is_causal` replaces the mask where there is no other and no weights are
    asked for.
    """
    is_traced = tracing_state() is not None  # the graph will be given other masks
    if is_causal and key_padding_mask is None and not (need_weights or is_traced):
        return Causal(align="upper_left"), None
    mask: Mask | None = None
    bias: Tensor | None = None
    for given, padding in ((key_padding_mask, True), (attn_mask, False)):
        if given is None:
            continue
        if appended:
            given = F.pad(given, (0, appended))
        batch, heads, query_len, _ = sizes
        rows = (batch, 1, 1) if padding else (1, 1, query_len)
        if given.dim() == 3:
            rows = (batch, heads, query_len)
        part = mask_of_forbidden(given.view(*rows, given.shape[-1]), sizes)
        if isinstance(part, Tensor):
            bias = part if bias is None else bias + part
        elif part is not None:
            mask = part if mask is None else mask & part
    return mask, bias
