"""What is measured: suites, their shapes and kinds, and the work that each case is worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
BACKWARD = "backward"  # alone: of a graph that is kept
PASSES = (FORWARD, FORWARD_BACKWARD, BACKWARD)
DROPOUT_P = 0.1
WINDOW = 256  # keys before its own that a query of the kind "window" attends
GROUP = 8  # query heads that share a key head in the kind "gqa"
# A bias or dense mask of a longer sequence, and what torch's paths make of it, would take most of
# a GPU's memory.
LONGEST_SQUARE = 4096

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Suite:
    """A set of kinds, each measured at every shape that suits it, on one device in one dtype."""

    name: str
    device: str  # torch's name of its type
    dtype: torch.dtype
    attention: bool  # or else norms
    dimensions: tuple[str, ...]  # what a shape's numbers are
    kinds: tuple[str, ...]
    steps: tuple[str, ...]  # of PASSES, those measured unless others are asked for
    peers: tuple[str, ...]  # in the order of the table; names in peers.py
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def rate_unit(self) -> tuple[str, float]:
        """What the table gives rates in, and how much that is."""
        if not self.attention:
            return "GB/s", 1e9
        return ("TFLOP/s", 1e12) if self.on_gpu else ("GFLOP/s", 1e9)


def _of_16k_tokens(lengths: Iterable[int]) -> tuple[Shape, ...]:
    """Batches of 16384 tokens in a model of width 2048, as papers on attention measure them."""
    return tuple(
        (16384 // length, 2048 // head_size, length, head_size)
        for head_size in (64, 128)
        for length in lengths
    )


_ATTENTION_DIMENSIONS = ("batch", "heads", "length", "head size")
_NORM_KINDS = ("layer_norm", "add_layer_norm", "rms_norm", "masked_softmax")

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="cpu-attention",
            device="cpu",
            dtype=torch.float32,
            attention=True,
            dimensions=_ATTENTION_DIMENSIONS,
            kinds=("plain", "causal", "padded", "dropout"),
            steps=(FORWARD, FORWARD_BACKWARD),
            peers=("sdpa", "sdpa-math", "naive", "compile"),
            shapes=(
                (64, 8, 32, 64),
                (32, 8, 128, 64),
                (8, 8, 512, 64),
                (2, 8, 2048, 64),
                (1, 8, 2048, 128),
            ),
            quick_shapes=((64, 8, 32, 64), (32, 8, 128, 64), (8, 8, 512, 64)),
        ),
        Suite(
            name="cpu-norms",
            device="cpu",
            dtype=torch.float32,
            attention=False,
            dimensions=("rows", "columns"),
            kinds=_NORM_KINDS,
            steps=(FORWARD, FORWARD_BACKWARD),
            peers=("torch", "naive", "compile"),
            shapes=((4096, 512), (65536, 512), (512, 4096)),
            quick_shapes=((4096, 512), (512, 4096)),
        ),
        Suite(
            name="gpu-attention",
            device="cuda",
            dtype=torch.bfloat16,
            attention=True,
            dimensions=_ATTENTION_DIMENSIONS,
            kinds=("plain", "causal", "padded", "dropout", "window", "dense", "bias", "gqa"),
            steps=PASSES,
            peers=(
                *("sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math"),
                *("flex", "compile", "flash-attn", "xformers"),
            ),
            shapes=_of_16k_tokens((1024, 2048, 4096, 8192, 16384)),
            quick_shapes=_of_16k_tokens((2048, 8192)),
        ),
        Suite(
            name="gpu-norms",
            device="cuda",
            dtype=torch.bfloat16,
            attention=False,
            dimensions=("rows", "columns"),
            kinds=_NORM_KINDS,
            steps=PASSES,
            peers=("torch", "compile", "liger"),
            shapes=((16384, 1024), (16384, 2048), (8192, 4096), (8192, 8192), (4096, 16384)),
            quick_shapes=((16384, 1024), (8192, 8192)),
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """One line of the table: a kind of call at one shape, and which pass of it."""

    suite: Suite
    kind: str
    shape: Shape
    step: str  # one of PASSES

    @property
    def backward(self) -> bool:
        """Whether gradients are part of it."""
        return self.step != FORWARD

    def text(self) -> str:
        return f"{self.kind} {shape_text(self.shape)} {self.step}"


def shape_text(shape: Shape) -> str:
    return "(" + ",".join(str(size) for size in shape) + ")"


def suits(kind: str, shape: Shape) -> bool:
    """Whether there is a case of this kind and shape; where not, none is made.

    A dense mask or a bias, of one element a pair, wants a sequence of at most LONGEST_SQUARE;
    grouped heads want a multiple of GROUP heads.
    """
    if kind in ("dense", "bias"):
        return shape[2] <= LONGEST_SQUARE
    return kind != "gqa" or shape[1] % GROUP == 0


def cases_of(
    suite: Suite, shapes: Iterable[Shape], kinds: Iterable[str], steps: Iterable[str]
) -> list[Case]:
    """Every combination that there is, in the order of the table."""
    shapes, kinds, steps = tuple(shapes), tuple(kinds), tuple(steps)
    return [
        Case(suite, kind, shape, step)
        for kind in suite.kinds
        if kind in kinds
        for shape in shapes
        if suits(kind, shape)
        for step in PASSES
        if step in steps
    ]


# Matrix products of 2 * D operations a (query, key) pair.
_PRODUCTS = {FORWARD: 2, BACKWARD: 5, FORWARD_BACKWARD: 7}


def attention_flops(pairs: int, head_size: int, step: str) -> int:
    """Floating-point operations of the matrix products for `pairs` (query, key) pairs.

    Pairs that the mask forbids are not work: a kernel that computes them anyway gets no credit
    for it.
    """
    return _PRODUCTS[step] * 2 * pairs * head_size


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
    rows, columns = shape
    forward, backward = _ARRAYS[kind]
    arrays = {FORWARD: forward, BACKWARD: backward, FORWARD_BACKWARD: forward + backward}
    return arrays[step] * rows * columns * itemsize
