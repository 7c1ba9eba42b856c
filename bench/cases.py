"""What is measured: suites, their shapes and kinds, and the work that each case is worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
DROPOUT_P = 0.1

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Suite:
    """A set of kinds, each measured at every shape."""

    name: str
    dimensions: tuple[str, ...]  # what a shape's numbers are
    kinds: tuple[str, ...]
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "cpu-attention",
            ("batch", "heads", "length", "head size"),
            ("plain", "causal", "padded", "dropout"),
            (
                (64, 8, 32, 64),
                (32, 8, 128, 64),
                (8, 8, 512, 64),
                (2, 8, 2048, 64),
                (1, 8, 2048, 128),
            ),
            ((64, 8, 32, 64), (32, 8, 128, 64), (8, 8, 512, 64)),
        ),
        Suite(
            "cpu-norms",
            ("rows", "columns"),
            ("layer_norm", "add_layer_norm", "rms_norm", "masked_softmax"),
            ((4096, 512), (65536, 512), (512, 4096)),
            ((4096, 512), (512, 4096)),
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """One line of the table: a kind of call at one shape, with or without its backward."""

    suite: str
    kind: str
    shape: Shape
    step: str  # one of PASSES

    @property
    def backward(self) -> bool:
        return self.step == FORWARD_BACKWARD

    def text(self) -> str:
        return f"{self.kind} {shape_text(self.shape)} {self.step}"


def shape_text(shape: Shape) -> str:
    return "(" + ",".join(str(size) for size in shape) + ")"


def cases_of(
    suite: Suite, shapes: Iterable[Shape], kinds: Iterable[str], steps: Iterable[str]
) -> list[Case]:
    """Every combination, in the order of the table."""
    steps = tuple(steps)
    return [
        Case(suite.name, kind, shape, step)
        for kind in suite.kinds
        if kind in tuple(kinds)
        for shape in shapes
        for step in PASSES
        if step in steps
    ]


def attention_flops(pairs: int, head_size: int, *, backward: bool) -> int:
    """Floating-point operations of the matrix products for `pairs` (query, key) pairs.

    Two products of 2 * D operations a pair forward, five backward. Pairs that the mask forbids
    are not work: a kernel that computes them anyway gets no credit for it.
    """
    products = 7 if backward else 2
    return products * 2 * pairs * head_size


# Arrays of the input's size that must cross memory once, forward and forward+backward:
# what is read and written with nothing but the row statistics kept in between.
_ARRAYS = {
    "layer_norm": (2, 5),  # x, y | dy, x, dx
    "add_layer_norm": (4, 8),  # x, residual, sum, y | dy, sum, dx, d_residual
    "rms_norm": (2, 5),
    "masked_softmax": (2, 5),  # scores, weights | d_weights, weights, d_scores
}


def norm_bytes(kind: str, shape: Shape, *, backward: bool, itemsize: int = 4) -> int:
    """Bytes that any implementation of `kind` must move."""
    rows, columns = shape
    return _ARRAYS[kind][backward] * rows * columns * itemsize
