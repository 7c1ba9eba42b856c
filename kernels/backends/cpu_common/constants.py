"""The numbers that both CPU backends compute with, written down once.

Numba's kernels import them; the build of the C++ extension makes a header of every public name here
(`csrc/write_headers.py`). So this module imports nothing but the standard library.
"""

from __future__ import annotations

import math

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# A tensor's type in memory: the one computed in, or a half type that is widened to float32.
ITEM_COMPUTED = 0
ITEM_BFLOAT16 = 1
ITEM_FLOAT16 = 2
# What becomes of an element of a block of the bias gradient. It is one pair's and stored, in the
# type computed in or a half type; or part of a sum, in the type computed in or in float64.
BIAS_GRAD_STORE = 0
BIAS_GRAD_SUM = 1
BIAS_GRAD_SUM_WIDE = 2

# Keys whose scores are in the scratch at once; blocks start at multiples of it.
BLOCK_KEYS = 128
# A band bound that no position reaches; far from overflow when a position is added.
NO_BOUND = 2**40
# Queries and keys of a head that is asked of memory as a whole.
SHORT_HEAD = 256
# Decoding: keys of a task, few enough to spread, many enough that merging costs nothing; the
# queries of a head, and the rows of a head of K and V, up to which the keys lie in the lanes.
CHUNK_KEYS = 256
MAX_DECODE_QUERIES = 8
MAX_DECODE_ROWS = 128
# Of the second-level cache, what the sums of a backward task may fill; dividing them pays from
# three times as much on.
CACHE_BYTES = 1 << 20
# Of K and V of a half type, what a thread keeps widened while tile after tile of a head reads it.
MAX_WIDE_BYTES = 4 << 20

# 2^f on [-1/2, 1/2], Chebyshev fits, lowest power first: absolute errors 2e-9 and 4e-20.
EXP2_FLOAT = (
    1.0,
    0.6931472067028326,
    0.24022650922288757,
    0.05550327226670302,
    0.009618056678524637,
    0.0013400428177615838,
    0.0001546144469856913,
)
EXP2_DOUBLE = (
    1.0,
    0.6931471805599453,
    0.24022650695910072,
    0.0555041086648217,
    0.009618129107628484,
    0.0013333558146390353,
    0.00015403530393362755,
    1.5252733856293466e-05,
    1.3215486815999978e-06,
    1.0178051192960649e-07,
    7.054894386348348e-09,
    4.456675341049206e-10,
    2.5733568308756892e-11,
)


def _tanh_series(terms: int) -> tuple[float, ...]:
    """tanh(x) = sum of c[n] * x^(2n + 1), from tanh' = 1 - tanh^2."""
    c = [1.0]
    for n in range(1, terms):
        c.append(-sum(c[m] * c[n - 1 - m] for m in range(n)) / (2 * n + 1))
    return tuple(c)


# Below |x| = 1/4, where 1 - e^-2|x| would cancel: the next term is below half an ulp.
TANH_FLOAT = _tanh_series(6)
TANH_DOUBLE = _tanh_series(12)
# log2(m) = 2 / ln 2 * atanh(s), s = (m - 1) / (m + 1), for m in [1/sqrt 2, sqrt 2]: |s| < 0.1716
LOG2_SERIES = tuple(2.0 / math.log(2.0) / (2 * n + 1) for n in range(11))

# Philox4x32-10 (Salmon et al. 2011), and the fourth counter word of a norm's dropout.
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
NORM_STREAM = 0x6E6F726D

# From so many bytes on a result's memory is asked for in huge pages: the largest block that glibc
# keeps when it is freed (its mmap threshold grows to this). Smaller results come from kept memory,
# which has its pages already: advice would only make it fault anew.
ADVISED_BYTES = 32 << 20
# Elements that a task of a row-wise kernel takes at least: enough to pay for waking a thread.
TASK_ELEMENTS = 16384
# Columns of a norm whose dropout is drawn at a time: few enough to stay in the first cache.
FACTOR_BLOCK = 256
# From so many columns on a norm's parameters don't stay in the first cache: rows are taken
# together, and the parameters read once for all. Below, one row after another is a longer stream.
GROUP = 4
GROUPED_COLUMNS = 1536
# Vectors whose mean stands for a row's, and how much of the square may be the shift's.
NEAR_VECTORS = 4
FAR = 2.0
