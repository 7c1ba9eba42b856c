"""`record`: notes the attention and norm calls of whatever runs meanwhile."""

from __future__ import annotations

import argparse
import functools
import math
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import UsageError, check_outputs
from .calls import Call, write


def record(path: str | Path | None = None) -> Recorder:
    """`with record("shapes.json"):` notes each distinct call of attention and norms, and how often.

    Of torch.nn.functional, which models call: `scaled_dot_product_attention`, `layer_norm` and
    `rms_norm`. Torch's fused encoder layers are switched off meanwhile, for they call none of
    them; what torch.compile has compiled is not seen. Sizes, dtypes, strides, the kind of mask and
    counts are kept, and no values. The file is written at the end, after an error too.
    """
    return Recorder(None if path is None else Path(path))


class Recorder:
    """What `record` gives; `calls` hold how often each came."""

    def __init__(self, path: Path | None) -> None:
        self.calls: Counter[Call] = Counter()
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        self._watch("scaled_dot_product_attention", _attention)
        self._watch("layer_norm", functools.partial(_norm, "layer_norm"))
        self._watch("rms_norm", functools.partial(_norm, "rms_norm"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._path is not None:
            write(self._path, self.calls)

    def _watch(self, name: str, describe: Callable[..., Call]) -> None:
        real = getattr(F, name)

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            self.calls[describe(*arguments, **options)] += 1
            return real(*arguments, **options)

        setattr(F, name, watched)
        self._stack.callback(setattr, F, name, real)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_options: Any,
) -> Call:
    q, k, v = (tensor[(None,) * (4 - tensor.dim())] for tensor in (query, key, value))
    mask = "causal" if is_causal else "none"
    if attn_mask is not None:
        mask = _kind_of(attn_mask)
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    tensors = (q, k, v) if attn_mask is None else (q, k, v, attn_mask)
    return Call(
        "attention",
        tuple(sizes),
        *_of(q),
        tuple(tensor.stride() for tensor in (q, k, v)),
        mask,
        dropout_p > 0.0,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )


def _kind_of(mask: Tensor) -> str:
    """By its values, which models write out: of rows that are all the same, of the lower triangle,
    or another one; a bias where it does more than forbid.
    """
    if mask.dtype != torch.bool:
        forbidden = mask < -1e4
        if mask.requires_grad or not bool((forbidden | (mask == 0)).all()):
            return "bias"
        mask = ~forbidden
    if mask.dim() < 2 or bool((mask == mask[..., :1, :]).all()):
        return "padded"
    square = mask.shape[-2] == mask.shape[-1]
    return "causal" if square and bool((mask == torch.ones_like(mask).tril()).all()) else "dense"


def _norm(op: str, x: Tensor, shape: Any, *arguments: Any, **options: Any) -> Call:
    columns = math.prod(map(int, shape))
    others = [*arguments, *options.values()]
    tensors = [x, *(other for other in others if isinstance(other, Tensor))]
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    rows = x.numel() // max(1, columns)
    return Call(op, (rows, columns), *_of(x), (x.stride(),), "none", False, gradients)


def _of(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.dtype).removeprefix("torch."), tensor.device.type


# --- the command ----------------------------------------------------------------------------------


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("shapes.json"), help="default: %(default)s"
    )
    command.add_argument(
        "program", nargs=argparse.REMAINDER, help="-- python SCRIPT ..., or -- python -m MODULE ..."
    )


def run(options: argparse.Namespace) -> int:
    words = [word for at, word in enumerate(options.program) if at or word != "--"]
    if len(words) < 2 or not Path(words[0]).name.startswith("python"):
        raise UsageError(
            f"record: expected -- python SCRIPT ..., got {' '.join(words) or 'nothing'}"
        )
    is_module = words[1] == "-m"
    target, rest = (words[2:3], words[3:]) if is_module else (words[1:2], words[2:])
    if not target or not (is_module or Path(target[0]).is_file()):
        raise UsageError(f"record: expected a script or -m MODULE, got {' '.join(words[1:])}")
    check_outputs({"--out": options.out})
    before, path = sys.argv, list(sys.path)
    sys.argv = [target[0], *rest]
    sys.path.insert(0, "" if is_module else str(Path(target[0]).resolve().parent))
    recorder = record(options.out)
    try:
        with recorder:
            if is_module:
                runpy.run_module(target[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before, path
    total = sum(recorder.calls.values())
    print(f"{options.out}: {total} calls of attention and norms, {len(recorder.calls)} distinct")
    return 0
