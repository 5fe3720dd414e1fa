"""KV pages: exactly as many as the tokens need, drafts' pages given back, who waits for pages served in order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from stages.audit import Audit
from stages.sessions import Log, serial_text, serve, session

from xlpk.backend import Event
from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.speculation import Ngram, NoSpec, Oracle
from xlpk.workload import Request


def requests(seed: int, count: int, most: int) -> list[Request]:
    """prompt + output of at most `most` tokens."""
    rng = np.random.RandomState(seed)
    out = []
    for i in range(count):
        length, n = int(rng.randint(1, most - 1)), int(rng.randint(1, most))
        prompt = tuple(rng.randint(3, 6, length).tolist())
        out.append(Request(i, prompt, min(n, most - length), temperature=0.8 * (i % 2), seed=i, ignore_eos=True))
    return out


@pytest.mark.parametrize("spec", [NoSpec(), Ngram(block=9)], ids=lambda spec: spec.name)
@pytest.mark.parametrize(("page_size", "pages", "most"), [(1, 150, 60), (2, 60, 60), (16, 9, 80), (256, 2, 300)])
def test_pages_at_every_step(
    small: Callable[[str], Model], cpu_library: CpuLibrary, page_size: int, pages: int, most: int, spec: NoSpec | Ngram
) -> None:
    """Pages for about two requests at once, four slots: some wait, all run, and the text does not depend on it."""
    model = small("alphabet")
    batch = requests(page_size, 10, most)
    most_waiting = 0

    def watch(events: list[Event]) -> None:
        nonlocal most_waiting
        audit(events)
        state = audit.memory("state")
        if state["n_order"] < 4:  # there are places: it is pages that the first of the queue waits for
            most_waiting = max(most_waiting, int(state["n_queued"]))

    options = {"pages": pages, "page_size": page_size, "max_len": 320, "prefill_chunk": 24}
    with session(model, cpu_library, spec=spec, max_num_seqs=4, **options) as backend:
        audit = Audit(backend)
        log = serve(backend, batch, each=watch)
        assert backend.free_pages() == pages
    assert most_waiting > 0
    assert log.admitted == [request.request_id for request in batch]
    for request in batch:
        text = serial_text(model, cpu_library, request, pages=400, page_size=1, max_len=320)
        assert tuple(log.tokens[request.request_id]) == text


def test_pages_that_hold_drafts_only_come_and_go(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """page_size 1, wrong drafts always: each verification takes block - 1 pages and gives all of them back."""
    model = small("alphabet")
    text = serial_text(model, cpu_library, Request(0, (3, 4, 5), 20, ignore_eos=True))
    request = Request(1, (3, 4, 5), 20, ignore_eos=True, oracle=text)
    spec = Oracle(block=4, mismatch_stride=1)
    with session(model, cpu_library, page_size=1, pages=23, spec=spec) as backend:
        log = serve(backend, [request], each=Audit(backend))
    decode = [step for step in log.steps if step["n_decode"]]
    assert [step["pages_draft"] for step in decode] == [min(3, 18 - i) for i in range(19)]
    assert [step["pages_active"] for step in decode] == [4 + i for i in range(19)]
    assert [step["live_pages"] for step in decode] == [*(4 + i for i in range(18)), 0]
    assert log.totals(1) == spec.expected(20)


def test_the_first_of_the_queue_waits_and_nobody_passes(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """6 pages: one prompt takes 4, the next needs 4 and waits; the last needs 1, comes later and may not pass."""
    batch = [
        Request(1, (3,) * 60, 4, ignore_eos=True),
        Request(2, (4,) * 60, 4, ignore_eos=True),
        Request(3, (5,), 2, ignore_eos=True),
    ]
    with session(small("alphabet"), cpu_library, page_size=16, pages=6, max_num_seqs=4) as backend:
        log = serve(backend, batch, each=Audit(backend))
    assert log.admitted == [1, 2, 3]
    assert log.admitted_step[2] > log.admitted_step[1]
    assert log.admitted_step[3] == log.admitted_step[2]
    assert all(log.reason(i) == "length" for i in (1, 2, 3))


def test_tables_are_read_through_whatever_their_order(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """Pages of long requests interleave when they come and go: the text equals the one with fresh pages."""
    model = small("race")
    rng = np.random.RandomState(3)
    prompts = [tuple(rng.randint(0, 131, 20 + 13 * i).tolist()) for i in range(7)]
    batch = [
        Request(i, prompt, 10 + 9 * (i % 3), seed=i, temperature=0.7, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    log = Log()
    with session(model, cpu_library, page_size=4, pages=120, max_num_seqs=3, prefill_chunk=10) as backend:
        audit = Audit(backend)
        scattered = False

        def watch(events: list[Event]) -> None:
            nonlocal scattered
            audit(events)
            for slot, s in audit.running():
                table = audit.memory("page_table")[slot, : s["n_pages"]]
                scattered |= bool((np.diff(table) != 1).any() and (np.diff(table) > 0).any())

        serve(backend, batch, each=watch, log=log)
    assert scattered
    for request in batch:
        text = serial_text(model, cpu_library, request, page_size=256, pages=1)
        assert tuple(log.tokens[request.request_id]) == text
