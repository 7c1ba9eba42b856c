"""The table of attention cases: masks x shapes x options, each small, each with a name.

A case says what is special about it; `build` makes its tensors in a dtype and on a device.
`CASES` is the whole table, which every backend runs in every dtype, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rowmax.kernels import ALiBi, Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window
from rowmax.kernels.testing.cases import Draw as Tensors
from rowmax.kernels.testing.cases import Kind, attention_case, seed_of
from rowmax.kernels.testing.cases import Shape as Shape
from rowmax.kernels.testing.oracle import AttentionCase, mask_on

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape = field(default_factory=Shape)
    mask: Callable[[Shape, torch.Generator], Mask | Tensor] | None = None
    bias: Callable[[Shape, Draw], Tensor | ALiBi] | None = None
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "plain"
    factor: float = 1.0  # q is multiplied by it: large scores

    def build(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> AttentionCase:
        mask, bias = self.mask, self.bias
        kind = Kind(
            None if mask is None else lambda shape, draw: mask(shape, draw.generator),
            None if bias is None else lambda shape, draw: bias(shape, draw.normal),
            self.sinks,
            self.options,
        )
        case = attention_case(kind, self.shape, Tensors(seed_of(self.name), dtype, device))
        q, k, v = (
            lay_out(tensor, self.layout) for tensor in (case.q * self.factor, case.k, case.v)
        )
        return replace(case, q=q, k=k, v=v, mask=mask_on(device, case.mask))


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of `tensor` (for "expanded": of its first heads) with other strides."""
    if layout == "plain":
        return tensor
    if layout == "heads_last":  # (B, L, H, D) in memory, as a projection leaves it
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":  # last stride 2
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "transposed":  # (B, H, D, L) in memory, as a key cache may be
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":  # a part of one wide projection for q, k and v
        return torch.cat((tensor, tensor, tensor), dim=-1)[..., : tensor.shape[-1]]
    if layout == "expanded":  # one head for all, stride 0
        return tensor[:, :1].expand(tensor.shape)
    raise ValueError(layout)


# --- masks as functions of the shape --------------------------------------------------------------


def always(mask: Mask) -> Callable[[Shape, torch.Generator], Mask]:
    return lambda shape, generator: mask


def random_dense(*full: bool) -> Callable[[Shape, torch.Generator], Tensor]:
    """A random bool tensor, full in the dimensions named; three of four positions allowed."""

    def make(shape: Shape, generator: torch.Generator) -> Tensor:
        size = [n if is_full else 1 for n, is_full in zip(shape.scores, full, strict=True)]
        return torch.rand(size, generator=generator) < 0.75

    return make


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


def packed_ids(shape: Shape, generator: torch.Generator, length: int) -> Tensor:
    return torch.randint(3, (shape.B, length), generator=generator).sort(dim=1).values


def documents(shape: Shape, generator: torch.Generator) -> Mask:
    if shape.Lq == shape.Lk:
        return Documents(packed_ids(shape, generator, shape.Lq))
    return Documents(packed_ids(shape, generator, shape.Lq), packed_ids(shape, generator, shape.Lk))


# --- biases ---------------------------------------------------------------------------------------


def random_bias(*full: bool) -> Callable[[Shape, Draw], Tensor]:
    def make(shape: Shape, draw: Draw) -> Tensor:
        return draw(*(n if is_full else 1 for n, is_full in zip(shape.scores, full, strict=True)))

    return make


def bias_with(
    value: float, positions: Callable[[Tensor], Tensor]
) -> Callable[[Shape, Draw], Tensor]:
    """A full random bias with `value` where `positions(j - i)` is true."""

    def make(shape: Shape, draw: Draw) -> Tensor:
        distance = torch.arange(shape.Lk) - torch.arange(shape.Lq).view(-1, 1)
        bias = draw(*shape.scores)
        return bias.masked_fill(positions(distance).to(bias.device), value)

    return make


def alibi(align: Any = None, per_batch: bool = False) -> Callable[[Shape, Draw], ALiBi]:
    def make(shape: Shape, draw: Draw) -> ALiBi:
        slopes = draw(shape.B, shape.Hq).abs() if per_batch else draw(shape.Hq).abs()
        return ALiBi(slopes, align)

    return make


