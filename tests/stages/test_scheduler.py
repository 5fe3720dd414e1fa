"""Scheduler: first come first served, what a step may hold, cancellation at any time, and rings that fill up."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from stages.audit import Audit
from stages.sessions import Log, serial_text, serve, session, shrink

from xlpk import layout
from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.speculation import Ngram
from xlpk.workload import Request


def requests(count: int, seed: int = 1, longest: int = 70) -> list[Request]:
    rng = np.random.RandomState(seed)
    return [
        Request(
            i,
            tuple(rng.randint(3, 6, rng.randint(1, longest)).tolist()),
            int(rng.randint(1, 30)),
            temperature=0.6 * (i % 2),
            seed=i,
            ignore_eos=True,
        )
        for i in range(count)
    ]


def check_texts(log: Log, model: Model, library: CpuLibrary, batch: list[Request]) -> None:
    for request in batch:
        assert tuple(log.tokens[request.request_id]) == serial_text(model, library, request)
        assert log.reason(request.request_id) == "length"


LIMITS = [(1, 1, 1), (4, 4, 3), (4, 5, 32), (3, 16, 7), (16, 64, 16), (2, 300, 300)]


@pytest.mark.parametrize(("slots", "rows", "chunk"), LIMITS)
def test_steps_and_admissions(
    small: Callable[[str], Model], cpu_library: CpuLibrary, slots: int, rows: int, chunk: int
) -> None:
    """More requests than slots; every step is what the rules say, down to one row a step."""
    model, batch = small("alphabet"), requests(3 * slots + 2)
    spec = Ngram(block=min(6, rows))
    with session(model, cpu_library, max_num_seqs=slots, max_step_rows=rows, prefill_chunk=chunk, spec=spec) as backend:
        audit = Audit(backend)
        log = serve(backend, batch, each=audit)
    assert log.admitted == list(range(len(batch)))
    assert max(step["n_prefill"] + step["n_decode"] for step in log.steps) <= slots
    assert max(step["n_rows"] for step in log.steps) <= rows
    assert all(step["n_prefill_rows"] <= chunk * step["n_prefill"] for step in log.steps)
    if rows <= 5:
        assert audit.chunks_cut > 0 or slots == 1
        assert audit.drafts_cut > 0 or rows == 1
    if slots > 2:
        assert any(step["n_prefill_rows"] and step["n_decode_rows"] for step in log.steps)
    check_texts(log, model, cpu_library, batch)


def test_requests_that_arrive_while_others_run(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    model, batch = small("alphabet"), requests(12, seed=2)
    with session(model, cpu_library, max_num_seqs=3, spec=Ngram()) as backend:
        audit, log = Audit(backend), Log()
        for request in batch:
            assert backend.submit(request)
            for _ in range(3):
                events = backend.poll()
                log.add(events)
                audit(events)
        serve(backend, [], log=log, each=audit)
        while log.n_finished < len(batch):
            log.add(backend.poll())
    check_texts(log, model, cpu_library, batch)


# ---------------------------------------------------------------------------------------------- cancellation


def test_cancel_in_every_state(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """Waiting, prefilling, decoding, finished, unknown, twice: one end each, the right prefix, every page back."""
    model = small("alphabet")
    batch = [
        Request(1, (3, 4, 5), 60, ignore_eos=True),  # decoding
        Request(2, (3, 4) * 40, 60, ignore_eos=True),  # prefilling
        Request(3, (5, 6), 60, ignore_eos=True),  # waiting for a slot
        Request(4, (5, 7), 4, ignore_eos=True),  # left alone
    ]
    with session(model, cpu_library, max_num_seqs=2, prefill_chunk=4, spec=Ngram()) as backend:
        audit, log = Audit(backend), Log()

        def poll(times: int) -> None:
            for _ in range(times):
                events = backend.poll()
                log.add(events)
                audit(events)

        for request in batch:
            assert backend.submit(request)
        poll(6)
        slots = {int(s["request_id"]): int(s["state"]) for _, s in audit.running()}
        assert slots == {1: 2, 2: 1}
        for request_id in (3, 99, 2, 1, 1, 3):
            backend.cancel(request_id)
        before = len(log.tokens[1])
        assert 0 < before < 60
        poll(2)
        assert [log.reason(i) for i in (1, 2)] == ["cancelled", "cancelled"]
        poll(30)
        backend.cancel(4)
        backend.cancel(1)
        poll(3)
        assert backend.free_pages() == 64
    assert {i: log.reason(i) for i in (1, 2, 3, 4)} == {1: "cancelled", 2: "cancelled", 3: "cancelled", 4: "length"}
    assert log.admitted == [1, 2, 4]
    assert log.tokens[2] == log.tokens[3] == []
    text = serial_text(model, cpu_library, batch[0])
    assert 0 < len(log.tokens[1]) < 60
    assert tuple(log.tokens[1]) == text[: len(log.tokens[1])]
    assert tuple(log.tokens[4]) == serial_text(model, cpu_library, batch[3])


def test_a_place_in_the_ring_outlives_its_cancellation(
    small: Callable[[str], Model], cpu_library: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring of two: the request that takes a cancelled one's place is served."""
    shrink(monkeypatch, submissions=2, cancels=2, queue=2, gone=2)
    with session(small("alphabet"), cpu_library, max_num_seqs=1) as backend:
        audit, log = Audit(backend), Log()

        def poll() -> None:
            events = backend.poll()
            audit(events)
            log.add(events)

        assert backend.submit(Request(0, (3, 4, 5), 20, ignore_eos=True))
        poll()
        for request_id in range(1, 7):
            assert backend.submit(Request(request_id, (3, 4, 5), 2, ignore_eos=True))
            if request_id in (1, 4):
                backend.cancel(request_id)
            while not log.finished[request_id]:
                poll()
    assert [i for i in range(7) if log.reason(i) == "cancelled"] == [1, 4]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("orchestration", ["launched", "persistent"])
