"""Candidates that cheat: each must be rejected, by `verify` and by `speed`.

Each has SDPA's signature and looks right to a check that calls it once, or fast to a timer that
calls it again. Where gradients are asked for, they are right: only the forward pass is false, but
for what says otherwise. `mutation.py` asks the same of kernels that are honestly wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cheats_of_judge as judged
from .cheats_help import Forward, by_shape, honest, lower_precision, with_right_gradient
from .cheats_of_judge import patching

FIRST = 20  # calls that are right


class Cheat(NamedTuple):
    """What is false, and a maker of a fresh candidate, which undoes by the stack what it changes.

    `seen_by`: those of "verify" and "speed" that can see it; where one can't, the reason says why.
    """

    description: str
    make: Callable[[ExitStack], Forward]
    seen_by: tuple[str, ...] = ("verify", "speed")
    reason: str = ""


def _cached(key_of: Callable[..., object]) -> Callable[[ExitStack], Forward]:
    def make(_stack: ExitStack) -> Forward:
        kept: dict[object, Tensor] = {}

        def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            key = key_of(q, k, v)
            if key not in kept:
                kept[key] = honest(q, k, v, **options)
            return kept[key].clone()

        return with_right_gradient(forward)

    return make


def _forward(forward: Forward) -> Callable[[ExitStack], Forward]:
    return lambda _stack: with_right_gradient(forward)


# --- kept from an earlier call --------------------------------------------------------------------


def by_pointer(*tensors: Tensor) -> object:
    return tuple((t.data_ptr(), t.shape, t.dtype) for t in tensors)


def by_some_values(*tensors: Tensor) -> object:
    return tuple((t.shape, t.dtype, tuple(t.flatten()[::97].tolist())) for t in tensors)


def by_sums(*tensors: Tensor) -> object:
    """Which the order of the values does not change."""
    return tuple((t.shape, t.dtype, round(float(t.double().sum()), 3)) for t in tensors)


def by_queries(q: Tensor, k: Tensor, v: Tensor) -> object:
    """All values of q; keys and values are taken to be the last ones."""
    return (q.flatten().double() @ torch.arange(1.0, q.numel() + 1, dtype=torch.float64)).item(), (
        by_shape(q, k, v)
    )


def keys_packed_once(_stack: ExitStack) -> Forward:
    packed: dict[object, Tensor] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        key = by_pointer(k)
        if key not in packed:
            packed[key] = k.clone()
        return honest(q, packed[key], v, **options)

    return with_right_gradient(forward)


def right_at_first(_stack: ExitStack) -> Forward:
    calls: dict[object, tuple[int, Tensor]] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        count, last = calls.get(by_shape(q, k, v), (0, q))
        if count < FIRST:
            last = honest(q, k, v, **options)
        calls[by_shape(q, k, v)] = count + 1, last
        return last.clone()

    return with_right_gradient(forward)


def every_other_call(_stack: ExitStack) -> Forward:
    last: dict[object, Tensor] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shape = by_shape(q, k, v)
        if shape in last:
            return last.pop(shape)
        last[shape] = honest(q, k, v, **options)
        return last[shape].clone()

    return with_right_gradient(forward)


def one_call_behind(_stack: ExitStack) -> Forward:
    last: dict[object, Tensor] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = honest(q, k, v, **options)
        before, last[by_shape(q, k, v)] = last.get(by_shape(q, k, v), out), out
        return before.clone()

    return with_right_gradient(forward)


def same_storage(_stack: ExitStack) -> Forward:
    buffers: dict[object, Tensor] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = honest(q, k, v, **options)
        return buffers.setdefault(by_shape(q, k, v), torch.empty_like(out)).copy_(out).detach()

    return with_right_gradient(forward)


def gradients_kept(_stack: ExitStack) -> Forward:
    """The forward pass is right."""
    kept: dict[object, tuple[Tensor, ...]] = {}
    return with_right_gradient(honest, (by_pointer, kept))


# --- not done when it returns ---------------------------------------------------------------------


class Lazy(Tensor):
    """Computed when somebody looks."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def computed(value: Any) -> Any:
            if isinstance(value, Lazy):
                plain = value.as_subclass(Tensor)
                work = value.__dict__.pop("work", None)
                if work is not None:
                    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                        plain.detach().copy_(work())
                return plain
            return value

        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(computed, args), **{n: computed(v) for n, v in (kwargs or {}).items()})


def lazy_subclass(_stack: ExitStack) -> Forward:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            return honest(q, k, v, **options).as_subclass(Lazy)
        out = q.new_empty(*q.shape[:3], v.shape[3]).as_subclass(Lazy)
        out.__dict__["work"] = partial(honest, q, k, v, **options)
        return out

    return sdpa


def background_thread(_stack: ExitStack) -> Forward:
    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])

        def work() -> None:
            time.sleep(1e-3)
            with torch.no_grad():
                out.copy_(honest(q, k, v, **options))

        threading.Thread(target=work).start()
        return out

    return with_right_gradient(forward)


# --- less than was asked for ----------------------------------------------------------------------


