"""The options of `python -m rowmax.bench speed`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .candidate.interface import OPS
from .candidate.options import FORMS, add_foreign_options
from .measure.cases import PARTS, PASSES, SUITES
from .options import listed
from .peers.candidates import ONLY_BY_NAME
from .render.markdown import add_markdown_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--suite",
        metavar="NAMES",
        help=f"comma-separated, of {listed(SUITES)}; default: those whose device is here",
    )
    command.add_argument(
        "--shape",
        metavar="SIZES",
        action="append",
        help="a shape of your own: 'batch,heads,length,head size' for attention, or "
        "'batch,heads,queries,keys,head size', with 32/8 for 32 heads that share 8 key heads; "
        "'rows,columns' for the norms; may be given more than once",
    )
    command.add_argument(
        "--shapes",
        metavar="FILE",
        type=Path,
        help="the calls that `record` noted, in place of suites, shapes, kinds, passes and dtypes; "
        "the end tells what they would save, by how often each came",
    )
    command.add_argument(
        "--kind",
        metavar="NAMES",
        help="only these kinds of call; for attention also any of "
        f"{listed(PARTS)}, joined by +: causal+padded+dropout",
    )
    command.add_argument(
        "--pass",
        dest="steps",
        metavar="NAMES",
        help=f"of {listed(PASSES)} (alone); default: on the CPU without the last",
    )
    command.add_argument(
        "--dtype", metavar="NAMES", help=f"of {listed(DTYPES)}; default: those of the suite"
    )
    command.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"only these peers; rowmax's own, {listed(ONLY_BY_NAME)}, only if named here",
    )
    command.add_argument(
        "--function",
        metavar="WHERE",
        help=f"an attention, norm or softmax of yours, in a column of its own: {FORMS}; it is "
        "examined before it is timed, called with other values each time, and some of the calls "
        "that were timed are judged",
    )
    command.add_argument(
        "--op", choices=OPS, help="what --function computes; default: as its name says"
    )
    add_foreign_options(command)
    command.add_argument(
        "--backend", default="auto", help="of rowmax.kernels; default: %(default)s"
    )
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument(
        "--seconds", type=float, help="to spend on timing each line; default: 4, quick: 1"
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds, fewer shapes, and no peer that is compiled by torch",
    )
    command.add_argument(
        "--shape-by-shape", action="store_true", help="all kinds of a shape before the next shape"
    )
    command.add_argument(
        "--stop-after", type=float, metavar="SECONDS", help="begin no further shape after this"
    )
    command.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        default=300.0,
        help="on a GPU, where each shape has a process of its own: end it then; default: 300",
    )
    command.add_argument(
        "--json", metavar="FILE", type=Path, help="write the results here too, line by line"
    )
    command.add_argument(
        "--csv", metavar="FILE", type=Path, help="append a line for each timing to this history"
    )
    command.add_argument(
        "--html", metavar="FILE", type=Path, help="write a self-contained page with charts"
    )
    add_markdown_options(command)
    command.add_argument(
        "--no-pin",
        action="store_true",
        help="leave the choice of CPUs to the system; by default the process keeps to one CPU a "
        "core, as many as it has threads, where there are more",
    )
    command.add_argument(
        "--memory",
        choices=("fresh", "kept"),
        default="fresh",
        help="of results on the CPU: as the C library's own settings have it, with the cost of "
        "fresh pages (default), or kept by the process from call to call",
    )