def test_cancel_at_random(
    small: Callable[[str], Model],
    cpu_library: CpuLibrary,
    monkeypatch: pytest.MonkeyPatch,
    orchestration: str,
    seed: int,
) -> None:
    shrink(monkeypatch, step_records=8)  # the loop is never far ahead of who cancels
    model = small("alphabet")
    long = [Request(request_id, (3, 4, 5), 250, ignore_eos=True) for request_id in (100, 101)]  # 16 of 24 pages each
    batch = [*long, *requests(30, seed=seed + 10)]
    rng = np.random.RandomState(seed)
    texts = {request.request_id: serial_text(model, cpu_library, request) for request in batch}
    options = {"max_num_seqs": 4, "max_step_rows": 24, "prefill_chunk": 5, "pages": 24, "spec": Ngram()}
    with session(model, cpu_library, orchestration=orchestration, **options) as backend:
        audit, log = Audit(backend), Log()
        give_up = time.monotonic() + 300
        assert all(backend.submit(request) for request in long)
        backend.cancel(101)  # which waits for the first one's pages
        waiting = batch[2:]
        while log.n_finished < len(batch):
            if waiting and backend.submit(waiting[0]):
                del waiting[0]
            if rng.rand() < 0.3:
                backend.cancel(int(rng.randint(0, 29)))  # the last one is left alone
            events = backend.poll()
            log.add(events)
            if log.tokens[100]:
                backend.cancel(100)
            if orchestration == "launched":
                audit(events)
            assert time.monotonic() < give_up
        report_pages = backend.free_pages
    assert report_pages() == 24
    reasons = [log.reason(request.request_id) for request in batch]
    assert {"cancelled", "length"} == set(reasons)
    for request, reason in zip(batch, reasons, strict=True):
        output = tuple(log.tokens[request.request_id])
        assert output == texts[request.request_id][: len(output)]
        assert reason == "cancelled" or output == texts[request.request_id]


# ---------------------------------------------------------------------------------------------- rings


