"""What a launch tells a CPU kernel: the one definition of each record, field by field.

Numba's kernels and launches take the fields from here (`cpu_numba/call.py`), and the build of the
C++ extension makes structs of the same names, with these comments (`csrc/write_headers.py`). So
this module imports nothing but the standard library.

A field is an address, an integer, a flag or a real number; an address names what it points to as
C++ does, and `void` is a tensor whose type is known at run time. Strides count elements; a
broadcast dimension has stride 0, an absent tensor address 0. T is the type that a kernel computes
in: float, or double for tensors of double.
"""

from __future__ import annotations

from typing import NamedTuple

INTEGER, FLAG, REAL = "int64_t", "bool", "double"


class Field(NamedTuple):
    """One field; neighbours with one comment are described by it together."""

    name: str
    type: str  # as C++ writes it
    comment: str = ""
    shared: bool = False  # the address lies in memory that the threads of a call share


class Record(NamedTuple):
    """The fields of a C++ struct, by the passes whose kernels read them; `all` is every pass."""

    name: str
    comment: str
    passes: dict[str, tuple[Field, ...]]

    def fields(self, of: str) -> tuple[Field, ...]:
        """What the kernel of the pass `of` is told."""
        return (*self.passes["all"], *self.passes[of])

    def every_field(self) -> tuple[Field, ...]:
        return tuple(field for fields in self.passes.values() for field in fields)


def fields(kind: str, names: str, comment: str = "") -> tuple[Field, ...]:
    """Fields of one kind, named in one string."""
    return tuple(Field(name, kind, comment) for name in names.split())


def read(names: str, comment: str = "", item: str = "void") -> tuple[Field, ...]:
    """Addresses of tensors that the kernel reads."""
    return fields(f"const {item}*", names, comment)


def written(names: str, comment: str = "", item: str = "void") -> tuple[Field, ...]:
    """Addresses of tensors that the kernel writes."""
    return fields(f"{item}*", names, comment)


def strides(names: str, dimensions: str) -> tuple[Field, ...]:
    """Of each tensor its stride along each of the dimensions."""
    return tuple(
        Field(f"{name}_{dimension}", INTEGER, f"strides of {name}")
        for name in names.split()
        for dimension in dimensions.split()
    )


def shared(name: str, comment: str, item: str) -> Field:
    """An address in memory that lasts as long as the call."""
    return Field(name, f"{item}*", comment, shared=True)


_COUNTERS = written("work_counter", "eight counters that start at zero", "int64_t")
_DROPOUT = (
    *fields(FLAG, "dropout"),
    *fields(INTEGER, "threshold", "words of Philox below it drop"),
    *fields(INTEGER, "seed", "Philox's key"),
    *fields(REAL, "keep_scale", "1 / (1 - p), or 0 where p is 1"),
)
_MASK = (
    *fields(INTEGER, "band_lower band_upper", "bounds on j - i"),
    *read("band", "(B, 2), bounds as well", "int64_t"),
    *read("prefix_lengths", "(B,): keys before it have no upper bound", "int64_t"),
    *read("key_lengths query_lengths", "(B,)", "int64_t"),
    *read("query_documents", "(B, Lq)", "int64_t"),
    *read("key_documents", "(B, Lk)", "int64_t"),
    *read(
        "dense", "(B, H, Lq, Lk), True = may attend; softmax: stride 1 or 0 for the keys", "uint8_t"
    ),
    *strides("dense", "batch head row column"),
)

