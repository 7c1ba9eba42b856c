"""The compiled CPU backend: the C++ extension `rowmax.kernels._C` (sources in csrc/).

So far it does layer norm and declines everything else by name.
"""

from __future__ import annotations

import functools
import importlib

import torch

from ..problem import LayerNormProblem, Problem
from .norms import layer_norm, layer_norm_backward

__all__ = ["declines", "layer_norm", "layer_norm_backward", "unavailable"]

DTYPES = (torch.float32, torch.float64)


@functools.cache
def unavailable() -> str | None:
    """Loads the extension, which registers its operators; why that fails, where it does."""
    try:
        importlib.import_module(".._C", __package__)
    except ModuleNotFoundError:
        return (
            "the C++ extension is not built; with torch >= 2.10, setuptools >= 77, ninja and a "
            "C++20 compiler, `pip install --no-build-isolation .` in the checkout builds it"
        )
    except ImportError as error:
        return f"the C++ extension does not load with torch {torch.__version__}: {error}"
    return None


def declines(problem: Problem) -> str | None:
    if not isinstance(problem, LayerNormProblem):
        return f"it does layer_norm only, not {problem.op_name}"
    if problem.x.device.type != "cpu":
        return f"it runs on cpu, not on {problem.x.device.type}"
    if problem.x.dtype not in DTYPES:
        return f"it does float32 and float64, not {problem.x.dtype}"
    for name, parameter in (("weight", problem.weight), ("bias", problem.bias)):
        if parameter is not None and parameter.dtype != problem.x.dtype:
            return f"it takes `{name}` in the dtype of `x` only, not {parameter.dtype}"
    return None
