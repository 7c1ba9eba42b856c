"""torch's Transformer layers, with residual, dropout and norm as one call, and its encoder, packed.

The layers' own forward takes, in inference, one C++ function for the whole layer that never calls
the attention or the norms in it; a swapped layer does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...api.masks import Causal
from ...api.norms import add_layer_norm
from ...ops.torch_internals import tracing_state
from ...ops.tracing import is_recorded, same_sizes
from ..packing import Packing, may_count
from ..tensor_masks import mask_of_forbidden
from .instances import Form, Swapped, as_torch_does, has_own, is_plain_call
from .multihead import SwappedMultihead, packs
from .norms import SwappedLayerNorm, fits

_BLOCKS = ("_sa_block", "_ff_block")


class SwappedEncoderLayer(Swapped, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer; what it calls is the swapped attention and norms."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | Packing | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        stock = nn.TransformerEncoderLayer
        if not isinstance(src_key_padding_mask, Packing):
            # nested: of an encoder that was left as it was
            if src.is_nested or not _is_ours(self, stock, *_BLOCKS):
                return stock.forward(self, src, src_mask, src_key_padding_mask, is_causal)
            if not is_plain_call(self.self_attn, SwappedMultihead):
                src_mask, src_key_padding_mask = _as_torch_hands_on(
                    src, src_mask, src_key_padding_mask
                )
        attended = self.self_attn(
            *(self.norm1(src) if self.norm_first else src,) * 3,
            attn_mask=src_mask,
            key_padding_mask=src_key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )[0]
        if self.norm_first:
            y, total = add_and_norm(attended, src, self.dropout1, self.norm2)
            return total + self._ff_block(y)
        x, _ = add_and_norm(attended, src, self.dropout1, self.norm1)
        return add_and_norm(_feed_forward(self, x), x, self.dropout2, self.norm2)[0]


class SwappedDecoderLayer(Swapped, nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer; what it calls is the swapped attention and norms."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        stock = nn.TransformerDecoderLayer
        if not _is_ours(self, stock, *_BLOCKS, "_mha_block"):
            return stock.forward(
                *(self, tgt, memory, tgt_mask, memory_mask),
                *(tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal),
            )
        first = self.norm1(tgt) if self.norm_first else tgt
        attended = self.self_attn(
            *(first, first, first),
            attn_mask=tgt_mask,
            key_padding_mask=tgt_key_padding_mask,
            is_causal=tgt_is_causal,
            need_weights=False,
        )[0]
        norm = self.norm2 if self.norm_first else self.norm1
        x, total = add_and_norm(attended, tgt, self.dropout1, norm)
        crossed = self.multihead_attn(
            *(x, memory, memory),
            attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask,
            is_causal=memory_is_causal,
            need_weights=False,
        )[0]
        if self.norm_first:
            x, total = add_and_norm(crossed, total, self.dropout2, self.norm3)
            return total + self._ff_block(x)
        x, _ = add_and_norm(crossed, x, self.dropout2, self.norm2)
        return add_and_norm(_feed_forward(self, x), x, self.dropout3, self.norm3)[0]


class SwappedEncoder(Swapped, nn.TransformerEncoder):
    """nn.TransformerEncoder without its nested tensors, which swapped layers don't take.

    With `pack` a batch with a padding mask goes through the layers as its real tokens alone; zeros
    stand where padding was. A hook on a layer then sees (total, E). Calls with a mask other than a
    causal one have no packed form and run padded. In inference, where torch itself would nest
    the batch, it is packed without being asked, with the same zeros.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        stock = nn.TransformerEncoder
        if src.is_nested or not isinstance(self, Form) or any(map(_why_not_ours, self.layers)):
            # layers of somebody's own get what torch hands to them
            return stock.forward(self, src, mask, src_key_padding_mask, is_causal)
        packing = blank = None
        if src_key_padding_mask is not None and src.dim() == 3:
            if is_recorded():
                blank = self._blank(src_key_padding_mask, mask)
            elif self.rowmax_options.pack or (mask is None and self._would_nest()):
                packing = self._packing(src_key_padding_mask, mask)
            if packing is not None and not (self.rowmax_options.pack or packing.is_right_padded()):
                packing = None
        if packing is None:
            output = src
            for layer in self.layers:
                output = layer(
                    output,
                    src_mask=mask,
                    is_causal=bool(is_causal),
                    src_key_padding_mask=src_key_padding_mask,
                )
            if blank is not None:
                output = output.masked_fill(blank, 0.0)
        else:
            batch_first = self.layers[0].self_attn.batch_first
            output = packing.pack(src if batch_first else src.transpose(0, 1))
            for layer in self.layers:
                output = layer(output, is_causal=mask is not None, src_key_padding_mask=packing)
            output = packing.unpack(output)
            output = output if batch_first else output.transpose(0, 1)
        return output if self.norm is None else self.norm(output)

    def _would_nest(self) -> bool:
        """Whether torch itself would leave out the padding, in inference, by nested tensors."""
        wants_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if tracing_state() is not None:
            wants_gradient = False  # torch.jit.trace records once, and checks without gradients
        return (
            self.use_nested_tensor
            and torch.backends.mha.get_fastpath_enabled()
            and not (self.layers[0].training or wants_gradient)
            and not torch.is_autocast_enabled()
        )

    def _packing(self, padding_mask: Tensor, mask: Tensor | None) -> Packing | None:
        """Which tokens are real; None where this call has no packed form."""
        if not may_count(padding_mask) or why_not_packed(self) is not None:
            return None
        if mask is not None and not _is_causal(mask):
            return None
        if padding_mask.dtype == torch.bool:
            return Packing.of(~padding_mask)
        real = padding_mask == 0
        return Packing.of(real) if bool((real | (padding_mask == -torch.inf)).all()) else None

    def _blank(self, padding_mask: Tensor, mask: Tensor | None) -> Tensor | None:
        """Where a recorded graph puts the zeros that a packed call has for padding: (B, L, 1).

        The graph will be given other masks, so what a call by itself finds out about the masks at
        hand is here computed by the graph.
        """
        pack = self.rowmax_options.pack
        if padding_mask.dim() != 2 or why_not_packed(self) is not None:
            return None
        if not pack and (mask is not None or not self._would_nest()):
            return None
        real = ~padding_mask if padding_mask.dtype == torch.bool else padding_mask == 0
        blank = ~real
        if padding_mask.dtype != torch.bool:
            blank = blank & (real | (padding_mask == -torch.inf)).all()
        if not pack:  # torch nests what is padded at the end alone
            blank = blank & ~(real[:, 1:] & ~real[:, :-1]).any()
        if mask is not None:
            if mask.dim() != 2:
                return None
            forbids = 1.0 if mask.dtype == torch.bool else -torch.inf
            blank = blank & (mask == torch.full_like(mask, forbids).triu(1)).all()
        blank = blank if self.layers[0].self_attn.batch_first else blank.transpose(0, 1)
        return blank.unsqueeze(-1)


