from __future__ import annotations

import hypothesis
import pytest

from . import backends, interpreter

hypothesis.settings.register_profile(
    "rowmax", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("rowmax")

interpreter.repair()


@pytest.fixture(params=backends.doing("attention"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend available here that does attention."""
    name: str = request.param
    return name
