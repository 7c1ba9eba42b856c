"""The C++ extension, or a skip that says what is missing."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
from torch import Tensor, __version__


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """rowmax.kernels._C; where ROWMAX_EXTENSION=require, its absence is a failure."""
    try:
        return importlib.import_module("rowmax.kernels._C")
    except ImportError as error:
        if os.environ.get("ROWMAX_EXTENSION") == "require":
            raise
        pytest.skip(f"the C++ extension is not built here: {error}")


@pytest.fixture
def readable_tensors(extension: ModuleType) -> None:
    """A torch that lets an extension read its tensors, which plain calls want, or a skip."""
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip(f"torch {__version__} has no C interface to its tensors")
