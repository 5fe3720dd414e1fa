"""How the fuzzers run: the same cases each time, nothing kept, sixteen times as many under `heavy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from xlpk.errors import InputError

DEADLINE_MS = 20_000  # a case beyond it counts as a hang


def cases(count: int) -> Any:
    """Parametrizes a test by `cases`."""
    return pytest.mark.parametrize("cases", [count, pytest.param(16 * count, marks=pytest.mark.heavy)])


def fixed(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=DEADLINE_MS,
        suppress_health_check=list(HealthCheck),
    )


def result_or_line(call: Callable[[], Any]) -> Any:
    """What `call` gives, or None where it refuses in one short line; any other exception passes and fails the test."""
    try:
        return call()
    except InputError as error:
        text = str(error)
        assert text.isprintable(), ascii(text)
        assert len(text) < 1000, text
        return None