# --- the table ------------------------------------------------------------------------------------

BROADCASTS = list(product((True, False), repeat=4))
SHORT, WIDE = Shape(Lq=9, Lk=21), Shape(Lq=21, Lk=9)
ALIGNMENTS: dict[str, Any] = {
    "upper_left": "upper_left",
    "lower_right": "lower_right",
    "0": 0,
    "5": 5,
    "-3": -3,
    "-100": -100,
    "100": 100,
    "tensor": lengths(4, -6),
    "tensor_int32": lengths(12, 0).to(torch.int32),
}


def _pattern(full: tuple[bool, ...]) -> str:
    return "".join(letter if is_full else "1" for letter, is_full in zip("BHQK", full, strict=True))


def _shapes() -> list[Case]:
    shapes = {
        "all_ones": Shape(1, 1, 1, 1, 1, 1, 1),
        "odd": Shape(3, 3, 3, 19, 19, 7, 7),
        "one_query": Shape(2, 4, 4, 1, 33, 64, 64),
        "one_key": Shape(2, 2, 2, 19, 1, 40, 40),
        "more_keys": Shape(2, 2, 2, 13, 70, 16, 16),
        "more_queries": Shape(2, 2, 2, 70, 13, 16, 16),
        "d1": Shape(2, 2, 2, 9, 13, 1, 1),
        "d7": Shape(2, 2, 2, 35, 35, 7, 7),
        "d40": Shape(1, 2, 2, 33, 33, 40, 40),
        "d64": Shape(1, 2, 2, 65, 65, 64, 64),
        "d128": Shape(1, 2, 2, 66, 130, 128, 128),
        "d256": Shape(1, 1, 1, 20, 70, 256, 256),
        "dv_less": Shape(2, 2, 2, 20, 23, 64, 24),
        "dv_more": Shape(2, 2, 2, 20, 23, 16, 72),
        "dv_one": Shape(2, 2, 2, 20, 23, 8, 1),
        "gqa": Shape(2, 6, 2, 20, 37, 16, 16),
        "mqa": Shape(2, 5, 1, 20, 37, 16, 16),
        "long": Shape(1, 1, 1, 300, 277, 16, 16),
        "no_batch": Shape(B=0),
        "no_heads": Shape(Hq=0, Hkv=0),
        "no_query_heads": Shape(Hq=0, Hkv=2),
        "no_queries": Shape(Lq=0, Lk=5),
        "no_keys": Shape(Lq=5, Lk=0),
        "nothing": Shape(0, 0, 0, 0, 0, 0, 0),
        "d0": Shape(D=0, Dv=8),
        "dv0": Shape(D=8, Dv=0),
    }
    cases = [Case(f"shape_{name}", shape) for name, shape in shapes.items()]
    for length in (15, 16, 31, 32, 33, 63, 64, 127, 128, 129):  # around every likely tile edge
        edge = Shape(1, 1, 1, length, length, 8, 8)
        cases.append(Case(f"edge_{length}", edge, always(Causal())))
    gqa = Shape(2, 4, 2, 18, 18, 8, 8)
    for layout in ("heads_last", "strided", "transposed", "sliced", "expanded"):
        cases.append(Case(f"layout_{layout}", gqa, always(Causal()), layout=layout))
    return cases


