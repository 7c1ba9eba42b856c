"""The two CPU backends divide work alike: attention_plan.cpp beside attention_plan.py."""

from __future__ import annotations

import ctypes
import random
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from rowmax.kernels.backends import dispatch

if dispatch.unavailable("numba") is not None:
    pytest.skip(str(dispatch.unavailable("numba")), allow_module_level=True)

from rowmax.kernels.backends.cpu_numba import attention_plan
from rowmax.kernels.backends.cpu_numba.attention_plan import Sizes
from rowmax.kernels.backends.cpu_numba.gemm import TILE_VECTORS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
THREADS = """
#include <algorithm>
#include <cstdint>
namespace rowmax {
inline int64_t threads;
inline int64_t thread_count(int64_t tasks) { return tasks <= 1 ? 1 : std::min(threads, tasks); }
}
"""
# Sizes, vectors, lanes, row_bytes and threads; whether there is a bias gradient, of which sizes.
PROGRAM = """
#include "binding/threads.h"
#include "csrc/binding/attention_plan.cpp"
extern "C" void plan(const int64_t* in, const int64_t* d_bias, int64_t* out) {
  const rowmax::Sizes of{in[0], in[1], in[2], in[3], in[4]};
  rowmax::threads = in[8];
  *out++ = rowmax::max_decode_queries(of.heads, of.key_heads);
  const rowmax::DecodePlan decode = rowmax::decode_plan(of);
  for (const int64_t number : {decode.chunks, decode.tasks}) *out++ = number;
  const auto [forward_tile, per_grab, forward_grabs, keeps_wide] =
      rowmax::forward_plan(of, in[5], in[6], in[7]);
  for (const int64_t number : {forward_tile, per_grab, forward_grabs, int64_t{keeps_wide}})
    *out++ = number;
  const auto [tile, batch_tasks, head_tasks, chunk_tasks, chunk_keys, tasks_per_grab, grabs] =
      rowmax::backward_plan(of, in[5], in[6], in[7], d_bias);
  for (const int64_t number :
       {tile, batch_tasks, head_tasks, chunk_tasks, chunk_keys, tasks_per_grab, grabs})
    *out++ = number;
  for (const bool same : {false, true})
    *out++ = d_bias == nullptr ? 0 : rowmax::bias_gradient_kind(of, d_bias, same);
}
"""
NUMBERS = 16


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C++ plans, beside a `thread_count` that knows no torch."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed here")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "binding").mkdir()
    (folder / "binding" / "threads.h").write_text("#pragma once\n" + THREADS)
    (folder / "plan.cpp").write_text(PROGRAM)
    runpy.run_path(str(CSRC / "write_headers.py"))["write"](folder)
    built = folder / "plan.so"
    includes = [f"-I{path}" for path in (folder, CSRC, CSRC.parent)]
    files = ["-o", str(built), str(folder / "plan.cpp")]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *includes, *files], check=True)
    return ctypes.CDLL(str(built))


def test_plans_are_the_same(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for _ in range(2000):
        key_heads = draw.randint(1, 4)
        lengths = [draw.choice((1, 7, 64, 128, 129, 256, 257, 1000, 5000)) for _ in range(2)]
        of = Sizes(draw.randint(1, 40), key_heads * draw.randint(1, 20), key_heads, *lengths)
        lanes, row_bytes = draw.choice((4, 8, 16)), draw.choice((0, 64, 512, 2048))
        threads = draw.choice((1, 2, 7, 64))
        full = (of.batch, of.heads, of.query_len, of.key_len)
        d_bias = [draw.choice((size, 1)) for size in full] if draw.random() < 0.5 else None

        monkeypatch.setattr(
            attention_plan,
            "thread_count",
            lambda tasks, threads=threads: 1 if tasks <= 1 else min(threads, tasks),
        )
        expected = (
            attention_plan.max_decode_queries(of.heads, of.key_heads),
            *attention_plan.decode_plan(of),
            *attention_plan.forward_plan(of, lanes, row_bytes),
            *attention_plan.backward_plan(of, lanes, row_bytes, d_bias),
            *(
                0 if d_bias is None else attention_plan.bias_gradient_kind(of, d_bias, same)
                for same in (False, True)
            ),
        )
        found = (ctypes.c_int64 * NUMBERS)()
        given = (ctypes.c_int64 * 9)(*of, TILE_VECTORS, lanes, row_bytes, threads)
        library.plan(given, None if d_bias is None else (ctypes.c_int64 * 4)(*d_bias), found)
        assert tuple(found) == expected, (of, lanes, row_bytes, threads, d_bias)
