"""Commands settle how OpenMP's threads wait before torch loads, and how many there are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rowmax import console, waiting

from ..processes import printed


def openmp_settings(tmp_path, module: str, **given: str) -> dict[str, str]:
    """What torch's OpenMP says that it goes by, in a command that was started with these."""
    if not sys.platform.startswith("linux"):
        pytest.skip("GNU's OpenMP alone tells")
    kept = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    run = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        env={**kept, "OMP_DISPLAY_ENV": "verbose", **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    words = (line.split("=", 1) for line in run.stderr.splitlines() if "=" in line)
    settings = {name.strip(): value.strip().strip("'") for name, value in words}
    if "GOMP_SPINCOUNT" not in settings:
        pytest.skip("this torch has another OpenMP than GNU's")
    return settings


def test_a_command_settles_it_before_openmp_is_loaded(tmp_path):
    settings = openmp_settings(tmp_path, "rowmax.transformer")
    assert settings["GOMP_SPINCOUNT"] in ("0", waiting.SPINS)  # by what else runs here


def test_what_a_user_set_stays(tmp_path):
    settings = openmp_settings(tmp_path, "rowmax.transformer", GOMP_SPINCOUNT="77")
    assert settings["GOMP_SPINCOUNT"] == "77"


def test_an_import_changes_nothing(tmp_path):
    before = dict(os.environ)
    code = "import os, rowmax.transformer; print({**os.environ} == " + repr(before) + ")"
    assert printed("-c", code, cwd=tmp_path) == "True\n"


@pytest.mark.parametrize(
    "given, others, cpus, expected",
    [
        ({}, 0, 4, {"GOMP_SPINCOUNT": waiting.SPINS}),
        ({}, 2, 4, {"GOMP_SPINCOUNT": waiting.SPINS}),  # as many CPUs are left as are ours
        ({}, 3, 4, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, 9, 4, {}),
        ({"GOMP_SPINCOUNT": "7"}, 9, 4, {}),
    ],
)
def test_what_is_settled(monkeypatch, given, others, cpus, expected):
    monkeypatch.setattr(waiting, "usable_cpus", lambda: 2)
    environment = dict(given)
    waiting.settle(environment, others, cpus)
    assert environment == {**given, **expected}


def test_how_it_is_told():
    assert "without spinning" in waiting.chosen({"OMP_WAIT_POLICY": "PASSIVE"})
    assert "GOMP_SPINCOUNT=5000" in waiting.chosen({"GOMP_SPINCOUNT": "5000"})
    assert waiting.chosen({}) == "waiting as OpenMP has it"


def test_what_else_runs(tmp_path):
    (tmp_path / "stat").write_text("cpu  1 2 3\nprocs_running 4\nprocs_blocked 0\n")
    assert waiting.others_running(tmp_path / "stat") == 3
    assert waiting.others_running(tmp_path / "none") == 0


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("0::/\n", {}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000"}, 1),
        (
            "4:cpu,cpuacct:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": ""},
            8,
        ),
        (
            "4:cpu,cpuacct:/a\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            8,
        ),
    ],
)
def test_quotas_of_cgroups(tmp_path, monkeypatch, own, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert waiting.usable_cpus(tmp_path / "root", tmp_path / "own") == expected


def test_threads_stay_within_the_cpus(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(console, "usable_cpus", lambda: 2)
        console.set_threads(None)
        assert torch.get_num_threads() == 2
        console.set_threads(5)
        assert torch.get_num_threads() == 5
        assert console.threads_line().startswith("5 threads of 2 CPUs, ")
    finally:
        torch.set_num_threads(before)
