"""Several processes that train one model, each with a part of every batch.

Each process has all weights, moments and data. A batch's pairs are split by their tokens; each
process computes the mean loss of its own, times its share of the batch's target tokens and the
number of processes, so that the mean of the gradients, which DistributedDataParallel takes, is that
of the whole batch's mean loss: what one process would compute, to rounding. The first process alone
writes: the vocabulary, the checkpoints, what is told of progress.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..console import UsageError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

JOIN_SECONDS = 300.0
_LAUNCHED = ("RANK", "WORLD_SIZE")  # what torchrun gives every process, with those of _ADDRESS
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_FAILED = "failed"  # the key under which a process that fails tells why
_POLL_SECONDS = 0.05
_GLOOS_OWN = re.compile(r"^\[[^]]*\.cc:\d+\] |\. This is typically.*|\n.*", re.DOTALL)
# torch 2.13 renamed it.
_SENDS_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class WorkerLostError(Exception):
    """Another process ended, or can't be reached."""


@dataclass(frozen=True)
class Workers:
    """The processes that train together, and which of them this one is."""

    rank: int = 0
    count: int = 1
    store: Store | None = None  # where there are several
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    modules: list[DistributedDataParallel] = field(default_factory=list)
    terminated: threading.Event = field(default_factory=threading.Event)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, lengths: np.ndarray) -> np.ndarray:
        """Which pairs of a batch, of so many tokens each, are this process's; maybe none."""
        if self.count == 1:
            return np.arange(len(lengths))
        loads = [(0, rank) for rank in range(self.count)]
        mine = []
        for pair in np.argsort(-lengths, kind="stable"):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + int(lengths[pair]), rank))
            if rank == self.rank:
                mine.append(int(pair))
        return np.array(sorted(mine), dtype=np.int64)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes."""
        if self.count == 1:
            return module
        ids = None if self.device.type == "cpu" else [self.device]
        same: dict[str, Any] = {_SENDS_BUFFERS: False}  # the buffers are constant
        with self.told():
            self.modules.append(
                DistributedDataParallel(module, ids, gradient_as_bucket_view=True, **same)
            )
        return self.modules[-1]

    def leave(self) -> None:
        """End what `joined` began.

        What holds the group last must not be a reducer: its end waits, with Python's lock, for
        gloo's threads, which want that lock to let go of the tensors that they sent.
        """
        for module in self.modules:
            del module.logger, module.reducer
        dist.destroy_process_group()

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.told():
            dist.all_reduce(total)
        return list(total.tolist())

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        with self.told(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def share(self, key: str, value: str | None) -> str:
        """What the first process gives under this key, for which the others wait."""
        if self.store is None or self.first:
            assert value is not None
            if self.store is not None:
                self.store.set(key, value)
            return value
        with self.told():
            while not self.store.check([key]):
                self._listen()
                time.sleep(_POLL_SECONDS)
            return self.store.get(key).decode()

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """UsageError where this process was given other settings than the first one."""
        mine = json.loads(json.dumps(settings))
        first = json.loads(self.share("settings", json.dumps(settings)))
        for name, value in mine.items():
            if first[name] != value:
                raise UsageError(
                    f"process {self.rank} of {self.count} has {name} {value}, but process 0 has "
                    f"{first[name]}; start all with the same command and the same files"
                )

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Around what talks to the other processes: its failure is a WorkerLostError."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            self._listen()
            raise WorkerLostError(
                f"another process ended or is out of reach ({_GLOOS_OWN.sub('', str(error))})"
            ) from error

    def _listen(self) -> None:
        """WorkerLostError where another process told of its failure."""
        assert self.store is not None
        with contextlib.suppress(RuntimeError):  # the store may have gone with its process
            if self.store.check([_FAILED]):
                raise WorkerLostError(f"another process failed: {self.store.get(_FAILED).decode()}")

    def tell(self, error: BaseException) -> None:
        """Let the other processes know why this one ends."""
        if self.store is not None and not isinstance(error, WorkerLostError):
            with contextlib.suppress(RuntimeError):
                self.store.set(_FAILED, f"process {self.rank}: {error or type(error).__name__}")
            time.sleep(4 * _POLL_SECONDS)  # they hear of it before the store goes with this process


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun's variables have them."""
    if any(name not in os.environ for name in _LAUNCHED):
        return 0, 1
    rank, count = (_number(name) for name in _LAUNCHED)
    if not 0 <= rank < count:
        raise UsageError(f"RANK: expected 0 to WORLD_SIZE - 1, which is {count - 1}, got {rank}")
    return rank, count


def _number(name: str) -> int:
    text = os.environ[name]
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(
            f"{name}: expected a whole number, as torchrun sets, got {text}"
        ) from error


def device_of(device: torch.device) -> torch.device:
    """This process's own, where there are several on GPUs."""
    _, count = launched()
    if count == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise UsageError(f"--device {device}: each of {count} processes takes a GPU; give cuda")
    local = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: process {local} of this machine has no GPU, of which torch sees "
            f"{torch.cuda.device_count()}; start at most so many (--nproc-per-node)"
        )
    return torch.device(device.type, local)


@contextlib.contextmanager
def joined(device: torch.device, seconds: float = JOIN_SECONDS) -> Iterator[Workers]:
    """The processes that torchrun started, once all are there; else this one alone."""
    rank, count = launched()
    if count == 1:
        yield Workers()
        return
    for name in _ADDRESS:
        if name not in os.environ:
            raise UsageError(f"{name} is not set, but RANK and WORLD_SIZE are; start with torchrun")
    if not dist.is_available():
        raise UsageError(f"{count} processes: this torch was built without torch.distributed")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=seconds)
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=limit)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count
        )
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ[name] for name in _ADDRESS)
        raise UsageError(
            f"process {rank} of {count} did not meet the others at {address} within "
            f"{seconds:g} s (--join-seconds): {str(error).splitlines()[0]}"
        ) from error
    workers = Workers(rank, count, PrefixStore("rowmax", store), device)
    try:
        yield workers
    except BaseException as error:
        workers.tell(error)
        raise
    finally:
        workers.leave()


@contextlib.contextmanager
def postponed_termination(workers: Workers) -> Iterator[None]:
    """SIGTERM, which torchrun sends to all where one process ended, sets ``workers.terminated`` and
    does no more to the first of several, which may then still write what it has."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if workers.count == 1 or not workers.first or not on_main_thread:
        yield
        return
    earlier = signal.signal(signal.SIGTERM, lambda *_: workers.terminated.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
