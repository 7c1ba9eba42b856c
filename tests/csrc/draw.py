"""Random test cases of every function, each from a seed: for the fuzz and for the C++ parity."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rowmax.kernels as rk
from rowmax.bench.verification.implementations import Implementation
from rowmax.kernels.testing import cross_entropy
from rowmax.kernels.testing.cases import Draw, Shape, packed_case
from rowmax.kernels.testing.oracle import AttentionCase, TestCase, random_gradients
from rowmax.kernels.testing.rows import RowCase, norm_case
from rowmax.kernels.testing.tolerance import faults_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STEPS = 8  # of a row-wise function an element, about
FAR = (2**40, 2**61)  # beyond every position, and near what could overflow


class Call:
    """The call that follows from a seed: a test case, and a line that describes it.

    `case` is what is judged, and `given` the same as it is called. With `most` a call takes no more
    elementary steps than that, or not many.
    """

    def __init__(self, seed: int, most: int | None = None) -> None:
        self.random = random.Random(seed)
        self.dtype = self.random.choice(DTYPES)
        self.draw = Draw(seed, self.dtype)
        self.threads = self.random.randint(1, 4)
        kinds = {
            "attention": (6, self._attention),
            "packed": (2, self._packed),
            "norm": (2, self._norm),
            "softmax": (2, self._softmax),
            "cross entropy": (1, self._cross_entropy),
        }
        shares = [share for share, _ in kinds.values()]
        kind = self.random.choices(list(kinds), shares)[0]
        self.text = f"{kind}, {self.dtype}, {self.threads} threads"
        self._most = most
        self.case: TestCase = kinds[kind][1]()
        self.given = self._with_nan_in_padding(self.case)

    def faults(self, backend: Implementation) -> list[str]:
        """What is wrong with the backend's results."""
        kernel = backend.kernel(self.case.op)
        if isinstance(self.case, AttentionCase) and not self.case.with_lse:
            kernel = partial(rk.attention, backend=backend.name)  # which then is not asked for lse
        results = self.given.run(kernel)
        return faults_of(results, self.case.expected, self.case.sum_dtype)

    # --- attention --------------------------------------------------------------------------------

    def _with_nan_in_padding(self, case: TestCase) -> TestCase:
        """The same, sometimes with NaN in keys that nothing attends; the oracle sees clean ones."""
        if not (isinstance(case, AttentionCase) and isinstance(case.mask, rk.Mask)):
            return case
        if not self._now_and_then():
            return case
        met = case.mask.dense(*case.shape).expand(case.shape).any(2).any(1)  # (B, Lk)
        self.text += ", NaN in padding"
        given: dict[str, Any] = {
            name: tensor.masked_fill(~met[:, None, :, None], torch.nan)
            for name, tensor in (("k", case.k), ("v", case.v))
        }
        return replace(case, **given)

    def _attention(self) -> TestCase:
        case = self._arguments(self._sizes())
        return case if self._now_and_then(0.8) else case.without_lse()

    def _arguments(self, sizes: Shape) -> AttentionCase:
        factor = self.random.choice((1.0, 1.0, 1e-3, 20.0))
        heads = (sizes.B, sizes.Hq, sizes.Lq), (sizes.B, sizes.Hkv, sizes.Lk)
        arguments = AttentionCase(
            q=self._laid_out(self.draw.normal(*heads[0], sizes.D) * factor),
            k=self._laid_out(self.draw.normal(*heads[1], sizes.D)),
            v=self._laid_out(self.draw.normal(*heads[1], sizes.Dv)),
            mask=self._mask(sizes) if self._now_and_then(0.7) else None,
            bias=self._bias(sizes),
            sinks=self.draw.normal(sizes.Hq) if self._now_and_then() else None,
            options=self._options(),
        )
        arguments = random_gradients(arguments, self.draw.generator)
        assert arguments.grad_out is not None  # random_gradients draws it
        return replace(arguments, grad_out=self._laid_out(arguments.grad_out))

    def _sizes(self, least_batch: int = 0) -> Shape:
        pick = self.random
        key_heads = pick.choice((1, 1, 2, 2, 3))
        batch, group = max(least_batch, pick.choice((0, 1, 1, 2, 2, 3))), pick.choice((1, 1, 2, 3))
        lengths = self._length(), self._length()
        if self._now_and_then(0.15):  # decoding
            lengths = pick.randint(1, 8), pick.randint(200, 800)
        sizes = Shape(batch, key_heads * group, key_heads, *lengths, self._width(), self._width())
        # Keys stay as many as they are: blocks and chunks of them are what there is to find.
        if not self._fits(sizes):
            sizes = sizes._replace(B=1, Hq=group, Hkv=1)
        if not self._fits(sizes):
            sizes = sizes._replace(D=min(sizes.D, 20), Dv=min(sizes.Dv, 17))
        while not self._fits(sizes):
            sizes = sizes._replace(Lq=sizes.Lq // 2)
        self.text += f", {tuple(sizes)}"
        return sizes

    def _fits(self, sizes: Shape) -> bool:
        return (
            self._most is None or math.prod(sizes.scores) * (8 + sizes.D + sizes.Dv) <= self._most
        )

    def _length(self) -> int:
        pick = self.random
        common = pick.randint(0, 40), pick.choice((63, 64, 65, 127, 128, 129, 257)), 520
        return pick.choices(common, (12, 4, 1))[0]

    def _width(self) -> int:
        pick = self.random
        return pick.choices((pick.randint(0, 24), pick.choice((32, 64, 65, 128, 200))), (3, 1))[0]

    def _options(self) -> dict[str, Any]:
        pick, options = self.random, {}
        if self._now_and_then(0.4):
            options["scale"] = pick.choice((0.0, pick.uniform(-1, 1)))
        if self._now_and_then(0.15):
            options["softcap"] = pick.uniform(0.1, 10)
        if self._now_and_then():
            options["dropout_p"] = pick.choice((1.0, 2.0**-33, pick.random()))
            options["seed"] = pick.randint(-(2**63), 2**63 - 1)
        self.text += "".join(f", {name}={value}" for name, value in options.items())
        return options

    def _bias(self, sizes: Shape) -> Tensor | rk.ALiBi | None:
        kind = self.random.choices(("none", "tensor", "alibi"), (6, 2, 1))[0]
        if kind == "none":
            return None
        if kind == "alibi":
            per_batch = (sizes.B,) if self._now_and_then(0.5) else ()
            self.text += ", ALiBi"
            return rk.ALiBi(self.draw.normal(*per_batch, sizes.Hq).abs(), self._align(sizes.B, 0))
        shape = self._broadcast(sizes.scores)
        self.text += f", bias {shape}"
        bias = self.draw.normal(*shape)
        if self._now_and_then():
            bias = bias.masked_fill(self.draw.coins(0.2, *shape), -torch.inf)
        if self._now_and_then():
            narrower = [dtype for dtype in DTYPES if dtype.itemsize <= self.dtype.itemsize]
            bias = bias.to(self.random.choice(narrower))
        return self._laid_out(bias)

    def _mask(self, sizes: Shape) -> rk.Mask:
        classes = rk.Causal, rk.Window, rk.KeyLengths, rk.QueryLengths, rk.Dense, rk.Documents
        kinds = self.random.choices(classes, k=self.random.randint(1, 3))
        self.text += f", {' & '.join(kind.__name__ for kind in kinds)}"
        parts = [self._one_mask(kind, sizes) for kind in kinds]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part
        return joined

    def _one_mask(self, kind: type[rk.Mask], sizes: Shape) -> rk.Mask:
        pick = self.random
        if kind is rk.Causal:
            return rk.Causal(self._align(sizes.B))
        if kind is rk.Window:
            far = pick.choice(FAR)
            left, right = (pick.choice((None, 0, pick.randint(0, 300), far)) for _ in range(2))
            return rk.Window(left, right, self._align(sizes.B))
        if kind is rk.KeyLengths:
            return rk.KeyLengths(self.draw.lengths(sizes.Lk + 3, sizes.B))
        if kind is rk.QueryLengths:
            return rk.QueryLengths(self.draw.lengths(sizes.Lq + 3, sizes.B))
        if kind is rk.Dense:
            shape = self._broadcast(sizes.scores)
            allowed = self.draw.coins(pick.choice((0.05, 0.7, 0.98)), *shape)
            return rk.Dense(self._laid_out(allowed))
        ids = [self._ids(sizes.B, length) for length in (sizes.Lq, sizes.Lk)]
        return rk.Documents(*ids)

    def _ids(self, batch: int, length: int) -> Tensor:
        ids = torch.randint(3, (batch, length), generator=self.draw.generator)
        return ids.sort(dim=1).values if self._now_and_then(0.7) else ids

    def _align(self, batch: int, far_share: int = 1) -> Any:
        pick = self.random
        far = pick.choice((1, -1)) * pick.choice(FAR)
        kinds = "upper_left", "lower_right", pick.randint(-300, 300), far, None
        align = pick.choices(kinds, (3, 3, 3, far_share, 2))[0]
        if align is not None:
            return align
        return torch.randint(-40, 40, (batch,), generator=self.draw.generator)

    def _packed(self) -> TestCase:
        """Sequences of any lengths; the oracle sees them padded, the lengths as masks."""
        sizes = self._sizes(least_batch=1)
        queries, keys = self.draw.lengths(sizes.Lq, sizes.B), self.draw.lengths(sizes.Lk, sizes.B)
        mask: rk.Mask | None = None
        if self._now_and_then(0.6):  # positions from the sequence's start: padding moves none
            left, right = (self.random.choice((None, 0, 7, 200)) for _ in range(2))
            shift: Any = self.random.choice(("upper_left", self.random.randint(-20, 40)))
            mask = self.random.choice((rk.Causal(shift), rk.Window(left, right, shift)))
        slopes = self.draw.normal(sizes.Hq).abs()
        arguments = random_gradients(
            AttentionCase(
                q=self.draw.normal(sizes.B, sizes.Hq, sizes.Lq, sizes.D),
                k=self.draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.D),
                v=self.draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.Dv),
                mask=mask,
                bias=rk.ALiBi(slopes, "upper_left") if self._now_and_then(0.2) else None,
                sinks=self.draw.normal(sizes.Hq) if self._now_and_then() else None,
                options=self._options(),
            ),
            self.draw.generator,
        )
        self.text += f", {mask}"
        return packed_case(arguments, queries, keys)

    # --- rows -------------------------------------------------------------------------------------

    def _norm(self) -> TestCase:
        pick = self.random
        op = pick.choice(("layer_norm", "add_layer_norm", "rms_norm"))
        columns = (pick.randint(1, 70), pick.choice((256, 515, 1536, 1601, 4096)))
        shape = pick.choice((0, 1, 5, 33, 150)), pick.choices(columns, (3, 1))[0]
        if self._most is not None:
            shape = min(shape[0], self._most // (_STEPS * shape[1])), shape[1]
        options: dict[str, Any] = {"eps": pick.choice((1e-5, 0.5))}
        if op == "add_layer_norm" and self._now_and_then(0.5):
            options["dropout_p"] = pick.choice((1.0, pick.random()))
            options["seed"] = pick.randint(-(2**63), 2**63 - 1)
        parameters = pick.choice(((), ("weight",), ("weight", "bias")))
        self.text += f", {op} {shape} {parameters} {options}"
        x = self._laid_out(self.draw.normal(*shape) + pick.choice((0.0, 0.0, 30.0)))
        case = norm_case(op, x, self.draw, parameters, options)
        return replace(case, grads=tuple(self._laid_out(grad) for grad in case.grads))

    def _softmax(self) -> TestCase:
        sizes = self._sizes()
        mask = self._mask(sizes) if self._now_and_then(0.8) else None
        options = {"scale": self.random.uniform(-2, 2)} if self._now_and_then() else {}
        self.text += f" {options}"
        scores = self._laid_out(self.draw.normal(*sizes.scores))
        grad = self._laid_out(self.draw.normal(*sizes.scores))
        return RowCase("masked_softmax", {"scores": scores}, (grad,), mask, options)

    def _cross_entropy(self) -> TestCase:
        pick = self.random
        kind = pick.choice(list(cross_entropy.KINDS))
        # the mean of no token is NaN
        tokens = pick.choice((1, 5, 33)) if kind not in ("ignored", "sum") else 40
        shape = tokens, pick.randint(1, 20), pick.choice((pick.randint(1, 70), 515, 1601))
        self.text += f", {kind} {shape}"
        case = cross_entropy.cross_entropy_case(kind, shape, self.draw)
        return replace(case, x=self._laid_out(case.x), weight=self._laid_out(case.weight))

    # --- drawing ----------------------------------------------------------------------------------

    def _now_and_then(self, share: float = 0.25) -> bool:
        return self.random.random() < share

    def _broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(1 if self._now_and_then(0.4) else size for size in shape)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """The values in memory with dimensions in any order, and NaN between and around them."""
        if self._now_and_then(0.4):
            return tensor
        order = list(range(tensor.dim()))
        if self._now_and_then(0.3):
            self.random.shuffle(order)
        else:  # the last stays last, as kernels read it without a copy
            leading = order[:-1]
            self.random.shuffle(leading)
            order[:-1] = leading
        moved = tensor.permute(order)
        before = [self.random.choice((0, 0, 1, 3)) for _ in order]
        after = [self.random.choice((0, 0, 1, 5)) for _ in order]
        room = [sum(sizes) for sizes in zip(before, moved.shape, after, strict=True)]
        filling = torch.nan if tensor.is_floating_point() else 1
        storage = torch.full(room, filling, dtype=tensor.dtype)
        for dimension, start in enumerate(before):
            storage = storage.narrow(dimension, start, moved.shape[dimension])
        storage.copy_(moved)
        return storage.permute([order.index(dimension) for dimension in range(len(order))])