# (A plan that is run again sets the first addresses: see `cpu_numba/call.py`.)
ATTENTION = Record(
    "AttentionCall",
    "Attention of tensors whose rows are contiguous.",
    {
        "all": (
            *_COUNTERS,
            *read("query", "(B, Hq, Lq, D)"),
            *read("key", "(B, Hkv, Lk, D)"),
            *read("value", "(B, Hkv, Lk, Dv)"),
            *written("out", "(B, Hq, Lq, Dv)"),
            *written(
                "lse",
                "(B, Hq, query_rows), contiguous, double; of the forward pass float where the "
                "tensors are of a half type, or absent",
            ),
            *strides("query key value out", "batch head row"),
            *fields(INTEGER, "item_type", "of q, k, v, out and their gradients: ITEM_..."),
            *fields(INTEGER, "batch heads key_heads query_len key_len head_dim value_dim"),
            *fields(INTEGER, "tile", "queries a tile has: a multiple of the lanes"),
            *fields(INTEGER, "tasks_per_grab", "tasks that a thread takes at once"),
            *fields(
                INTEGER,
                "max_decode_queries",
                "sequences of no more queries are for the decoding kernel, not for tiles",
            ),
            *fields(INTEGER, "query_rows", "rows of q that a head has in memory"),
            *read("query_starts key_starts", "packed sequences: (B + 1,)", "int64_t"),
            *_MASK,
            *strides("query_documents key_documents", "batch"),
            *read("bias", "(B, Hq, Lq, Lk)"),
            *strides("bias", "batch head row column"),
            *fields(INTEGER, "bias_item_type"),
            *read("alibi", "(B, Hq)", "double"),
            *strides("alibi", "batch"),
            *read("alibi_offset", "(B,)", "int64_t"),
            *strides("alibi_offset", "batch"),
            *read("sinks", "(Hq,)", "double"),
            *_DROPOUT,
            *fields(INTEGER, "batch_start", "dropout counts batch elements from here"),
            *fields(
                REAL,
                "scale cap",
                "the scores' factor times log2 e, and 0; with a softcap c > 0 the factor / c, and "
                "c * log2 e",
            ),
        ),
        "forward": fields(
            FLAG, "keeps_wide", "blocks of K and V are widened once for all tiles of a head"
        ),
        "decode": (
            *fields(INTEGER, "chunks", "chunks of CHUNK_KEYS keys that a head has, at most"),
            shared(
                "chunks_done",
                "(B, Hkv) zeros: chunks of a head that are done; absent where it is one",
                "int64_t",
            ),
            shared("partials", "(B, Hkv, chunks, rows, .) T: m, l and O of each chunk", "void"),
        ),
        "backward": (
            *fields(REAL, "score_scale", "the scores' factor"),
            *read("grad_out", "(B, Hq, Lq, Dv)"),
            *strides("grad_out", "batch head row"),
            *read("grad_lse", "(B, Hq, query_rows), contiguous, or absent", "double"),
            *written("d_query d_key d_value", "as query, key and value"),
            *strides("d_query d_key d_value", "batch head row"),
            *written("d_bias", "zeros, as bias"),
            *strides("d_bias", "batch head row column"),
            *fields(INTEGER, "d_bias_kind", "what becomes of an element's gradient: BIAS_GRAD_..."),
            *fields(INTEGER, "d_bias_item_type", "with BIAS_GRAD_STORE"),
            *written(
                "delta",
                "(B, Hq, query_rows): written where the sinks' gradient needs it, or absent",
                "double",
            ),
            *fields(
                INTEGER,
                "batch_tasks head_tasks",
                "1 where one task takes all batch elements, or all heads",
            ),
            *fields(
                INTEGER,
                "chunk_tasks chunk_keys",
                "chunks of keys, a multiple of BLOCK_KEYS; 1 and all keys",
            ),
            shared(
                "dq_semaphore",
                "(B, Hq, tiles) zeros, with several chunks: those that are in the sum of dQ",
                "int64_t",
            ),
            shared(
                "dq_accumulator",
                "(B, Hq, tiles, D, tile) T, with several chunks: the sum until the last is in it",
                "void",
            ),
        ),
    },
)

NORM = Record(
    "NormCall",
    "Layer norm, RMS norm and add-and-norm.",
    {
        "all": (
            *_COUNTERS,
            *read("x", "(rows, columns): backward, the rows that were normalised"),
            *strides("x", "row"),
            *read("weight", "(columns,) T"),
            *written("mean", "(rows,) T; neither written nor read unless `subtract_mean`"),
            *written("rstd", "(rows,) T"),
            *fields(INTEGER, "rows columns"),
            *fields(FLAG, "subtract_mean"),
            *_DROPOUT,
        ),
        "forward": (
            *read("residual", "as x, or absent: then x itself is normalised"),
            *strides("residual", "row"),
            *read("bias", "(columns,) T"),
            *written("y", "(rows, columns), contiguous"),
            *written("total", "as y: residual + dropout(x); unused without a residual"),
            *fields(INTEGER, "task_rows"),
            *fields(REAL, "eps"),
        ),
        "backward": (
            *read("grad_y", "(rows, columns)"),
            *read("grad_total", "as grad_y, or absent"),
            *strides("grad_y grad_total", "row"),
            *written("d_total", "(rows, columns), contiguous"),
            *written("d_x", "as d_total, or absent"),
            shared(
                "partials",
                "(chunks, 2, columns in whole vectors) T: each chunk's d_weight and d_bias",
                "void",
            ),
            *written("d_weight d_bias", "(columns,) T, or absent"),
            *fields(INTEGER, "chunks chunk_rows"),
        ),
    },
)

SOFTMAX = Record(
    "SoftmaxCall",
    "Masked softmax.",
    {
        "all": (
            *_COUNTERS,
            *written("weights", "(B, H, Lq, Lk): written forward, contiguous; read backward"),
            *fields(INTEGER, "keys rows task_rows"),
            *fields(REAL, "scale"),
        ),
        "forward": (
            *read("scores", "(B, H, Lq, Lk)"),
            *strides("scores", "batch head query"),
            *fields(INTEGER, "heads queries"),
            *_MASK,
        ),
        "backward": (
            *read("grad", "(rows, keys)"),
            *strides("weights grad", "row"),
            *written("d_scores", "(rows, keys), contiguous"),
        ),
    },
)

CROSS_ENTROPY = Record(
    "CrossEntropyCall",
    "Cross entropy of rows of logits, and its gradient in their place.",
    {
        "all": (
            *_COUNTERS,
            *written("logits", "(rows, columns): read; then p - q, with `with_gradient`"),
            *strides("logits", "row"),
            *read("target", "(rows,)", "int64_t"),
            *written("losses", "(rows,) T"),
            *fields(INTEGER, "rows columns task_rows"),
            *fields(INTEGER, "ignore_index", "of rows whose loss and gradient are 0"),
            *fields(FLAG, "with_gradient"),
            *fields(REAL, "label_smoothing"),
        ),
        "rows": (),
    },
)

RECORDS = (ATTENTION, NORM, SOFTMAX, CROSS_ENTROPY)