def _bands() -> list[Case]:
    cases = [Case("causal_square", mask=always(Causal()))]
    for (name, align), (relation, shape) in product(
        ALIGNMENTS.items(), (("short", SHORT), ("wide", WIDE))
    ):
        cases.append(Case(f"causal_{relation}_{name}", shape, always(Causal(align))))
    for left, right in ((0, 0), (3, 0), (0, 3), (4, 2), (None, 2), (2, None), (None, None)):
        name = f"window_{left}_{right}"
        cases.append(Case(name, mask=always(Window(left, right))))
        cases.append(Case(f"{name}_short", SHORT, always(Window(left, right, "lower_right"))))
        cases.append(Case(f"{name}_wide", WIDE, always(Window(left, right, lengths(-2, 7)))))
    for name, shape, mask in (
        ("square", Shape(), Causal(None, lengths(0, 9))),
        ("short", SHORT, Causal("upper_left", lengths(40, 3))),
        ("wide", WIDE, Causal(lengths(-3, 5), lengths(12, -2))),
        ("few_queries", Shape(2, 2, 1, 3, 300, 8, 8), Causal(-1, lengths(7, 290))),
        ("long", Shape(2, 1, 1, 150, 200, 8, 8), Causal(-20, lengths(130, 1))),
        ("window", Shape(), Causal(None, lengths(4, 11)) & Window(6, None)),
        ("window_apart", WIDE, Causal(-5, lengths(20, 9)) & Window(2, None, 4)),
        ("lengths", Shape(), Causal(None, lengths(12, 2)) & KeyLengths(lengths(9, 17))),
        ("alone", Shape(Lq=8, Lk=40), Causal("upper_left", lengths(7, 30)) & Window(0, None, 5)),
        ("extreme", Shape(), Causal(None, torch.tensor([-(2**63), 2**63 - 1]))),
    ):
        cases.append(Case(f"prefix_{name}", shape, always(mask)))
    narrow = Shape(1, 1, 1, 200, 200, 8, 8)
    cases.append(Case("window_narrow_long", narrow, always(Window(5, 0))))
    cases.append(Case("window_beyond", mask=always(Window(1000, 1000))))
    cases.append(Case("causal_long", narrow, always(Causal())))
    return cases


def _masks() -> list[Case]:
    cases = [Case(f"dense_{_pattern(full)}", mask=random_dense(*full)) for full in BROADCASTS]
    cases += [
        Case("dense_2d", mask=lambda s, g: torch.rand(s.Lq, s.Lk, generator=g) < 0.5),
        Case("dense_1d", mask=lambda s, g: Dense(torch.rand(s.Lk, generator=g) < 0.5)),
        Case("dense_0d", mask=lambda s, g: torch.tensor(True)),
        Case("dense_none", mask=lambda s, g: torch.zeros(s.Lq, s.Lk, dtype=torch.bool)),
        Case("dense_strided", mask=lambda s, g: torch.rand(s.Lk, s.Lq, generator=g).T < 0.5),
        Case(
            "dense_chunks",  # rows of whole chunks of 16, of which lengths cut off a part
            Shape(Lq=20, Lk=48),
            lambda s, g: (
                Causal(21) & KeyLengths(lengths(37, 5)) & Dense(random_dense(*[True] * 4)(s, g))
            ),
        ),
        Case("dense_sparse", mask=lambda s, g: torch.rand(s.scores, generator=g) < 0.05),
        Case("keys_zero_and_beyond", Shape(B=4), always(KeyLengths(lengths(0, 5, 17, 99)))),
        Case("keys_negative", mask=always(KeyLengths(lengths(-4, 1)))),
        Case("keys_int8", mask=always(KeyLengths(lengths(3, 16).to(torch.int8)))),
        Case("keys_no_keys", Shape(Lk=0, Lq=5), always(KeyLengths(lengths(0, 3)))),
        Case("keys_no_batch", Shape(B=0), always(KeyLengths(lengths().long()))),
        Case("queries", Shape(B=4), always(QueryLengths(lengths(0, 5, 17, 99)))),
        Case("queries_no_queries", Shape(Lq=0, Lk=5), always(QueryLengths(lengths(0, 3)))),
        Case("causal_no_keys", Shape(Lq=3, Lk=0), always(Causal("upper_left"))),
        Case("causal_no_queries", Shape(Lq=0, Lk=3), always(Causal("lower_right"))),
        Case("documents", mask=documents),
        Case("documents_cross", SHORT, documents),
    ]
    joined: dict[str, tuple[Shape, Callable[[Shape, torch.Generator], Mask]]] = {
        "causal_keys": (Shape(), lambda s, g: Causal() & KeyLengths(lengths(5, 17))),
        "causal_both_lengths": (
            SHORT,
            lambda s, g: (
                Causal("lower_right") & KeyLengths(lengths(20, 2)) & QueryLengths(lengths(9, 4))
            ),
        ),
        "window_keys_queries": (
            WIDE,
            lambda s, g: (
                Window(3, 1, 2) & KeyLengths(lengths(9, 4)) & QueryLengths(lengths(10, 21))
            ),
        ),
        "causal_dense": (
            Shape(),
            lambda s, g: Causal() & Dense(random_dense(True, True, True, True)(s, g)),
        ),
        "dense_dense": (
            Shape(),
            lambda s, g: (
                Dense(random_dense(True, False, True, False)(s, g))
                & Dense(random_dense(False, True, False, True)(s, g))
            ),
        ),
        "causal_window_aligned_apart": (
            SHORT,
            lambda s, g: Causal(6) & Window(4, None, lengths(0, 9)),
        ),
        "two_bands": (
            WIDE,
            lambda s, g: Causal(lengths(1, 2)) & Window(6, 3, lengths(3, -2)) & Causal(4),
        ),
        "keys_twice": (
            Shape(),
            lambda s, g: KeyLengths(lengths(3, 17)) & KeyLengths(lengths(9, 4)),
        ),
        "disjoint_bands": (Shape(), lambda s, g: Causal(-4) & Window(0, 2)),
    }
    cases += [Case(f"joined_{name}", shape, mask) for name, (shape, mask) in joined.items()]
    cases += [
        Case("joined_documents_causal", mask=lambda s, g: documents(s, g) & Causal()),
        Case("joined_documents_twice", SHORT, lambda s, g: documents(s, g) & documents(s, g)),
        Case(
            "joined_everything",
            mask=lambda s, g: (
                Causal(2)
                & Window(9, None)
                & KeyLengths(lengths(15, 12))
                & QueryLengths(lengths(16, 17))
                & documents(s, g)
                & Dense(random_dense(False, True, True, True)(s, g))
            ),
        ),
    ]
    return cases


