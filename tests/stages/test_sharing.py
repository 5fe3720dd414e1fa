"""Prefix sharing: what is found and what is not, who holds a page, what goes first. Texts equal those of lone runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from stages.audit import Audit
from stages.sessions import Log, serial_text, serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.speculation import Ngram, NoSpec
from xlpk.workload import Request

PREFIX = tuple(np.random.RandomState(1).randint(3, 17, 48).tolist())


def ask(request_id: int, prompt: tuple[int, ...], n: int = 6, **options: object) -> Request:
    return Request(request_id, prompt, n, ignore_eos=True, **options)


def one_by_one(model: Model, library: CpuLibrary, batch: list[Request], **options: object) -> Log:
    """Each request after the one before has ended."""
    log = Log()
    with session(model, library, **options) as backend:
        audit = Audit(backend)
        for request in batch:
            serve(backend, [request], log=log, each=audit)
    return log


@pytest.mark.parametrize(("length", "hit"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (48, 32), (49, 48)])
def test_the_last_prompt_token_is_always_computed(
    small: Callable[[str], Model], cpu_library: CpuLibrary, length: int, hit: int
) -> None:
    """The same prompt again: full pages are found, up to the last boundary before the final token."""
    prompt = (PREFIX + PREFIX)[:length]
    model = small("alphabet")
    log = one_by_one(model, cpu_library, [ask(0, prompt), ask(1, prompt)])
    assert log.cached == {0: 0, 1: hit}
    assert log.tokens[0] == log.tokens[1] == list(serial_text(model, cpu_library, ask(0, prompt)))
    computed = sum(step["n_prefill_rows"] for step in log.steps)
    assert computed == 2 * length - hit


@pytest.mark.parametrize("changed", [0, 20, 47])
def test_a_prefix_is_found_up_to_the_first_token_that_differs(
    small: Callable[[str], Model], cpu_library: CpuLibrary, changed: int
) -> None:
    other = (*PREFIX[:changed], PREFIX[changed] % 13 + 4, *PREFIX[changed + 1 :])
    assert other[changed] != PREFIX[changed]
    model = small("alphabet")
    log = one_by_one(model, cpu_library, [ask(0, (*PREFIX, 5)), ask(1, (*other, 5))])
    assert log.cached[1] == changed // 16 * 16
    assert log.tokens[1] == list(serial_text(model, cpu_library, ask(1, (*other, 5))))


def test_equal_pages_behind_other_pages_are_not_found(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """The same 16 tokens at the same place, after others: their K and V differ."""
    first, second, same = (3,) * 16, (4,) * 16, (5,) * 16
    log = one_by_one(small("alphabet"), cpu_library, [ask(0, (*first, *same, 6)), ask(1, (*second, *same, 6))])
    assert log.cached[1] == 0


def test_outputs_are_found_too(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """The second turn has the first prompt and its answer: pages that decoding filled count too."""
    model = small("alphabet")
    log = one_by_one(model, cpu_library, [ask(0, PREFIX[:20], 30)])
    turn = (*PREFIX[:20], *log.tokens[0], 7, 8)
    with session(model, cpu_library) as backend:
        serve(backend, [ask(0, PREFIX[:20], 30)], log=(again := Log()))
        serve(backend, [ask(1, turn)], log=again)
    assert again.cached[1] == 48  # 49 tokens of the first turn are stored
    assert again.tokens[1] == list(serial_text(model, cpu_library, ask(1, turn)))


def test_who_shares_nothing_finds_and_leaves_nothing(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    private = [ask(0, PREFIX, share_prefix=False), ask(1, PREFIX), ask(2, PREFIX, share_prefix=False), ask(3, PREFIX)]
    assert one_by_one(small("alphabet"), cpu_library, private).cached == {0: 0, 1: 0, 2: 0, 3: 32}
    off = {"kv": {"prefix_sharing": False}}
    assert one_by_one(small("alphabet"), cpu_library, private, **off).cached == dict.fromkeys(range(4), 0)


@pytest.mark.parametrize("spec", [NoSpec(), Ngram(block=5)], ids=lambda spec: spec.name)
def test_requests_that_run_together_share(
    small: Callable[[str], Model], cpu_library: CpuLibrary, spec: NoSpec | Ngram
) -> None:
    """Pages of equal content that were computed twice become one; at the end all are cached, held by nobody."""
    model = small("alphabet")
    batch = [ask(i, (*PREFIX, 3 + i % 3), 20, temperature=0.7, seed=i % 4) for i in range(6)]
    most_shared = 0
    with session(model, cpu_library, spec=spec, max_num_seqs=6, max_step_rows=128) as backend:
        audit = Audit(backend)

        def watch(events: list[object]) -> None:
            nonlocal most_shared
            audit(events)  # type: ignore[arg-type]
            most_shared = max(most_shared, int(audit.memory("pages")["refs"].max()))

        log = serve(backend, batch, each=watch)
        assert backend.free_pages() == 64
        assert audit.memory("state")["n_cached_pages"] > 0
    assert most_shared == 6
    for request in batch:
        assert log.tokens[request.request_id] == list(serial_text(model, cpu_library, request))


def test_a_shared_page_counts_once(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """Two requests over 48 shared tokens: 3 pages and one each; fragmentation sees the shared tokens once."""
    model = small("alphabet")
    with session(model, cpu_library, max_num_seqs=2) as backend:
        audit = Audit(backend)
        log = serve(backend, [ask(0, (*PREFIX, 3), 1)], each=audit)
        serve(backend, [ask(1, (*PREFIX, 4), 8), ask(2, (*PREFIX, 5), 8)], log=log, each=audit)
    together = [step for step in log.steps if step["n_decode"] == 2]
    assert together
    assert {step["pages_active"] for step in together} == {5}
    assert together[0]["live_pages"] == 5
    assert together[0]["live_tokens"] == 48 + 2 + 2


def filled_pages(model: Model, library: CpuLibrary, eviction: str) -> dict[int, int]:
    """Cached tokens of a hot prompt's third time, after strangers have filled the pool; 12 pages of 16."""
    hot, rng = PREFIX[:33], np.random.RandomState(7)
    batch = [ask(0, hot, 1), ask(1, hot, 1)]
    batch += [ask(10 + i, tuple(rng.randint(3, 17, 33).tolist()), 1) for i in range(9)]
    batch.append(ask(2, hot, 1))
    return one_by_one(model, library, batch, pages=12, kv={"eviction": eviction}).cached


