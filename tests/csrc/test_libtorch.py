"""What the extension declares of torch, beside torch's own headers, and a torch that lacks it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.cpp_extension import include_paths

from ..processes import printed

ROOT = Path(__file__).resolve().parents[2]
# The program does not compile where a type is another one.
COMPARED = """
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/c/shim.h>
#include <type_traits>
#include "binding/libtorch.h"
#define SAME(name, ...) static_assert(std::is_same_v<decltype(::name), __VA_ARGS__>);
ROWMAX_LIBTORCH_FUNCTIONS(SAME)
static_assert(rowmax::kLibtorchVersion == TORCH_TARGET_VERSION);
static_assert(AOTI_TORCH_SUCCESS == 0);
"""


@pytest.fixture
def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler: {command[0]}")
    return command


def compile_text(compiler: list[str], text: str) -> subprocess.CompletedProcess[str]:
    folders = [str(ROOT / "csrc"), *include_paths()]
    return subprocess.run(
        [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", *(f"-I{f}" for f in folders), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_function_has_torchs_own_type(compiler: list[str]) -> None:
    done = compile_text(compiler, COMPARED)
    assert done.returncode == 0, done.stderr


def test_another_type_is_noticed(compiler: list[str]) -> None:
    wrong = "SAME(aoti_torch_get_numel, int32_t(AtenTensorOpaque*, int32_t*))"
    done = compile_text(compiler, COMPARED + wrong)
    assert "static assertion failed" in done.stderr


LOAD = """
import _ctypes, sys
import torch
torch._C.__file__ = {path}
from rowmax.kernels.backends.dispatch import unavailable
print(unavailable("native"))
"""


@pytest.mark.parametrize(
    "path, reason",
    [("_ctypes.__file__", "has no aoti_torch_"), ("'none.so'", "none.so is not loaded")],
)
def test_a_torch_without_the_functions_is_named(
    extension: ModuleType, path: str, reason: str
) -> None:
    output = printed("-c", LOAD.format(path=path))
    assert output.startswith("the C++ extension does not load with torch ")
    assert reason in output