def _biases() -> list[Case]:
    cases = [Case(f"bias_{_pattern(full)}", bias=random_bias(*full)) for full in BROADCASTS]
    causal = always(Causal())
    keys = always(KeyLengths(lengths(5, 17)))
    cases += [
        Case("bias_2d", bias=lambda s, draw: draw(s.Lq, s.Lk)),
        Case("bias_gqa", Shape(Hq=4, Hkv=2), causal, random_bias(False, True, True, True)),
        Case("bias_minus_inf", bias=bias_with(-torch.inf, lambda d: (d % 3 == 0) | (d > 5))),
        Case("bias_minus_inf_rows", bias=bias_with(-torch.inf, lambda d: d < 20)),
        Case("bias_nan_where_masked", mask=causal, bias=bias_with(torch.nan, lambda d: d > 0)),
        Case("bias_inf_where_masked", mask=causal, bias=bias_with(torch.inf, lambda d: d > 0)),
        Case("bias_and_lengths", mask=keys, bias=random_bias(True, False, True, True)),
        Case("bias_chunks", Shape(Lq=32, Lk=32), causal, bias_with(torch.nan, lambda d: d > 0)),
        Case("bias_chunks_shared", Shape(Lk=32), keys, random_bias(False, True, True, True)),
        Case("bias_strided", bias=lambda s, draw: draw(*s.scores, 2)[..., 1]),
        Case("bias_transposed", bias=lambda s, draw: draw(s.B, s.Hq, s.Lk, s.Lq).mT),
        Case("alibi", bias=alibi()),
        Case("alibi_per_batch_causal", mask=causal, bias=alibi(per_batch=True)),
        Case("alibi_lower_right", SHORT, bias=alibi("lower_right")),
        Case("alibi_tensor", WIDE, bias=alibi(lengths(3, -5))),
    ]
    return cases


