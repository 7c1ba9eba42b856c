"""Compiling kernels: on first use, one machine function a dtype, kept on disk in the user's cache.

Numba keeps its cache beside the sources and renews a function only when the file it stands in
changes. Here it lies in the user's cache directory, in a folder named after everything that the
machine code depends on: all sources of this package, the constants, the vector width, and the
versions. Of processes that want the same kernel at once, one compiles it, and the others wait for
what it leaves on disk, PATIENCE seconds at most; then each compiles its own. Where that folder
can't be had (a user without a home, a file system that is read only or full), kernels are compiled
in each process, after one warning.

Compiling is announced by a warning of the logger "rowmax", which goes to standard error unless the
program says otherwise; ROWMAX_QUIET=1 keeps it silent.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import numba
from filelock import FileLock, Timeout
from numba.core import config
from numba.core.ccallback import CFunc

from ..cpu_common import constants as cpu_constants
from . import ahead
from .host import vector_bits
from .inner import InnerCompiler, InnerFunction

CACHE_VARIABLE = "ROWMAX_CACHE_DIR"
QUIET_VARIABLE = "ROWMAX_QUIET"

# Called from other kernels only: no wrappers for Python or C, which would double the compile time.
_OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
# For `overload`, whose functions are called from kernels as well.
OVERLOAD_OPTIONS = {**_OPTIONS, "pipeline_class": InnerCompiler}

# How long compiling takes, in seconds: on an AMD EPYC (Zen 4), rounded up.
_SECONDS = {"attention_forward": 6, "attention_backward_kernels": 6, "attention_decode": 3}
# How long another process may compile a kernel that is wanted here: ten times as long, for it may
# have a low priority, or may have been stopped.
PATIENCE = 60.0


def jit(function: Callable[..., Any]) -> InnerFunction:
    """Declare a function that kernels call."""
    options = {"nopython": True, "boundscheck": None, **_OPTIONS}
    return InnerFunction(function, targetoptions=options, pipeline_class=InnerCompiler)


class _NoHomeError(Exception):
    """The system knows no home of this user."""


def cache_directory(kernel: Callable[..., None]) -> Path:
    """ROWMAX_CACHE_DIR, or rowmax/ in the user's cache directory; a folder for each version."""
    asked = os.environ.get(CACHE_VARIABLE)
    if asked:
        root = Path(asked)
    elif sys.platform == "darwin":
        root = _home() / "Library" / "Caches" / "rowmax"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or _home()) / "rowmax"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "rowmax"
    return root / f"numba-{_fingerprint(kernel)}"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise _NoHomeError("this user has no home directory") from error


def _warn_uncached(reason: str) -> None:
    if _uncached:
        return
    _uncached.append(reason)
    warnings.warn(
        f"rowmax: compiled kernels can't be kept on disk ({reason}), so each process compiles its "
        f"own; {CACHE_VARIABLE} names another directory",
        RuntimeWarning,
        stacklevel=2,
    )


def _fingerprint(kernel: Callable[..., None]) -> str:
    digest = hashlib.sha256()
    versions = (numba.__version__, llvmlite.__version__, sys.version, vector_bits())
    digest.update(repr(versions).encode())
    digest.update(Path(str(cpu_constants.__file__)).read_bytes())
    for module in sorted(_modules_behind(kernel.__module__)):
        digest.update(Path(str(sys.modules[module].__file__)).read_bytes())
    return digest.hexdigest()[:16]


def _modules_behind(name: str) -> set[str]:
    """The modules of this package whose functions `name` uses, directly or not, and itself."""
    found, open_ends = {name}, [name]
    while open_ends:
        for value in list(vars(sys.modules[open_ends.pop()]).values()):
            origin = getattr(value, "__module__", None)
            if isinstance(origin, str) and origin not in found and origin.startswith(__package__):
                found.add(origin)
                open_ends.append(origin)
    return found


_configuring = threading.RLock()


@contextmanager
def _cache_in(directory: Path) -> Iterator[None]:
    """Numba reads its configuration when a function is declared; it is put back afterwards. One
    thread at a time: another would put back what this one has set."""
    with _configuring:
        before = config.CACHE_DIR
        config.CACHE_DIR = str(directory)
        try:
            yield
        finally:
            config.CACHE_DIR = before


class _Kernel(CFunc):
    """Machine code that C can call; that it has to be compiled is said before."""

    dtype = ""  # of the tensors, by name
    kept = False  # on disk, for other processes

    def _compile_uncached(self) -> Any:
        if self.dtype and self.kept:
            folder = cache_directory(self._pyfunc).parent
            ahead.start(self.dtype, self._pyfunc.__module__, folder)
        seconds = _SECONDS.get(self._pyfunc.__module__.rpartition(".")[2], 2)
        once = "once" if self.kept else "once in each process"
        _say("Numba compiles %s, %s: about %d s", _name(self._pyfunc), once, seconds)
        collecting = gc.isenabled()
        gc.disable()  # as much garbage as is made here would have it search all of torch, often
        try:
            return super()._compile_uncached()
        finally:
            if collecting:
                gc.enable()


def _say(text: str, *values: object) -> None:
    if os.environ.get(QUIET_VARIABLE, "0") == "0":
        logging.getLogger("rowmax").warning(f"rowmax: {text}", *values)


def _name(kernel: Callable[..., None]) -> str:
    return kernel.__module__.rpartition(".")[2].removesuffix("_kernels")


def _locked(path: Path, kernel: Callable[..., None]) -> AbstractContextManager[object]:
    """While this process compiles the kernel; raises Timeout where another is at it too long."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=min(1.0, PATIENCE))
    except Timeout:
        _say("another process compiles %s: waiting, at most %d s", _name(kernel), PATIENCE)
        return lock.acquire(timeout=PATIENCE)


def _compiled(kernel: Callable[..., None], signature: Any, dtype: str, keep: bool) -> CFunc:
    function = _Kernel(kernel, (signature.args, signature.return_type), locals={}, options={})
    function.dtype, function.kept = dtype, keep
    if keep:
        function.enable_caching()
    function.compile()
    return function


@functools.cache
def machine_function(kernel: Callable[..., None], argument: Any, dtype: str = "") -> int:
    """The address of `void kernel(argument *)` as machine code, compiled or read from disk once.

    dtype: of the tensors, by name; with it, other kernels may be compiled at the same time.
    """
    signature = numba.void(numba.types.CPointer(argument))
    try:
        directory = cache_directory(kernel)
        directory.mkdir(parents=True, exist_ok=True)
        # Numba itself would turn to folders beside the sources, which know nothing of versions.
        with tempfile.TemporaryFile(dir=directory):
            pass
        name = hashlib.sha256(str(signature).encode()).hexdigest()[:16]
        # Numba keeps an index of the signatures in a folder and locks nothing: of two processes
        # that write at once, one would have the other's machine code under its own name.
        lock = directory / f"{kernel.__name__}-{name}.lock"
        with _locked(lock, kernel), _cache_in(directory / name):
            compiled = _compiled(kernel, signature, dtype, keep=True)
    except Timeout:
        _say("another process did not compile %s in %d s", _name(kernel), PATIENCE)
        compiled = _compiled(kernel, signature, dtype, keep=False)
    except (OSError, NotImplementedError, _NoHomeError) as error:  # (the second: no locks there)
        _warn_uncached(str(error))
        compiled = _compiled(kernel, signature, dtype, keep=False)
    _kept_alive.append(compiled)
    address: int = compiled.address
    return address


_kept_alive: list[Any] = []
_uncached: list[str] = []  # why, told once
