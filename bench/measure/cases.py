"""The cases that are measured: suites, their shapes and kinds, and the work of each case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
BACKWARD = "backward"  # alone: of a graph that is kept
PASSES = (FORWARD, FORWARD_BACKWARD, BACKWARD)
IN_SHORT = {FORWARD: "fwd", FORWARD_BACKWARD: "f+b", BACKWARD: "bwd"}
DROPOUT_P = 0.1
WINDOW = 256  # keys before its own that a query of the kind "window" attends
MODEL_HEAD_SIZE = 64
GROUP = 8  # query heads that share a key head in the kind "gqa"
MAX_DECODE_QUERIES = 16  # against more keys than that; with more queries it is "cross"
# A bias or dense mask of a longer sequence, and what torch's paths make of it, would take most of
# a GPU's memory.
MAX_SQUARE_LENGTH = 4096

# For norms (rows, columns). For attention (batch, heads, length, head size), or
# (batch, heads, queries, keys, head size), or (batch, heads, key heads, queries, keys, head size).
Shape = tuple[int, ...]

# The parts of a kind of attention, joined by "+": "padded+dropout". "full", "cross" and "decode"
# name no mask; they say how many queries there are to the keys: as many, another number, or few.
PARTS = (
    *("full", "cross", "decode"),
    *("causal", "padded", "window", "dense", "gqa", "bias", "dropout"),
)
_SQUARE_PARTS = frozenset({"causal", "window", "dense", "gqa"})  # as many queries as keys


class Sizes(NamedTuple):
    """The shape of an attention, written out."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_size: int


def sizes_of(shape: Shape) -> Sizes:
    if len(shape) == 4:
        batch, heads, length, head_size = shape
        return Sizes(batch, heads, heads, length, length, head_size)
    if len(shape) == 5:
        batch, heads, queries, keys, head_size = shape
        return Sizes(batch, heads, heads, queries, keys, head_size)
    return Sizes(*shape)


def parts_of(kind: str) -> frozenset[str]:
    return frozenset(kind.split("+"))


@dataclass(frozen=True)
class Suite:
    """A set of kinds, each measured at every shape that suits it, on one device."""

    name: str
    device: str  # torch's name of its type
    dtypes: tuple[torch.dtype, ...]
    attention: bool  # or else norms
    dimensions: tuple[str, ...]  # what a shape's numbers are
    kinds: tuple[str, ...]
    steps: tuple[str, ...]  # of PASSES, those measured unless others are asked for
    peers: tuple[str, ...]  # in the order of the table; names in peers.py
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]
    own_shapes: Mapping[str, tuple[Shape, ...]] = field(  # of kinds that `shapes` are not for
        default_factory=dict, hash=False
    )
    model: bool = False  # whole models, and neither attention nor norms

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def shapes_of(self, kind: str, *, quick: bool) -> tuple[Shape, ...]:
        shapes = self.own_shapes.get(kind, self.shapes)
        return tuple(shape for shape in shapes if not quick or shape in self.quick_shapes)

    def takes(self, shape: Shape) -> bool:
        """Whether the shape has as many numbers as this suite's have."""
        return len(shape) in (4, 5, 6) if self.attention else len(shape) == len(self.dimensions)


