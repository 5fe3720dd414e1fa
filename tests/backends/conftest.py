"""Fixtures of suites that every backend passes."""

from __future__ import annotations

from collections.abc import Iterator

import kinds
import pytest
from lost_device import pytest_sessionfinish, pytest_unconfigure  # noqa: F401


@pytest.fixture(params=kinds.KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kind of backend that drive.run and kinds.make make in this test."""
    with kinds.on(request.param):
        yield request.param
