"""How attention is divided into tiles, chunks of keys and tasks, from sizes and threads alone.

`csrc/binding/attention_plan.cpp` says the same, line by line. The bits of a result depend on
nothing that is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..cpu_common.constants import (
    BIAS_GRAD_STORE,
    BIAS_GRAD_SUM,
    BIAS_GRAD_SUM_WIDE,
    BLOCK_KEYS,
    CACHE_BYTES,
    CHUNK_KEYS,
    MAX_DECODE_QUERIES,
    MAX_DECODE_ROWS,
    MAX_WIDE_BYTES,
    SHORT_HEAD,
)
from .gemm import TILE_VECTORS
from .threads import thread_count


class Sizes(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    query_len: int  # of packed sequences the longest
    key_len: int


class DecodePlan(NamedTuple):
    chunks: int  # of keys that a head has, at most
    tasks: int


class ForwardPlan(NamedTuple):
    tile: int
    tasks_per_grab: int
    grabs: int  # how often threads take tasks
    keeps_wide: bool


class BackwardPlan(NamedTuple):
    tile: int
    batch_tasks: int
    head_tasks: int
    chunk_tasks: int
    chunk_keys: int
    tasks_per_grab: int
    grabs: int


def max_decode_queries(heads: int, key_heads: int) -> int:
    """The most queries that a sequence has for the decoding kernel."""
    group = heads // max(1, key_heads)
    return min(MAX_DECODE_QUERIES, MAX_DECODE_ROWS // max(1, group))


def decode_plan(of: Sizes) -> DecodePlan:
    """A task is a chunk of keys of a head of K and V."""
    chunks = max(1, _divide_up(of.key_len, CHUNK_KEYS))
    return DecodePlan(chunks, of.batch * of.key_heads * chunks)


def forward_plan(of: Sizes, lanes: int, wide_bytes: int) -> ForwardPlan:
    """A task is a tile of queries of a head.

    `wide_bytes` is what a key's rows of K and V take when they are widened, 0 where they are not.
    They are kept where several tiles read a head and its rows fit MAX_WIDE_BYTES.
    """
    planes = of.batch * of.heads
    tile = tile_queries(of.query_len, lanes)
    # Narrower tiles where few wide ones would leave threads idle.
    threads = thread_count(planes * _divide_up(of.query_len, lanes))
    if planes * _divide_up(of.query_len, tile) < 8 * threads:
        least = _forward_work(of, tile, lanes, threads)
        for narrower in range(tile - lanes, 0, -lanes):
            work = _forward_work(of, narrower, lanes, threads)
            if work < least:
                tile, least = narrower, work
    tiles = _divide_up(of.query_len, tile)
    tasks_per_grab = max(1, tiles * heads_at_once(planes, max(of.query_len, of.key_len)))
    keeps_wide = (
        wide_bytes > 0
        and of.key_len * wide_bytes <= MAX_WIDE_BYTES
        and (tiles > 1 or of.heads > of.key_heads)
    )
    return ForwardPlan(tile, tasks_per_grab, _divide_up(planes * tiles, tasks_per_grab), keeps_wide)


def backward_plan(
    of: Sizes, lanes: int, row_bytes: int, d_bias: Sequence[int] | None
) -> BackwardPlan:
    """A task is a head of K and V, one chunk of its keys, or all heads that share a bias gradient.

    A bias that several heads or batch elements share has one gradient, of the sizes `d_bias`: the
    same task takes them all, one after another. Keys are divided where heads alone would leave
    threads idle, and where the sums of dK and dV, `row_bytes` a key, outgrow a core's cache, but
    not if all of them share a bias.
    """
    tile = tile_queries(of.query_len, lanes)
    batch_tasks = 1 if d_bias is not None and d_bias[0] == 1 else of.batch
    head_tasks = 1 if d_bias is not None and d_bias[1] == 1 else of.key_heads
    tasks, blocks = batch_tasks * head_tasks, _divide_up(of.key_len, BLOCK_KEYS)
    threads = thread_count(tasks * blocks)
    even = tasks == 0 or tasks >= 4 * threads or tasks % threads == 0
    # A chunk of several blocks reads its queries less often; four tasks a thread even out.
    chunk_blocks = blocks if even else min(4, max(1, tasks * blocks // (4 * threads)))
    block_bytes = BLOCK_KEYS * row_bytes
    if blocks * block_bytes > 3 * CACHE_BYTES:
        chunk_blocks = min(chunk_blocks, max(1, CACHE_BYTES // block_bytes))
    chunk_tasks = 1
    if blocks < 2 or chunk_blocks == blocks or (d_bias is not None and d_bias[3] == 1):
        chunk_blocks = max(1, blocks)
    else:
        chunk_tasks = _divide_up(blocks, chunk_blocks)
    tasks_per_grab = 1
    if chunk_tasks == 1 and tasks == of.batch * of.key_heads:
        tasks_per_grab = max(1, heads_at_once(tasks, max(of.query_len, of.key_len)))
    return BackwardPlan(
        tile,
        batch_tasks,
        head_tasks,
        chunk_tasks,
        chunk_blocks * BLOCK_KEYS,
        tasks_per_grab,
        _divide_up(tasks * chunk_tasks, tasks_per_grab),
    )


def bias_gradient_kind(of: Sizes, d_bias: Sequence[int], of_computed_type: bool) -> int:
    """What becomes of an element's gradient where the bias's gradient has the sizes `d_bias`."""
    in_tiles = d_bias[2] == of.query_len and d_bias[3] == of.key_len
    if in_tiles and d_bias[0] == of.batch and d_bias[1] == of.heads:
        return BIAS_GRAD_STORE
    return BIAS_GRAD_SUM if in_tiles and of_computed_type else BIAS_GRAD_SUM_WIDE


def tile_queries(query_len: int, lanes: int) -> int:
    """Queries of a tile: as many as the registers hold."""
    return min(TILE_VECTORS * lanes, max(1, _divide_up(query_len, lanes)) * lanes)


def _forward_work(of: Sizes, tile: int, lanes: int, threads: int) -> int:
    """The busiest thread's queries, times `threads`; a tile costs as much as `lanes` more."""
    tasks = of.batch * of.heads * _divide_up(of.query_len, tile)
    if tasks <= threads or tasks % threads != 0:
        return _divide_up(tasks, threads) * (tile + lanes) * threads
    whole, rest = divmod(of.query_len, tile)
    last = _divide_up(rest, lanes) * lanes + lanes if rest > 0 else 0
    return of.batch * of.heads * (whole * (tile + lanes) + last)


def heads_at_once(heads: int, length: int) -> int:
    """Heads that a thread takes at once: several short ones, so that one can ask memory for the
    next. Long heads are tiles that any thread may take."""
    return min(8, heads // (8 * thread_count(heads))) if length <= SHORT_HEAD else 0


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)
