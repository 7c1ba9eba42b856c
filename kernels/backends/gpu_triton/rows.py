"""How the row-wise kernels share rows among programs: functions of the shape, not of the GPU.

A program has a tile of whole rows in its registers, where one row fits. Longer rows are taken in
blocks of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...ops.layout import statistics_dtype

# Bytes of a tile in the dtype of the statistics, 64 a thread: a few wide loads in flight in each.
_TILE_BYTES = 8 << 10
_BLOCK_BYTES = 16 << 10
_WARP_BYTES = 2 << 10
_MAX_WARPS = 16
# The longest row kept in registers. The backward pass keeps two inputs and two sums of that size;
# in float64 its arithmetic takes more of them than there are.
_FORWARD_ROW_BYTES = 64 << 10
_BACKWARD_ROW_BYTES = {torch.float32: 32 << 10, torch.float64: 16 << 10}
# Shared memory for the tiles that the backward pass reads ahead; GPUs from sm_80 on have 99 KiB.
_AHEAD_BYTES = 96 << 10
# Chunks of rows, each summed by one program: two programs for each of an H100's 132
# multiprocessors, and up to four times as many where there are rows enough.
_CHUNKS = 264
_CHUNK_ROWS = 64
_MIN_CHUNK_ROWS = 16


class Tile(NamedTuple):
    """(rows, columns) of a tile, both powers of two, and the warps that hold it."""

    rows: int
    columns: int
    warps: int


def forward_tile(columns: int, dtype: torch.dtype) -> Tile:
    return _tile(columns, dtype, _FORWARD_ROW_BYTES)


def backward_tile(columns: int, dtype: torch.dtype) -> Tile:
    return _tile(columns, dtype, _BACKWARD_ROW_BYTES[statistics_dtype(dtype)])


def block_tile(columns: int, dtype: torch.dtype) -> Tile:
    """Of a kernel that goes over its rows several times, in blocks of columns."""
    return _tile(columns, dtype, _BLOCK_BYTES)


def _tile(columns: int, dtype: torch.dtype, row_bytes: int) -> Tile:
    itemsize = statistics_dtype(dtype).itemsize
    # at least 16 columns: dropout takes them in fours, and a vector is up to eight
    width = max(16, 1 << (columns - 1).bit_length())
    if width * itemsize > row_bytes:
        width = _BLOCK_BYTES // itemsize
    height = max(1, _TILE_BYTES // (width * itemsize))
    return Tile(height, width, min(_MAX_WARPS, height * width * itemsize // _WARP_BYTES))


def chunk_rows(rows: int, tile: Tile) -> int:
    """The rows that a program sums into one partial gradient: whole tiles.

    A chunk costs two rows of sums to write and to read again, so it should have many; but there
    should be chunks for all multiprocessors.
    """
    chunks = _CHUNKS * max(1, min(4, rows // (_CHUNKS * _CHUNK_ROWS)))
    wanted = max(_MIN_CHUNK_ROWS, -(-rows // chunks))
    return -(-wanted // tile.rows) * tile.rows


def stages(tile: Tile, dtype: torch.dtype, inputs: int) -> int:
    """Pipeline stages: the tiles of all inputs that are loading or in use at a time.

    In float64 arithmetic, not memory, is the limit.
    """
    ahead = 2 * inputs * tile.rows * tile.columns * dtype.itemsize
    return 3 if ahead <= _AHEAD_BYTES and dtype != torch.float64 else 2
