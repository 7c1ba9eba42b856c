"""Settings for all tests, made before anything that reads them is loaded."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from time import time

# OpenMP's threads spin while they wait, and so starve the other test process (or whatever else the
# machine does). The runtime reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# NumPy's products in Triton's interpreter are too small for threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A second process that compiles Numba's kernels would take the other test process's core.
os.environ.setdefault("ROWMAX_COMPILE_AHEAD", "0")
# Inductor keeps compiled graphs on disk, without the schemas of the operators in them.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import hypothesis
import pytest
import torch

# `python -m pytest` puts the root first on the path, where `kernels/` would pass for Hugging Face's
# package of that name, and `import transformers` would take it.
sys.path[:] = [at for at in sys.path if Path(at).resolve() != Path(__file__).resolve().parents[1]]

# Without a GPU the Triton kernels run in Triton's interpreter, which Triton decides at its import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What compiles Triton kernels for absent GPUs needs a process of its own: `make compile`.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["ahead_of_time"]

# Seconds since the epoch after which no test is begun, for runs that are ended soon after.
STOP_AT = float(os.environ.get("ROWMAX_STOP_AT", "inf"))

hypothesis.settings.register_profile(
    "rowmax", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("rowmax")


def pytest_runtest_setup() -> None:
    if time() > STOP_AT:
        pytest.skip("no time is left")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A run that may be ended tells of each failure at once; else they come at the end."""
    if report.failed and math.isfinite(STOP_AT):
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What read beside its tensors leaves the process without the GPU, and each later test would
    fail: so the process ends here, with its report, and xdist begins another one.
    """
    report = yield
    if report.failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
            if hasattr(item.config, "workerinput"):
                os._exit(1)
            pytest.exit(f"{item.nodeid} lost the GPU: {error}", returncode=1)
    return report


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