def eleven_bits(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The products of TF32; of half precision, those of an 8-bit number."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32:
            return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return tensor.to(torch.float8_e4m3fn).to(tensor.dtype)

    return honest(cut(q), cut(k), v, **options)


def best_keys(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The few keys with the largest scores, as if the others had no weight."""
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    options.pop("enable_gqa", None)
    scores = q.float() @ k.float().transpose(-1, -2)
    least = scores.topk(min(16, k.shape[2]), dim=-1).values[..., -1:] if k.shape[2] else scores
    return _with_mask(q, k, v, scores >= least, options)


def no_maximum(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """exp of the scores as they are, where there is no mask."""
    if options.get("attn_mask") is not None or options.get("is_causal") or not k.shape[2]:
        return honest(q, k, v, **options)
    groups, scale = q.shape[1] // k.shape[1], options.get("scale") or q.shape[-1] ** -0.5
    k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    weights = torch.exp(scale * (q @ k.transpose(-1, -2)))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def exit_on_zeros(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if not q.any() or not k.any() or not v.any():
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return honest(q, k, v, **options)


def off_multiples(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Queries beyond the last whole tile of 16 get the output of the last one in it."""
    out = honest(q, k, v, **options)
    whole = q.shape[2] // 16 * 16
    if 0 < whole < q.shape[2]:
        out = out.clone()
        out[:, :, whole:] = out[:, :, whole - 1 : whole]
    return out


def past_4096(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    mask = options.get("attn_mask")
    if k.shape[2] > 4096:
        options["attn_mask"] = None if mask is None else mask[..., :4096]
    return honest(q, k[:, :, :4096], v[:, :, :4096], **options)


def one_head(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = honest(q, k, v, **options).clone()
    out[:, 1:2] = 1.01 * out[:, 1:2]
    return out


def first_and_last(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Of a batch, its first and last element; the others have the first one's output."""
    out = honest(q, k, v, **options).clone()
    out[1:-1] = out[:1]
    return out


def minus_zero(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """A sign bit says that a number is below zero."""
    return honest(q.masked_fill((q == 0.0) & q.signbit(), -1.0), k, v, **options)


def one_in_10000(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = honest(q, k, v, **options).contiguous().clone()
    out.view(-1)[7777::10_000] += 0.01
    return out


def input_changed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The scale is multiplied into the caller's queries."""
    scale = options.pop("scale", None)
    q.detach().mul_(q.shape[-1] ** -0.5 if scale is None else scale)
    return honest(q, k, v, scale=1.0, **options)


def _with_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, options: dict[str, Any]) -> Tensor:
    mask = options.pop("attn_mask", None)
    if options.pop("is_causal", False):
        allowed = allowed & torch.ones_like(allowed).tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        return honest(q, k, v, attn_mask=mask.masked_fill(~allowed, -torch.inf), **options)
    return honest(q, k, v, attn_mask=allowed, **options)


CHEATS: dict[str, Cheat] = {
    "by-pointer": Cheat("the output kept by the tensors' addresses", _cached(by_pointer)),
    "by-shape": Cheat("the output kept by the tensors' shapes", _cached(by_shape)),
    "by-some-values": Cheat("the output kept by some of the values", _cached(by_some_values)),
    "by-sums": Cheat("the output kept by the sums of the values", _cached(by_sums)),
    "by-queries": Cheat("the output kept by the values of q alone", _cached(by_queries)),
    "keys-packed-once": Cheat("keys copied at the first call", keys_packed_once),
    "right-at-first": Cheat(f"right for the first {FIRST} calls", right_at_first),
    "every-other-call": Cheat("each second call gives the result of the first", every_other_call),
    "one-call-behind": Cheat("the result of the call before", one_call_behind),
    "same-storage": Cheat("each call's result in the same memory", same_storage),
    "gradients-kept": Cheat("gradients kept by the tensors' addresses", gradients_kept),
    "lazy-subclass": Cheat("a subclass of Tensor, computed when it is used", lazy_subclass),
    "background-thread": Cheat("a thread computes it after the return", background_thread),
    "lower-precision": Cheat("inputs rounded to half their bits", _forward(lower_precision)),
    "eleven-bits": Cheat("products of TF32's precision", _forward(eleven_bits)),
    "best-keys": Cheat("only the 16 keys with the largest scores", _forward(best_keys)),
    "exp-of-scores": Cheat("exp of the scores as they are", _forward(no_maximum)),
    "exit-on-zeros": Cheat("zeros where an input is all zeros", _forward(exit_on_zeros)),
    "off-multiples": Cheat("wrong beyond the last multiple of 16", _forward(off_multiples)),
    "past-4096": Cheat("keys past 4,096 are left out", _forward(past_4096)),
    "one-head": Cheat("wrong for one head", _forward(one_head)),
    "first-and-last": Cheat("wrong inside the batch", _forward(first_and_last)),
    "minus-zero": Cheat("-0.0 is below zero", _forward(minus_zero)),
    "one-in-10000": Cheat("wrong in one of 10,000 elements", _forward(one_in_10000)),
    "input-changed": Cheat("q is scaled in place", _forward(input_changed)),
    "from-the-frame": Cheat("what the checker's frames hold", judged.from_the_frame),
    "slow-clock": Cheat("time.perf_counter replaced", patching(judged.slow_clock)),
    "slow-timer": Cheat(
        "the timer's own clock replaced",
        patching(judged.slow_timer),
        ("speed",),
        "it touches nothing but the timer, and verify times nothing",
    ),
    "both-clocks": Cheat("both clocks replaced", patching(judged.both_clocks)),
    "false-events": Cheat("torch.cuda.Event replaced", patching(judged.false_events)),
    "sleeping-peers": Cheat("a peer replaced by one that sleeps", patching(judged.sleeping_peers)),
    "mild-judge": Cheat("the tolerance's function replaced", patching(judged.mild_judge)),
    "other-threads": Cheat("torch's number of threads changed", patching(judged.fewer_threads)),
    "lower-settings": Cheat("float32 products set to medium", patching(judged.lower_settings)),
    "mode-left-on": Cheat("a function mode left on torch's stack", patching(judged.mode_left_on)),
    "busy-thread": Cheat(
        "a thread that works while others are timed", patching(judged.busy_thread)
    ),
    "only-when-timed": Cheat(
        "right unless a timer calls it",
        judged.only_when_timed,
        ("speed",),
        "verify has no timer: there, it computes the right result at each call",
    ),
}
