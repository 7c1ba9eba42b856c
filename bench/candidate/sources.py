"""Where a candidate comes from: a module, a file, a Hugging Face `kernels` package on disk, a torch
custom op, or an attention that is registered with transformers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..options import UsageError, listed
from .interface import Candidate, op_of

PLACES = "MODULE:NAME, FILE.py[:NAME] or FOLDER[:NAME]"
FORMS = "MODULE:NAME, FILE.py[:NAME], FOLDER[:NAME], NAMESPACE::OP or attn_implementation:NAME"
_TRANSFORMERS = "attn_implementation:"


@dataclass(frozen=True)
class Where:
    """What a candidate is and where it is to be found: all that another process needs."""

    text: str
    op: str | None = None
    layout: str | None = None
    backward: bool = True
    imports: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.text

    @property
    def computes(self) -> str:
        """Before anything is imported: by the name of the function, of a file the only one."""
        return self.op or op_of(_only_function(self.text) or self.text)

    def load(self) -> Candidate:
        for module in self.imports:
            module_of("--import", module)
        found = load(self.text, op=self.op, layout=self.layout, backward=self.backward)
        if found.op != self.computes:
            raise UsageError(f"--function: {self.text}: --op {found.op} says what it computes")
        return found


def _only_function(text: str) -> str | None:
    """The name of the only public function that a file defines, which is not run."""
    path = Path(text)
    if path.suffix != ".py" or not path.is_file():
        return None
    try:
        body = ast.parse(path.read_text("utf-8")).body
    except (SyntaxError, ValueError):
        return None  # what is wrong with it is told where it is imported
    names = [one.name for one in body if isinstance(one, ast.FunctionDef)]
    public = [name for name in names if not name.startswith("_")]
    return public[0] if len(public) == 1 else None


def load(
    text: str, *, op: str | None = None, layout: str | None = None, backward: bool = True
) -> Candidate:
    """The candidate that `text`, one of FORMS, says. Raises UsageError.

    Whatever a module does when it is imported it does here: the guard must be there before.
    """
    option, out_layout = "--function", None
    if text.startswith(_TRANSFORMERS):
        function = _registered(option, text.removeprefix(_TRANSFORMERS))
        layout, out_layout = layout or "bhld", "blhd"
    elif "::" in text:
        function = _custom_op(option, text)
    else:
        function = callable_of(option, text, FORMS)
        op = op or op_of(text.partition(":")[2] or getattr(function, "__name__", ""))
    try:
        return Candidate(
            function, text, op=op, layout=layout, out_layout=out_layout, backward=backward
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {text}: {error}") from error


def callable_of(option: str, text: str, forms: str = PLACES) -> Callable[..., Any]:
    """Of a module, a file or a folder; `forms` is what the error says was expected."""
    place, _, name = text.partition(":")
    path = Path(place)
    if path.suffix == ".py" or path.is_dir():
        return _member(option, text, module_of(option, place), name)
    if not name:
        raise UsageError(f"{option}: expected {forms}, got {text}")
    return _member(option, text, _imported(option, text, place), name)


def module_of(option: str, place: str) -> ModuleType:
    """A module by its name, a file, or the folder of a Hugging Face `kernels` package."""
    path = Path(place)
    if path.is_dir():
        return _package(option, path)
    if path.suffix != ".py":
        return _imported(option, place, place)
    if not path.is_file():
        raise UsageError(f"{option}: expected a file that is there, got {place}")
    return _from_file(option, path.stem, path)


def _imported(option: str, text: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{option}: can't import {text}: {error}") from error


def _from_file(option: str, name: str, path: Path) -> ModuleType:
    """Under a name of its own: no other module of that name is shadowed, or taken for it."""
    unique = f"{name}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None  # a file whose name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # of modules beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[unique]
        raise UsageError(f"{option}: {path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def _member(option: str, text: str, module: ModuleType, name: str) -> Callable[..., Any]:
    """The one named, or the only public function that the module defines or exports."""
    if name:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            kind = "no such name" if found is None else f"a {type(found).__name__}"
            raise UsageError(f"{option}: expected a callable, got {text}: {kind}")
        return found
    exported = getattr(module, "__all__", None)
    names = exported or [
        label
        for label, value in vars(module).items()
        if not label.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    functions = [n for n in names if callable(getattr(module, n)) and n[:1].islower()]
    if len(functions) != 1:
        raise UsageError(f"{option}: expected {text}:NAME of one of {listed(functions) or 'none'}")
    return getattr(module, functions[0])


def _custom_op(option: str, text: str) -> Callable[..., Any]:
    namespace, _, name = text.partition("::")
    try:
        return getattr(getattr(torch.ops, namespace), name)
    except AttributeError as error:
        raise UsageError(
            f"{option}: torch knows no op {text}; --import the module that registers it"
        ) from error


def _registered(option: str, name: str) -> Callable[..., Any]:
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise UsageError(
            f'{option}: {_TRANSFORMERS}{name} wants transformers: pip install "rowmax[huggingface]"'
        ) from error
    known = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
    if name not in known:
        raise UsageError(
            f"{option}: expected an attention that transformers knows, of {listed(known)}, got "
            f"{name}; --import the module that registers it"
        )
    return ALL_ATTENTION_FUNCTIONS[name]


# --- Hugging Face's kernels -----------------------------------------------------------------------


def _package(option: str, folder: Path) -> ModuleType:
    """By that project's own loader where it is installed, or else by the layout that it documents:
    build/VARIANT/__init__.py beside metadata.json.
    """
    own = _own_loader()
    if own is not None:
        try:
            return own(folder.resolve())
        except Exception as error:
            raise UsageError(f"{option}: {folder}: {type(error).__name__}: {error}") from error
    build = folder / "build" if (folder / "build").is_dir() else folder
    here = [build / name for name in _variants() if (build / name).is_dir()]
    if not here and (folder / "__init__.py").is_file():
        here = [folder]
    if not here:
        there = sorted(one.name for one in build.iterdir() if one.is_dir())
        raise UsageError(
            f"{option}: {folder}: expected build/VARIANT, VARIANT one of {listed(_variants())}; "
            f"got {listed(there) or 'none'}"
        )
    chosen = here[0]
    name = folder.resolve().name.replace("-", "_")
    metadata = chosen / "metadata.json"
    if metadata.is_file():
        name = str(json.loads(metadata.read_text("utf-8")).get("name", name)).replace("-", "_")
    file = chosen / "__init__.py"
    if not file.is_file():  # as older builds have it
        file = chosen / name / "__init__.py"
    if not file.is_file():
        raise UsageError(f"{option}: {chosen} has no __init__.py")
    return _from_file(option, name, file)


def _own_loader() -> Callable[[Path], ModuleType] | None:
    """`get_local_kernel(path)` of the package `kernels`; older ones want a name besides."""
    try:
        importlib.metadata.version("kernels")
        from kernels import get_local_kernel  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    parameters = list(inspect.signature(get_local_kernel).parameters.values())
    wanted = [one for one in parameters if one.default is one.empty]
    return get_local_kernel if len(wanted) == 1 else None


def _variants() -> list[str]:
    """The names of builds that suit this machine, the one made for it first."""
    major, minor = torch.__version__.split(".")[:2]
    system = f"{platform.machine()}-{sys.platform}"
    backends = ["cpu"]
    if torch.version.cuda is not None:
        backends.insert(0, f"cu{torch.version.cuda.replace('.', '')}")
    versions = [f"torch{major}{minor}-cxx11", f"torch{major}{minor}"]
    found = [f"{version}-{one}-{system}" for one in backends for version in versions]
    without = ["torch-cuda", "torch-cpu"] if len(backends) > 1 else ["torch-cpu"]
    return [*found, *without, "torch-universal"]