def add_and_norm(
    x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """norm(residual + dropout(x)) and the sum: one call where nothing watches the modules."""
    if (
        isinstance(norm, SwappedLayerNorm)
        and isinstance(dropout, nn.Dropout)
        and is_plain_call(norm, SwappedLayerNorm)
        and is_plain_call(dropout, nn.Dropout)
        and not as_torch_does(x, residual)
        and len(norm.normalized_shape) == 1
        and x.dtype == residual.dtype
        and same_sizes(x.shape, residual.shape)
    ):
        weight, bias = norm.weight, norm.bias
        if fits(x, norm.normalized_shape, weight, bias):
            return add_layer_norm(
                *(x, residual, weight, bias, norm.eps),
                dropout_p=dropout.p if dropout.training else 0.0,
                backend=norm.rowmax_options.backend,
            )
    total = residual + dropout(x)
    return norm(total), total


def _as_torch_hands_on(
    src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The masks as torch's layer hands them to its attention, floats: for one that is not ours."""
    padding: Tensor | None = F._canonical_mask(
        mask=src_key_padding_mask,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(src_mask),
        other_name="src_mask",
        target_type=src.dtype,
    )
    pairs: Tensor | None = F._canonical_mask(
        mask=src_mask,
        mask_name="src_mask",
        other_type=None,
        other_name="",
        target_type=src.dtype,
        check_other=False,
    )
    return pairs, padding


def _feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The feed-forward block before its last dropout."""
    hidden: Tensor = layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))  # type: ignore[operator]
    return hidden


def _is_causal(mask: Tensor) -> bool:
    if mask.dim() != 2:
        return False
    found = mask_of_forbidden(mask.view(1, 1, *mask.shape), (1, 1, *mask.shape))
    return isinstance(found, Causal) and isinstance(found.align, int) and found.align == 0


def why_not_packed(encoder: nn.TransformerEncoder) -> str | None:
    """Why the layers can't take packed tokens; None when they can."""
    for index, layer in enumerate(encoder.layers):
        why = _why_not_ours(layer)
        if why is not None:
            return f"layer {index} is not swapped: {why}"
        if not packs(layer.self_attn):
            return f"the attention of layer {index} is not swapped, or has keys of its own"
    return None


def _is_ours(layer: nn.Module, stock: type[nn.Module], *blocks: str) -> bool:
    """Whether `layer` is still swapped, and nobody has set a block of their own since."""
    return isinstance(layer, Form) and has_own(layer, stock, *blocks) is None


def _why_not_ours(layer: nn.Module) -> str | None:
    """Why a layer does not run the form's forward; None where it does."""
    if not isinstance(layer, SwappedEncoderLayer):
        return f"it is a {type(layer).__name__}"
    return has_own(layer, SwappedEncoderLayer, "forward", *_BLOCKS)


def recognise(module: nn.Module) -> tuple[type[Swapped] | None, str] | None:
    """The form for one of torch's layers, or None and why not; None for other modules."""
    if isinstance(module, nn.TransformerEncoderLayer):
        own = has_own(module, nn.TransformerEncoderLayer, "forward", *_BLOCKS)
        return (None, own) if own else (SwappedEncoderLayer, "residual, dropout and norm in one")
    if isinstance(module, nn.TransformerDecoderLayer):
        own = has_own(module, nn.TransformerDecoderLayer, "forward", *_BLOCKS, "_mha_block")
        return (None, own) if own else (SwappedDecoderLayer, "residual, dropout and norm in one")
    if isinstance(module, nn.TransformerEncoder):
        own = has_own(module, nn.TransformerEncoder, "forward")
        return (None, own) if own else (SwappedEncoder, "no nested tensors")
    return None