def _shapes_of_16k_tokens(lengths: Iterable[int]) -> tuple[Shape, ...]:
    """Batches of 16384 tokens in a model of width 2048, as papers on attention measure them."""
    return tuple(
        (16384 // length, 2048 // head_size, length, head_size)
        for head_size in (64, 128)
        for length in lengths
    )


_ATTENTION_DIMENSIONS = ("batch", "heads", "length", "head size")
MODEL_KINDS = ("transformer", "encoder")
_BASE: tuple[Shape, ...] = (
    (64, 8, 32, 64),
    (32, 8, 128, 64),
    (8, 8, 512, 64),
    (2, 8, 2048, 64),
    (1, 8, 2048, 128),
)
_WINDOWED = (1, 8, 4096, 64)
_CROSS = (32, 8, 32, 128, 64)
# One token against a cache: a translation's memory, a long one, and a long one of grouped heads.
_DECODE = ((64, 8, 1, 64, 64), (16, 8, 1, 1024, 64), (16, 32, 8, 1, 1024, 128))

_CPU_NORMS = Suite(
    name="cpu-norms",
    device="cpu",
    dtypes=(torch.float32,),
    attention=False,
    dimensions=("rows", "columns"),
    kinds=("layer_norm", "add_layer_norm", "rms_norm", "masked_softmax"),
    steps=(FORWARD, FORWARD_BACKWARD),
    peers=("torch", "naive", "compile", "numba", "native"),
    shapes=((4096, 512), (65536, 512), (512, 4096)),
    quick_shapes=((4096, 512), (512, 4096)),
)

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="cpu-attention",
            device="cpu",
            dtypes=(torch.float32, torch.bfloat16),
            attention=True,
            dimensions=_ATTENTION_DIMENSIONS,
            kinds=(
                *("full", "causal", "padded", "dropout", "causal+dropout", "padded+dropout"),
                *("bias", "window", "cross", "decode"),
            ),
            steps=(FORWARD, FORWARD_BACKWARD),
            peers=(
                *("sdpa", "sdpa-math", "naive", "compile", "flex", "onnxruntime", "openvino"),
                *("numba", "native"),
            ),
            shapes=_BASE,
            quick_shapes=(*_BASE[:3], _WINDOWED, _CROSS, *_DECODE),
            own_shapes={
                # the window's shape too, so that there is something to compare it with
                "full": (*_BASE, _WINDOWED, (1, 8, 8192, 64)),
                "window": (_WINDOWED,),
                "cross": (_CROSS,),
                "decode": _DECODE,
            },
        ),
        _CPU_NORMS,
        Suite(
            name="gpu-attention",
            device="cuda",
            dtypes=(torch.bfloat16,),
            attention=True,
            dimensions=_ATTENTION_DIMENSIONS,
            kinds=("full", "causal", "padded", "dropout", "window", "dense", "bias", "gqa"),
            steps=PASSES,
            peers=(
                *("sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math"),
                *("flex", "compile", "flash-attn", "xformers"),
            ),
            shapes=_shapes_of_16k_tokens((1024, 2048, 4096, 8192, 16384)),
            quick_shapes=_shapes_of_16k_tokens((2048, 8192)),
        ),
        replace(
            _CPU_NORMS,
            name="gpu-norms",
            device="cuda",
            dtypes=(torch.bfloat16,),
            steps=PASSES,
            peers=("torch", "compile", "liger"),
            shapes=((16384, 1024), (16384, 2048), (8192, 4096), (8192, 8192), (4096, 16384)),
            quick_shapes=((16384, 1024), (8192, 8192)),
        ),
        Suite(
            name="model",
            device="cpu",
            dtypes=(torch.float32,),
            attention=False,
            dimensions=("batch", "length", "width"),
            kinds=MODEL_KINDS,
            steps=(FORWARD_BACKWARD,),
            peers=("torch", "naive"),
            shapes=((16, 64, 256), (2, 512, 512)),
            quick_shapes=((16, 64, 256),),
            model=True,
        ),
    )
}


def suite_of(device: str, *, attention: bool) -> Suite | None:
    """Of attention or of norms on this device."""
    found = (s for s in SUITES.values() if (s.device, s.attention) == (device, attention))
    return next((suite for suite in found if not suite.model), None)


@dataclass(frozen=True)
class Case:
    """One line of the table: a kind of call at one shape in one dtype, and which pass of it."""

    suite: Suite
    dtype: torch.dtype
    kind: str
    shape: Shape
    step: str  # one of PASSES
    layout: str = "bhld"  # of attention's tensors in memory: or "blhd"

    @property
    def backward(self) -> bool:
        """Whether gradients are part of it."""
        return self.step != FORWARD

    @property
    def parts(self) -> frozenset[str]:
        return parts_of(self.kind)

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.shape)

    @property
    def bound_by_memory(self) -> bool:
        return bound_by_memory(self.suite, self.kind)

    def text(self) -> str:
        return f"{self.kind} {shape_text(self.shape)} {self.step} {dtype_text(self.dtype)}"


def bound_by_memory(suite: Suite, kind: str) -> bool:
    """Whether what a kind is held against is the rate of a copy, and not that of arithmetic."""
    return not suite.model and (not suite.attention or "decode" in parts_of(kind))


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Shape) -> str:
    """(16,32/8,1,1024,128) where 32 heads share 8 key heads."""
    numbers = [str(size) for size in shape]
    if len(shape) == 6:
        numbers[1:3] = [f"{shape[1]}/{shape[2]}"]
    return "(" + ",".join(numbers) + ")"


