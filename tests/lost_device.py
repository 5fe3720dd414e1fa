"""A pytest session that lost a device leaves without the interpreter's end, which would wait for its kernel.

A conftest that imports the two hooks has them; they run once more where two do.
"""

from __future__ import annotations

import pytest

from xlpk.isolate import leave_if_lost

_EXIT = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_EXIT] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last hook: the summary has been written."""
    leave_if_lost(config.stash.get(_EXIT, 1))
