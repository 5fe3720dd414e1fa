"""Cancellations by a thread that does not own the session: its owner's polls make room in their ring, or nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import kinds
import pytest
from drive import finish

from xlpk.backends import submitter
from xlpk.backends.cpu import CpuLibrary
from xlpk.errors import BackendError
from xlpk.kv import KV, KVPlan
from xlpk.model import Model
from xlpk.workload import Request

MANY = 600  # more than the ring holds, of requests that there are not
ASLEEP = ["launched", pytest.param("persistent", marks=pytest.mark.heavy)]  # between polls nothing empties the ring


class Watched:
    """A compiled library that notes who runs control."""

    def __init__(self, dll: Any) -> None:
        self._dll, self.controllers = dll, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dll, name)

    def xl_control(self, *arguments: Any) -> Any:
        self.controllers.add(threading.get_ident())
        return self._dll.xl_control(*arguments)


@pytest.fixture(params=ASLEEP)
def backend(request: pytest.FixtureRequest, tiny: Model, cpu_library: CpuLibrary) -> Iterator[Any]:
    """The CPU's launched control, and a resident loop that has left because it was idle."""
    plan = KVPlan.make(KV(budget="64pages"), tiny.config, tiny.weights.dtype, 128)
    on_cpu = request.param == "launched"
    options: dict[str, Any] = {"max_num_seqs": 4, "max_step_rows": 32}
    with kinds.on("cpu" if on_cpu else request.param):
        if on_cpu:
            library = SimpleNamespace(
                dll=Watched(cpu_library.dll), build=cpu_library.build, clock_error_ns=cpu_library.clock_error_ns
            )
            made = kinds.make(orchestration="launched", threads=1, library=library, **options)
        else:
            made = kinds.make(idle_s=0.02, lease_s=0.0, **options)
        try:
            made.open(tiny, plan)
            give_up = time.monotonic() + 120
            while not on_cpu and not made.library.dll.xl_left(made._params):
                assert time.monotonic() < give_up
                time.sleep(0.001)
            yield made
        finally:
            made.close()


def cancel_many(backend: Any, errors: list[str]) -> threading.Thread:
    def body() -> None:
        try:
            for number in range(MANY):
                backend.cancel(10_000 + number)
        except BackendError as error:
            errors.append(str(error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def test_the_owners_polls_make_room(backend: Any) -> None:
    errors: list[str] = []
    thread = cancel_many(backend, errors)
    give_up = time.monotonic() + 120
    while thread.is_alive():
        assert time.monotonic() < give_up, "the other thread still waits"
        backend.poll()
    assert errors == []
    assert len(finish(backend, [Request(1, (3, 4, 5), 5, ignore_eos=True)]).tokens[1]) == 5
    if isinstance(backend.library.dll, Watched):
        assert backend.library.dll.controllers == {threading.get_ident()}


def test_without_them_the_wait_ends(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitter, "CANCEL_S", 0.2)
    errors: list[str] = []
    thread = cancel_many(backend, errors)
    thread.join(120)
    assert not thread.is_alive()
    assert errors == [
        "request 10256 could not be cancelled: the ring of cancellations was full for 0.2 s, "
        "the thread that opened the backend does not poll it"
    ]
    assert len(finish(backend, [Request(1, (3, 4, 5), 5, ignore_eos=True)]).tokens[1]) == 5
