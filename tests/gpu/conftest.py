"""Tests of this folder run on a GPU; elsewhere, on the stand-in, with all heavy ones."""

from __future__ import annotations

from collections.abc import Iterator

import kinds
import pytest
from lost_device import pytest_sessionfinish, pytest_unconfigure  # noqa: F401


@pytest.fixture(params=kinds.GPU)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with kinds.on(request.param):
        yield request.param
