"""Immutable problem descriptions: what a public call asks for, checked and in canonical form.

The functions of `api` build one, `operators.py` passes its fields through torch's dispatcher one by
one, and `backends` read it again on the other side. Schemas, fakes, checks and the C++ backend's
parameters follow from the fields written here, and from those of `MaskStructure` (spec.py).
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from torch import Tensor

from ..api.masks import NO_MASK, MaskStructure
from .spec import TensorSpec

_SEED = TensorSpec("", "int64")
_ROWS = TensorSpec("... N", grad=True)
_NO_TENSORS = frozenset((type(None), int, float, MaskStructure))
_PARAMETER = TensorSpec("N", "float", grad=True)


class AttentionProblem(NamedTuple):
    """softmax(softcap(scale * q @ k^T) + bias, masked, with sinks) -> dropout -> @ v.

    query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv); bias 4-D with each dimension
    full or 1; alibi_slopes (B | 1, Hq) with alibi_offset (B | 1,) int64; sinks (Hq,); seed a 0-d
    int64 tensor, present when dropout_p > 0. Dropout counts batch elements from `batch_start`.

    Packed: with query_starts and key_starts (n + 1,) int64, query (1, Hq, total_q, D), key and
    value hold n sequences one after another, each a batch element to masks, ALiBi and dropout.
    Their masks speak of positions only, and there is no bias tensor; longest_query and
    longest_key are the largest lengths.
    """

    query: Annotated[Tensor, TensorSpec("Bm Hq Lq D", grad=True)]
    key: Annotated[Tensor, TensorSpec("Bm Hkv Lk D", grad=True)]
    value: Annotated[Tensor, TensorSpec("Bm Hkv Lk Dv", grad=True)]
    bias: Annotated[Tensor | None, TensorSpec("B|1 Hq|1 Lq|1 Lk|1", "float", grad=True)]
    alibi_slopes: Annotated[Tensor | None, TensorSpec("B|1 Hq", "float")]
    alibi_offset: Annotated[Tensor | None, TensorSpec("B|1", "int64")]
    sinks: Annotated[Tensor | None, TensorSpec("Hq", "float", grad=True)]
    mask: MaskStructure
    scale: float
    softcap: float | None
    dropout_p: float
    seed: Annotated[Tensor | None, _SEED]
    batch_start: int = 0
    query_starts: Annotated[Tensor | None, TensorSpec("S", "int64")] = None
    key_starts: Annotated[Tensor | None, TensorSpec("S", "int64")] = None
    longest_query: int = 0
    longest_key: int = 0

    @property
    def op_name(self) -> str:
        return "attention"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Lk); packed, (n, Hq, longest_query, longest_key)."""
        batch, heads, query_len, _ = self.query.shape
        if self.query_starts is not None:
            return self.query_starts.shape[0] - 1, heads, self.longest_query, self.longest_key
        return batch, heads, query_len, self.key.shape[2]

    def has_heads_only(self) -> bool:
        """Whether query, key and value are all its tensors."""
        mask = self.mask
        return _NO_TENSORS.issuperset(map(type, self[3:])) and (
            mask is NO_MASK or _NO_TENSORS.issuperset(map(type, mask))
        )

    def flat(self) -> tuple[Any, ...]:
        """The fields in the order of the operator's schema, those of the mask among them."""
        return (*self[:_MASK_AT], *self.mask, *self[_MASK_AT + 1 :])

    @classmethod
    def from_flat(cls, fields: tuple[Any, ...]) -> AttentionProblem:
        mask = MaskStructure(*fields[_MASK_AT:_MASK_END])
        return cls._make((*fields[:_MASK_AT], mask, *fields[_MASK_END:]))


_MASK_AT = AttentionProblem._fields.index("mask")
_MASK_END = _MASK_AT + len(MaskStructure._fields)


class BackwardInputs(NamedTuple):
    """What the backward pass of attention gets besides the problem."""

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor
    bias_grad: bool = False  # whether this gradient is wanted
    sinks_grad: bool = False

    def of_rows(self, rows: slice) -> BackwardInputs:
        """Those of some queries (B, Hq, rows, ...)."""
        cut: dict[str, Any] = {"grad_out": self.grad_out, "out": self.out, "lse": self.lse}
        if self.grad_lse is not None:
            cut["grad_lse"] = self.grad_lse
        return self._replace(**{name: tensor[:, :, rows] for name, tensor in cut.items()})


class AddNormInputs(NamedTuple):
    """The same of add and layer norm."""

    grad_y: Tensor
    grad_total: Tensor | None
    total: Tensor
    mean: Tensor
    rstd: Tensor


class SoftmaxProblem(NamedTuple):
    """softmax over the last dimension of scale * scores (B, H, Lq, Lk), masked."""

    scores: Annotated[Tensor, TensorSpec("B Hq Lq Lk", grad=True)]
    mask: MaskStructure
    scale: float

    @property
    def op_name(self) -> str:
        return "masked_softmax"

    def flat(self) -> tuple[Any, ...]:
        return (self.scores, *self.mask, self.scale)

    @classmethod
    def from_flat(cls, fields: tuple[Any, ...]) -> SoftmaxProblem:
        return cls(fields[0], MaskStructure(*fields[1:-1]), fields[-1])


class LayerNormProblem(NamedTuple):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension of x (..., N)."""

    x: Annotated[Tensor, _ROWS]
    weight: Annotated[Tensor | None, _PARAMETER]
    bias: Annotated[Tensor | None, _PARAMETER]
    eps: float

    @property
    def op_name(self) -> str:
        return "layer_norm"


class AddLayerNormProblem(NamedTuple):
    """Layer norm of residual + dropout(x), both (..., N), keeping the sum."""

    x: Annotated[Tensor, _ROWS]
    residual: Annotated[Tensor, _ROWS]
    weight: Annotated[Tensor | None, _PARAMETER]
    bias: Annotated[Tensor | None, _PARAMETER]
    eps: float
    dropout_p: float
    seed: Annotated[Tensor | None, _SEED]

    @property
    def op_name(self) -> str:
        return "add_layer_norm"


class RMSNormProblem(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (..., N)."""

    x: Annotated[Tensor, _ROWS]
    weight: Annotated[Tensor | None, _PARAMETER]
    eps: float

    @property
    def op_name(self) -> str:
        return "rms_norm"


class LinearCrossEntropyProblem(NamedTuple):
    """The cross entropy of the logits x @ weight^T, x (T, N), weight (V, N), with targets (T,).

    Over the tokens whose target is not `ignore_index`: the mean, else the sum. With x_grad and
    weight_grad the gradients are found with the loss.
    """

    x: Annotated[Tensor, TensorSpec("T N", grad=True)]
    weight: Annotated[Tensor, TensorSpec("V N", grad=True)]
    target: Annotated[Tensor, TensorSpec("T", "int64")]
    label_smoothing: float
    ignore_index: int
    mean: bool
    x_grad: bool
    weight_grad: bool

    @property
    def op_name(self) -> str:
        return "linear_cross_entropy"


Problem = (
    AttentionProblem
    | SoftmaxProblem
    | LayerNormProblem
    | AddLayerNormProblem
    | RMSNormProblem
    | LinearCrossEntropyProblem
)