def _options() -> list[Case]:
    causal, keys = always(Causal()), always(KeyLengths(lengths(0, 11)))
    gqa = Shape(2, 4, 2, 19, 30, 8, 12)
    return [
        Case("softcap", options={"softcap": 1.5}),
        Case(
            "softcap_masked_bias",
            mask=causal,
            bias=random_bias(False, True, True, True),
            options={"softcap": 0.7},
        ),
        Case("sinks", sinks=True),
        Case("sinks_masked_rows", mask=keys, sinks=True),
        Case("sinks_no_keys", Shape(Lk=0, Lq=5), sinks=True),
        Case("sinks_gqa", gqa, sinks=True),
        Case("dropout_little", options={"dropout_p": 0.1, "seed": 3}),
        Case("dropout_half", gqa, options={"dropout_p": 0.5, "seed": -1}),
        Case("dropout_most_causal", mask=causal, options={"dropout_p": 0.9, "seed": 2**62}),
        Case("dropout_all", options={"dropout_p": 1.0, "seed": 0}),
        Case(
            "dropout_bias_lengths",
            mask=keys,
            bias=random_bias(True, True, True, True),
            options={"dropout_p": 0.3, "seed": 5},
        ),
        Case(
            "dropout_wide_long",
            Shape(1, 2, 1, 70, 131, 8, 8),
            causal_lower_right,
            options={"dropout_p": 0.2, "seed": 1},
        ),
        Case("scale_zero", options={"scale": 0.0}),
        Case("scale_one", mask=causal, options={"scale": 1.0}),
        Case("scale_negative", options={"scale": -0.6}),
        # over whole blocks of keys; a shift that is not the largest score would overflow
        Case("scale_zero_long", Shape(1, 1, 1, 40, 70), options={"scale": 0.0}, factor=50.0),
        Case("scale_negative_long", Shape(1, 1, 1, 40, 70), options={"scale": -9.0}, factor=50.0),
        Case(
            "scale_negative_softcap_long",
            Shape(1, 1, 1, 40, 70),
            options={"scale": -9.0, "softcap": 1500.0},
            factor=50.0,
        ),
        Case("scores_large", factor=30.0),
        Case("scores_huge_causal", mask=causal, factor=1000.0),
        Case(
            "everything",
            gqa,
            lambda s, g: Causal("lower_right") & KeyLengths(lengths(29, 7)),
            random_bias(False, True, True, True),
            sinks=True,
            options={"softcap": 2.0, "dropout_p": 0.2, "seed": 9, "scale": 0.3},
            layout="heads_last",
        ),
    ]


def causal_lower_right(shape: Shape, generator: torch.Generator) -> Mask:
    return Causal("lower_right")


def _decoding() -> list[Case]:
    """Few queries over many keys: the key range may be divided, and merged again."""
    few = Shape(2, 4, 2, 3, 600, 24, 40)
    one = Shape(3, 6, 1, 1, 270, 16, 16)

    def ragged(s: Shape, g: torch.Generator) -> Mask:
        filled = torch.randint(s.Lq, s.Lk + 1, (s.B,), generator=g)
        return Causal(filled - s.Lq) & KeyLengths(filled)

    return [
        Case("decode", few),
        Case("decode_mqa", one),
        Case("decode_d64", Shape(1, 8, 2, 1, 513, 64, 64)),
        Case("decode_eight", Shape(1, 2, 2, 8, 300, 72, 8), causal_lower_right),
        Case("decode_long", Shape(1, 1, 1, 2, 2100, 8, 8)),
        Case("decode_ragged", few, ragged),
        Case("decode_window", few, always(Window(100, 0, "lower_right"))),
        Case("decode_nothing", few, always(KeyLengths(lengths(0, 599)))),
        Case("decode_queries", few, always(QueryLengths(lengths(0, 2)))),
        Case("decode_dense", few, random_dense(True, True, True, True)),
        Case("decode_dense_keys", few, random_dense(True, False, False, True)),
        Case("decode_dense_sparse", few, lambda s, g: torch.rand(s.scores, generator=g) < 0.005),
        Case("decode_documents", few, documents),
        Case("decode_bias", few, ragged, random_bias(True, True, True, True)),
        Case("decode_bias_queries", few, bias=random_bias(False, True, True, False)),
        Case("decode_bias_keys", one, bias=random_bias(True, False, False, True)),
        Case("decode_alibi", few, ragged, alibi(5)),
        Case("decode_softcap", few, options={"softcap": 1.5}),
        Case("decode_sinks", few, always(KeyLengths(lengths(0, 300))), sinks=True),
        Case("decode_dropout", few, ragged, options={"dropout_p": 0.4, "seed": 11}),
        Case(
            "decode_everything",
            few,
            lambda s, g: ragged(s, g) & Window(400, None, "lower_right"),
            random_bias(True, True, True, True),
            sinks=True,
            options={"softcap": 3.0, "dropout_p": 0.3, "seed": 4, "scale": 0.4},
            layout="heads_last",
        ),
    ]


CASES = _shapes() + _bands() + _masks() + _biases() + _options() + _decoding()
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases of one name"