def test_eviction_policies(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """LRU and FIFO lose a prefix that was used twice to strangers that come once; SLRU keeps it."""
    found = {policy: filled_pages(small("alphabet"), cpu_library, policy) for policy in ("lru", "fifo", "slru")}
    assert all(cached[1] == 32 for cached in found.values())
    assert {policy: cached[2] for policy, cached in found.items()} == {"lru": 0, "fifo": 0, "slru": 32}


def test_fifo_forgets_what_is_used_and_lru_does_not(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """A prefix used between strangers stays under LRU; FIFO counts from when it came."""
    rng = np.random.RandomState(9)
    batch = []
    for i in range(6):
        batch += [ask(2 * i, PREFIX[:33], 1), ask(2 * i + 1, tuple(rng.randint(3, 17, 33).tolist()), 1)]
    hits = {}
    for policy in ("lru", "fifo"):
        log = one_by_one(small("alphabet"), cpu_library, batch, pages=8, kv={"eviction": policy})
        hits[policy] = [log.cached[2 * i] for i in range(6)]
        assert sum(step["n_evictions"] for step in log.steps) > 0
    assert hits["lru"] == [0, 32, 32, 32, 32, 32]
    assert 0 in hits["fifo"][1:]


def test_the_end_of_a_sequence_goes_before_its_beginning(
    small: Callable[[str], Model], cpu_library: CpuLibrary
) -> None:
    """Under LRU a cached prompt shrinks from its end: what is left of it can still be found."""
    strangers = [ask(10 + i, (4 + i,) * 33, 1) for i in range(2)]
    batch = [ask(0, (*PREFIX, 5), 1), *strangers, ask(1, (*PREFIX, 5), 1)]
    log = one_by_one(small("alphabet"), cpu_library, batch, pages=6)
    assert log.cached[1] == 16