def suits(kind: str, shape: Shape) -> bool:
    """Whether there is a case of this kind and shape; where not, none is made.

    A dense mask or a bias, of one element a pair, wants a sequence of at most MAX_SQUARE_LENGTH;
    grouped heads want a multiple of GROUP heads, a model a width of whole heads; "full" has as many
    queries as keys, "decode" at most MAX_DECODE_QUERIES and more keys, "cross" is any other.
    """
    if kind in MODEL_KINDS:
        return shape[2] % MODEL_HEAD_SIZE == 0
    if len(shape) == 2:
        return True
    parts, sizes = parts_of(kind), sizes_of(shape)
    square = sizes.queries == sizes.keys
    decoding = sizes.queries <= MAX_DECODE_QUERIES and sizes.queries < sizes.keys
    proportion = "full" if square else "decode" if decoding else "cross"
    if parts & {"full", "cross", "decode"} and proportion not in parts:
        return False
    if parts & {"dense", "bias"} and max(sizes.queries, sizes.keys) > MAX_SQUARE_LENGTH:
        return False
    if "gqa" in parts and (len(shape) != 4 or sizes.heads % GROUP != 0):
        return False
    return square or not parts & _SQUARE_PARTS


def cases_of(
    suite: Suite,
    dtypes: Iterable[torch.dtype],
    kinds: Iterable[str],
    steps: Iterable[str],
    shapes: Iterable[Shape] = (),
    *,
    quick: bool = False,
) -> list[Case]:
    """Every combination that there is, in the order of the table; of the suite's own shapes
    unless others are given. Decoding has no backward.
    """
    steps, shapes = tuple(steps), tuple(shapes)
    kinds = tuple(kinds)
    return [
        Case(suite, dtype, kind, shape, step)
        for dtype in dtypes
        for kind in kinds
        for shape in shapes or suite.shapes_of(kind, quick=quick)
        if suits(kind, shape)
        for step in PASSES
        if step in steps and (step == FORWARD or "decode" not in parts_of(kind))
    ]


def _of_step(step: str, forward: int, backward: int) -> int:
    return {FORWARD: forward, BACKWARD: backward, FORWARD_BACKWARD: forward + backward}[step]


def attention_flops(pairs: int, head_size: int, step: str) -> int:
    """Floating-point operations of the matrix products for `pairs` (query, key) pairs.

    Pairs that the mask forbids are not work: a kernel that computes them anyway gets no credit
    for it.
    """
    products = _of_step(step, 2, 5)  # of 2 * D operations a pair
    return products * 2 * pairs * head_size


def attention_bytes(once: int, step: str) -> int:
    """Bytes that any implementation must move, where q, k, v and out together have `once`.

    Forward reads and writes each once; backward reads them, and d_out instead of out, and writes
    three gradients.
    """
    return _of_step(step, 1, 2) * once


# Arrays of the input's size that must cross memory once, forward and backward: what is read and
# written with nothing but the row statistics kept in between.
_ARRAYS = {
    "layer_norm": (2, 3),  # x, y | dy, x, dx
    "add_layer_norm": (4, 4),  # x, residual, sum, y | dy, sum, dx, d_residual
    "rms_norm": (2, 3),
    "masked_softmax": (2, 3),  # scores, weights | d_weights, weights, d_scores
}


def norm_bytes(kind: str, shape: Shape, step: str, itemsize: int = 4) -> int:
    """Bytes that any implementation of `kind` must move."""
    return _of_step(step, *_ARRAYS[kind]) * math.prod(shape) * itemsize


# Operations an element, forward and backward, as the equations have them; a root or an
# exponential is one.
_NORM_OPERATIONS = {
    "layer_norm": (8, 14),
    "add_layer_norm": (11, 17),
    "rms_norm": (5, 11),
    "masked_softmax": (5, 4),
}


def norm_flops(kind: str, shape: Shape, step: str) -> int:
    """Floating-point operations of `kind`: for the roofline, for memory is what limits them."""
    return _of_step(step, *_NORM_OPERATIONS[kind]) * math.prod(shape)
