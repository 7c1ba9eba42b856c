from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch

from . import backends

# Of a test's cases that Triton's interpreter runs, every so many-th is taken unless
# ROWMAX_INTERPRET_ALL is set (`make test-interpreted` sets it): all of them take a quarter of an
# hour. Parity in float64, where every wrong index shows, is always complete.
_TAKEN = 5


@pytest.hookimpl(trylast=True)  # of what other options leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sample = int(os.environ.get("ROWMAX_SAMPLE", len(items)))
    if sample < len(items):  # the same one in each process
        chosen = set(random.Random(17).sample(range(len(items)), sample))
        config.hook.pytest_deselected(items=[x for n, x in enumerate(items) if n not in chosen])
        items[:] = [item for n, item in enumerate(items) if n in chosen]
    if os.environ.get("ROWMAX_INTERPRET_ALL") or not backends.is_interpreted("triton"):
        return
    seen: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "triton" in parameters.values() or item.path.name.startswith("test_triton_"):
            name = f"{item.path.name} {item.originalname}"
            in_float64 = parameters.get("dtype", torch.float64) == torch.float64
            complete = name.endswith("test_parity") and in_float64
            if not complete:
                seen[name] += 1
                if seen[name] % _TAKEN != 1:
                    left.append(item)
                    continue
        kept.append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend available here."""
    name: str = request.param
    return name
