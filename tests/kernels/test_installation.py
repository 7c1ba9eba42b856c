"""What works without what: optional packages missing, refusals by name, and the report."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import pytest
import torch

from rowmax.kernels import explain, layer_norm
from rowmax.kernels.backends import dispatch

from ..processes import printed
from .backends import BACKENDS

OPTIONAL = {"numba": "numba", "native": "rowmax.kernels._C", "triton": "triton"}


def run_without(packages: list[str], script: str) -> str:
    """What `script` prints in a fresh interpreter in which `packages` can't be imported."""
    blocked = "".join(f"sys.modules[{package!r}] = None\n" for package in packages)
    return printed("-c", f"import sys\n{blocked}{script}")


ATTEND = """
import warnings
import torch
from rowmax.kernels import attention, explain
from rowmax.kernels.backends.dispatch import installation

assert not {"numba", "llvmlite"} & {name for name, module in sys.modules.items() if module}
q = torch.randn(1, 2, 5, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        out = attention(q, q, q)
    out.sum().backward()
assert torch.equal(out, attention(q, q, q, backend="reference"))
for name in MISSING:
    reason = installation()[name]
    assert reason, name
    try:
        attention(q, q, q, backend=name)
    except RuntimeError as error:
        assert f"backend {name!r} can't do this: {reason}" in str(error), error
    else:
        raise AssertionError(f"{name} did not refuse")
for warning in caught:
    print(warning.category.__name__, warning.message)
print(explain(q, q, q))
print(installation())
"""


def test_without_fused_kernels_auto_takes_the_reference_and_says_so_once() -> None:
    missing = ["numba", "native", "triton"]
    blocked = [OPTIONAL[name] for name in missing]
    printed = run_without(blocked, f"MISSING = {missing}\n{ATTEND}").splitlines()
    assert printed[0].startswith("RuntimeWarning rowmax: attention runs on the unfused reference")
    assert "numba: Numba is not installed (pip install numba)" in printed[0]
    assert "native: " in printed[0]
    assert printed[1] == "attention on cpu, torch.float32: reference", "warned more than once"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others can not lack them")
@pytest.mark.parametrize(
    "variable, value, why",
    [
        ("NUMBA_CPU_NAME", "generic", "Numba compiles for a processor without fma, f16c"),
        ("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT keeps Numba from compiling"),
    ],
)
def test_numba_is_refused_where_kernels_would_not_work(variable: str, value: str, why: str) -> None:
    """They would call fmaf of C, for instance, at the address 0."""
    pytest.importorskip("numba")
    script = f"""
import os
os.environ["{variable}"] = "{value}"
import torch
from rowmax.kernels import attention
from rowmax.kernels.backends import dispatch

q = torch.ones(1, 1, 4, 8)
print(dispatch.unavailable("numba"))
try:
    attention(q, q, q, backend="numba")
except RuntimeError as error:
    assert "backend 'numba' can't do this: {why}" in str(error), error
    print(attention(q, q, q).sum().item())
"""
    assert run_without([], script) == f"{why}\n32.0\n"


FIRST_CALLS = """
import warnings
import torch
from rowmax.kernels import MissingBackendWarning, attention, explain, layer_norm
from rowmax.kernels.backends import cpu_native, dispatch

cpu_native._REASON = REASON
q = torch.ones(1, 2, 5, 8)
explain(q, q, q)
dispatch.installation()
attention(q, q, q, backend="reference")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", MissingBackendWarning)
    for _ in range(2):
        layer_norm(q)
        attention(q, q, q)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


@pytest.mark.parametrize(
    "reason, told",
    [("no C++ compiler", True), ("ROWMAX_EXTENSION=skip", False), (None, True)],
    ids=["compiler", "skipped", "unbuilt"],
)
def test_auto_says_once_that_the_extension_is_missing(
    reason: str | None, told: bool, tmp_path: Path
) -> None:
    pytest.importorskip("numba")
    path = tmp_path / "missing_extension.txt"
    if reason is not None:
        path.write_text(f"{reason}\n")
    script = f"from pathlib import Path\nREASON = Path({str(path)!r})\n{FIRST_CALLS}"
    why = "" if reason is None else f" ({reason})"
    expected = (
        "MissingBackendWarning rowmax: backend 'auto' takes numba on cpu, because native: the C++ "
        f"extension is not built{why}; with GCC >= 12 and Python's headers, "
        "`pip install --no-deps --force-reinstall --no-cache-dir .` in the checkout builds it\n"
    )
    assert run_without([OPTIONAL["native"]], script) == (expected if told else "")


@pytest.mark.parametrize("missing", ["numba", "native", "triton"])
def test_without_the_others_the_kernels_remain(missing: str) -> None:
    script = """
import torch
from rowmax.kernels import explain, layer_norm
from rowmax.kernels.backends.dispatch import installation

q = torch.randn(1, 2, 5, 8)
print(explain(q, q, q))
print(*(name for name, reason in installation().items() if reason is None))
"""
    lines = run_without([OPTIONAL[missing]], script).splitlines()
    remaining = [name for name in BACKENDS if name != missing]
    assert lines[-1].split() == remaining
    first = next(name for name in dispatch.PREFERENCE["cpu"] if name in remaining)
    assert lines[0] == f"attention on cpu, torch.float32: {first}"


def test_importing_loads_no_compiler() -> None:
    script = "import rowmax.kernels\nprint(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = set(run_without([], script).split())
    assert not loaded & {"numba", "llvmlite", "triton"}


def test_explain_gives_the_rule_and_the_reasons() -> None:
    q = torch.zeros(1, 2, 5, 8)
    text = explain(q, q, q, softcap=2.0)
    assert text.startswith("attention on cpu, torch.float32: ")
    taken = text.splitlines()[0].rsplit(" ", 1)[1]
    for name in dispatch.PREFERENCE["cpu"]:
        if name == taken:
            break
        assert f"  {name}: passed over: " in text
    assert f"  {taken}: taken, the first in the order of preference" in text


def test_auto_is_silent_where_a_fused_kernel_runs() -> None:
    x = torch.randn(4, 8)
    if dispatch.installation()["numba"] is None or dispatch.installation()["native"] is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(layer_norm(x), layer_norm(x, backend="reference"))


def test_the_report() -> None:
    report = printed("-m", "rowmax.kernels")
    lines = dict(line.split(maxsplit=1) for line in report.splitlines() if " " in line)
    assert lines["torch"] == torch.__version__
    assert lines.keys() >= {"rowmax", "numba", "triton", "python", "cpu", "threads", "gpu"}
    for name, reason in dispatch.installation().items():
        expected = "works" if reason is None else f"does not work here: {reason}"
        assert f"  {name:<10} {expected}" in report


def test_the_report_without_anything_optional() -> None:
    script = "import runpy\nrunpy.run_module('rowmax.kernels', run_name='__main__')"
    printed = run_without(list(OPTIONAL.values()), script)
    assert "numba      does not work here: Numba is not installed (pip install numba)" in printed
    assert "native     does not work here: the C++ extension is not built" in printed
    assert "reference  works" in printed
