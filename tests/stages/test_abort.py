"""A loop that finds its state broken, or that hangs, says why and leaves; nothing waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from stages.sessions import session

from xlpk.backends.cpu import CpuBackend, CpuLibrary
from xlpk.errors import BackendError
from xlpk.model import Model
from xlpk.workload import Request


def forget_a_holder(memory: Any) -> None:
    memory["pages"]["refs"][memory["page_table"][0, 0]] = 0


def hold_a_free_page(memory: Any) -> None:
    top = int(memory["state"]["n_free_pages"][0]) - 1
    memory["pages"]["refs"][memory["free_pages"][top]] = 1


def lose_a_page(memory: Any) -> None:
    memory["state"]["n_free_pages"] -= 1


def run_out(memory: Any) -> None:
    memory["state"]["n_active_pages"] += memory["state"]["n_free_pages"]
    memory["state"]["n_free_pages"] = 0


FAULTS = {
    "page_double_free": forget_a_holder,
    "page_double_allocation": hold_a_free_page,
    "page_conservation": lose_a_page,
    "no_free_page": run_out,
}


def poll_until_it_dies(backend: CpuBackend, deadline_s: float = 120.0) -> str:
    give_up = time.monotonic() + deadline_s
    while time.monotonic() < give_up:
        try:
            backend.poll()
        except BackendError as error:
            return str(error)
    raise AssertionError("the loop went on")


@pytest.mark.parametrize("reason", FAULTS)
def test_a_broken_page_table_stops_the_loop(
    small: Callable[[str], Model], cpu_library: CpuLibrary, reason: str
) -> None:
    with session(small("alphabet"), cpu_library, page_size=4, threads=2, max_num_seqs=2) as backend:
        assert backend.submit(Request(1, (3, 4, 5), 40, ignore_eos=True))
        for _ in range(4):
            backend.poll()
        FAULTS[reason](backend._memory)
        message = poll_until_it_dies(backend)
        assert reason in message
        with pytest.raises(BackendError, match=reason):  # the first reason stays
            backend.poll()
        backend.close()


@pytest.mark.parametrize("orchestration", ["launched", "persistent"])
def test_a_team_that_never_arrives(small: Callable[[str], Model], cpu_library: CpuLibrary, orchestration: str) -> None:
    """An arrival is taken back: the others wait for the deadline, which a busy machine does not use up, and say so."""
    options = {"orchestration": orchestration, "threads": 2, "spin_deadline_s": 0.7}
    with session(small("alphabet"), cpu_library, **options) as backend:
        assert backend.submit(Request(1, (3, 4, 5), 200, ignore_eos=True))
        while not backend.poll():  # all teams have started
            time.sleep(0.0002)
        assert backend._memory is not None
        begin = time.monotonic()
        backend._memory["grid"]["arrivals"] -= 1
        assert "barrier_timeout (team " in poll_until_it_dies(backend)
        assert time.monotonic() - begin > 0.3
        backend.close()


@pytest.mark.parametrize("orchestration", ["launched", "persistent"])
def test_closing_while_it_works(small: Callable[[str], Model], cpu_library: CpuLibrary, orchestration: str) -> None:
    """Stop in mid-flight joins all threads; closing twice is closing once."""
    with session(small("alphabet"), cpu_library, orchestration=orchestration, threads=3, max_num_seqs=4) as backend:
        for i in range(6):
            assert backend.submit(Request(i, (3, 4, 5), 200, ignore_eos=True))
        for _ in range(3):
            backend.poll()
        begin = time.monotonic()
        report = backend.close()
        assert backend.close() is report
        assert time.monotonic() - begin < 60, "it waits for a deadline, not for its threads"