def test_the_submission_ring_pushes_back(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """Nothing polls: 256 requests fit. Afterwards each is served once, in order, the refused ones too."""
    model = small("alphabet")
    batch = [Request(i, (3 + i % 10,), 1 + i % 3, ignore_eos=True) for i in range(300)]
    with session(model, cpu_library, max_num_seqs=8) as backend:
        taken = 0
        while backend.submit(batch[taken]):
            taken += 1
        assert taken == 256
        assert not backend.submit(batch[taken])
        log = Log()
        for request in batch[:taken]:
            log.finished[request.request_id] = []
        events = backend.poll()
        log.add(events)
        waiting = batch[taken:]
        while log.n_finished < len(batch):
            while waiting and backend.submit(waiting[0]):
                del waiting[0]
            log.add(backend.poll())
    assert log.admitted == list(range(300))
    for request in batch:
        assert len(log.tokens[request.request_id]) == request.max_new_tokens
        assert log.reason(request.request_id) == "length"


def test_the_prompt_ring_pushes_back(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """It is full when its tokens are; prompts wrap around its end intact."""
    model = small("alphabet")
    rng = np.random.RandomState(8)
    batch = [Request(i, tuple(rng.randint(3, 17, 200).tolist()), 5, ignore_eos=True) for i in range(90)]
    with session(model, cpu_library, max_num_seqs=2, max_step_rows=256, prefill_chunk=200) as backend:
        assert backend._memory is not None
        capacity = backend._memory["prompts"].size
        taken = 0
        while backend.submit(batch[taken]):
            taken += 1
        assert taken == capacity // 200 < len(batch)
        log = serve(backend, batch[taken:], log=Log(), each=Audit(backend))
        while log.n_finished < len(batch):
            log.add(backend.poll())
    assert log.admitted == list(range(90))
    check_texts(log, model, cpu_library, batch)


@pytest.mark.parametrize("orchestration", ["launched", "persistent"])
@pytest.mark.parametrize("ring", ["events", "step_records"])
def test_a_host_that_does_not_look_loses_nothing(
    small: Callable[[str], Model],
    cpu_library: CpuLibrary,
    monkeypatch: pytest.MonkeyPatch,
    ring: str,
    orchestration: str,
) -> None:
    """A small event (or step) ring: the loop pauses when it is full, and goes on when the host has read it."""
    model = small("alphabet")
    batch = [Request(i, (3, 4, 5 + i), 60, temperature=0.8, seed=i, ignore_eos=True) for i in range(5)]
    texts = {request.request_id: serial_text(model, cpu_library, request) for request in batch}
    shrink(monkeypatch, **{ring: 64 if ring == "events" else 4})
    with session(model, cpu_library, orchestration=orchestration, max_num_seqs=2, spec=Ngram()) as backend:
        for request in batch:
            assert backend.submit(request)
        if orchestration == "launched":
            for _ in range(100):
                backend._run_step()
        assert backend._memory is not None
        written = backend._memory["mailbox"]
        give_up = time.monotonic() + 60
        room = 2 * (layout.MAX_BLOCK + 2)  # events of a round at most
        while int(written["event_tail"][0]) <= 64 - room if ring == "events" else int(written["step_tail"][0]) < 3:
            assert time.monotonic() < give_up, "the ring is not full"
            time.sleep(0.001)
        time.sleep(0.02)  # for the round that may still go on
        stopped_at = int(backend._memory["state"]["n_steps"][0])
        time.sleep(0.02)
        assert int(backend._memory["state"]["n_steps"][0]) == stopped_at
        assert int(written["event_tail"][0]) <= 64
        assert int(written["step_tail"][0]) <= (8192 if ring == "events" else 4)
        log = Log()
        give_up = time.monotonic() + 300
        while log.n_finished < len(batch):
            log.add(backend.poll())
            assert time.monotonic() < give_up
        log.add(backend.poll())
    assert {request_id: tuple(tokens) for request_id, tokens in log.tokens.items()} == texts
    assert [step["step"] for step in log.steps] == list(range(1, len(log.steps) + 1))
    assert len(log.steps) > stopped_at
