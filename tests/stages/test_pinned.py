"""Pinned prefixes: pages that no pressure takes, found by whoever begins alike, counted once and never given back."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stages.sessions import serve, session
from xlpk import layout
from xlpk.backends.cpu import CpuLibrary
from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.model import Model
from xlpk.workload import Request, pinned_requests

PREFIX = tuple(range(1, 40))  # two full pages and seven tokens
PAGES = 12


def stranger(i: int, length: int = 60) -> Request:
    prompt = np.random.default_rng(100 + i).integers(40, 250, length).tolist()
    return Request(i, tuple(prompt), 8, ignore_eos=True)


@pytest.mark.parametrize("eviction", ["lru", "fifo", "slru"])
@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "not"])
def test_a_pinned_prefix_outlives_what_evicts_any_other(
    tiny: Model, cpu_library: CpuLibrary, eviction: str, pin: bool
) -> None:
    last = Request(90, (*PREFIX, 3, 4), 6, ignore_eos=True)
    with session(tiny, cpu_library, pages=PAGES, kv={"eviction": eviction}, max_num_seqs=3) as backend:
        log = serve(backend, [Request(50, PREFIX, 1, ignore_eos=True, pin=pin)])
        serve(backend, [stranger(i) for i in range(8)], log=log)
        serve(backend, [last], log=log)
        free = backend.free_pages()
    assert sum(step["n_evictions"] for step in log.steps) > 0
    assert log.cached[90] == (32 if pin else 0)
    assert free == PAGES - (2 if pin else 0)
    assert {step["pages_pinned"] for step in log.steps[-8:]} == {2 if pin else 0}
    with session(tiny, cpu_library, pages=64, kv={"prefix_sharing": False}) as backend:
        assert serve(backend, [last]).tokens[90] == log.tokens[90]


def test_live_tokens_count_pinned_pages_once(tiny: Model, cpu_library: CpuLibrary) -> None:
    with session(tiny, cpu_library, pages=PAGES, max_num_seqs=3) as backend:
        log = serve(backend, [Request(50, PREFIX, 1, ignore_eos=True, pin=True)])
        serve(backend, [Request(60 + i, (*PREFIX, 3, 4 + i), 9, ignore_eos=True) for i in range(3)], log=log)
    assert (log.steps[-1]["live_pages"], log.steps[-1]["live_tokens"]) == (2, 32)  # after the end of all three
    shared = [step for step in log.steps if step["n_decode"] == 3 and not step["n_finished"]]
    assert shared
    for step in shared:  # two pages of the prefix, and a third of each request
        own = step["context_tokens"] - 3 * 32
        assert (step["live_pages"], step["live_tokens"]) == (5, 32 + own)
        assert step["pages_active"] + step["pages_draft"] == 5
        assert step["pages_locked"] == step["pages_active"]


def test_a_second_pin_of_equal_tokens_takes_no_more_pages(tiny: Model, cpu_library: CpuLibrary) -> None:
    with session(tiny, cpu_library, pages=PAGES, trace=True) as backend:
        both = [Request(50 + i, PREFIX, 1, ignore_eos=True, pin=True) for i in range(2)]
        log = serve(backend, both)
        free = backend.free_pages()
    pins = backend.decisions()
    assert np.count_nonzero(pins["kind"] == layout.TraceKind.PIN) == 2
    assert free == PAGES - 2
    assert log.n_finished == 2


def test_a_pin_that_is_preempted_or_cancelled_keeps_what_it_has_pinned(tiny: Model, cpu_library: CpuLibrary) -> None:
    long = tuple(np.random.default_rng(1).integers(1, 250, 90).tolist())
    options = {"pages": PAGES, "prefill_chunk": 16, "max_num_seqs": 3}
    with session(tiny, cpu_library, **options) as backend:  # type: ignore[arg-type]
        assert backend.submit(Request(50, long, 1, ignore_eos=True, pin=True))
        while not backend.poll():
            pass
        backend.poll()
        backend.cancel(50)
        log = serve(backend, [stranger(i) for i in range(4)])
        free, pinned = backend.free_pages(), log.steps[-1]["pages_pinned"]
    assert 0 < pinned < 5
    assert free == PAGES - pinned
    assert log.finished[50] == [("cancelled", 0)]


def test_no_request_may_need_the_pages_that_are_pinned(tiny: Model, cpu_library: CpuLibrary) -> None:
    plan = KVPlan.make(KV(budget="12pages", page_size=4), tiny.config, "bf16", 256)
    requests, plan = pinned_requests(["The quick brown fox jumps over the lazy dog."], tiny, plan)
    assert plan.pinned_pages == len(requests[0].prompt) // 4 > 0
    assert plan.usable_pages == 12 - plan.pinned_pages
    assert plan.under_pressure([40], 1, 0.5).pages == 10 + plan.pinned_pages
    with pytest.raises(InputError, match=r"kv\.pinned=\d+ pages: what leaves room among the 12 pages"):
        pinned_requests(["The quick brown fox jumps over the lazy dog. " * 6], tiny, plan)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (KV(pinned=3), r"kv\.pinned=3"),
        (KV(pinned=[""]), r"kv\.pinned=\['']"),
        (KV(pinned="a", prefix_sharing=False), r"kv\.pinned=a.*prefix_sharing"),
    ],
)
def test_refusals(kv: KV, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kv.pinned_texts()
