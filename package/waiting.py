"""How threads wait for each other, and how many there are: settled before a command loads torch.

OpenMP's threads spin at every barrier, for milliseconds, before they sleep. Where other processes
want the same CPUs, a thread that spins takes the time of the one that it waits for, and a step with
hundreds of barriers becomes ten times as slow. A spin of a tenth of a millisecond spans the gaps
between two operations, and where others run from the start the threads do not spin at all.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

SPINS = "5000"  # of GOMP_SPINCOUNT: some 0.1 ms
_POLICY, _SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
_SAMPLES, _APART = 5, 0.01  # seconds
_COMMANDS = ("rowmax.transformer",)


def settle_for(started: list[str]) -> None:
    """`settle`, where Python was started, with these arguments, for a command that wants it."""
    at = started.index("-m") + 1 if "-m" in started else len(started)
    if started[at : at + 1] in [[name] for name in _COMMANDS]:
        settle(os.environ, others_running(), os.cpu_count() or 1)


def settle(environment: MutableMapping[str, str], others: int, cpus: int) -> None:
    """Choose for OpenMP, which reads the environment when torch is loaded; what is set stays.

    ``others``: processes that run at the moment, of which the machine has ``cpus`` for all.
    """
    if _POLICY in environment or _SPINS in environment:
        return
    if others + usable_cpus() > cpus:
        environment[_POLICY] = "passive"
    else:
        environment[_SPINS] = SPINS


def chosen(environment: MutableMapping[str, str]) -> str:
    """What the threads do, in words."""
    if environment.get(_POLICY, "").lower() == "passive":
        return f"waiting without spinning ({_POLICY}=passive)"
    if _SPINS in environment:
        return f"spinning briefly where they wait ({_SPINS}={environment[_SPINS]})"
    return "waiting as OpenMP has it"


def others_running(stat: Path = Path("/proc/stat")) -> int:
    """Threads of the machine that run or want to, this one left out; 0 where that is not told."""
    found = []
    try:
        for sample in range(_SAMPLES):
            time.sleep(_APART if sample else 0)
            lines = dict(line.split(" ", 1) for line in stat.read_text("ascii").splitlines())
            found.append(int(lines["procs_running"]) - 1)
    except (OSError, KeyError, ValueError):
        return 0
    return sorted(found)[len(found) // 2]


def usable_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process may use: of its affinity, and of its cgroups' quotas."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    return max(1, min([cpus, *(math.ceil(quota) for quota in _quotas(root, own))]))


def _quotas(root: Path, own: Path) -> list[float]:
    """CPUs of each quota on the way from the root to this process's cgroups, of either version."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / controllers / place.strip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(root):
                break
            for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
                try:
                    quota, period = " ".join((each / name).read_text() for name in names).split()
                    found.append(int(quota) / int(period))
                except (OSError, ValueError):  # not there, or without a limit
                    continue
    return [quota for quota in found if quota > 0]
