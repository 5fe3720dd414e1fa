"""Bugs that other engines had, one test each, on the compiled control plane round by round (`stages.planner`)."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from kinds import CACHE
from stages.planner import VOCAB, Planner, build

from xlpk.backend import Admitted, Event, Resumed, StepDone
from xlpk.backends.memory import Limits
from xlpk.workload import Request

PAGE = 4  # tokens


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(CACHE)


class Watched(Planner):
    """Keeps all events."""

    def __init__(self, library: ctypes.CDLL, *, running: int = 4, pages: int = 32, **options: Any) -> None:
        super().__init__(library, Limits(running, 64, 32, 8), pages=pages, page_size=PAGE, **options)
        self.events: list[Event] = []
        self.next_id = 0

    def note(self, events: list[Event]) -> None:
        super().note(events)
        self.events += events

    def ask(self, prompt: range, new: int, *, wrong: bool = False) -> int:
        """Submits a prompt of these tokens; output token i is `i`, or what its draft says wrongly. -> its id"""
        text = [i % VOCAB for i in range(new)]
        drafts = [(token + wrong) % VOCAB for token in text] if self.spec.block > 1 else []
        self.next_id += 1
        request = Request(self.next_id, tuple(prompt), new, ignore_eos=True, oracle=tuple(drafts))
        assert self.submit(request, text)
        return self.next_id

    def until_ended(self, *request_ids: int) -> None:
        while any(not self.asked[request_id].reason for request_id in request_ids):
            self.round()

    def table(self, request_id: int) -> list[int]:
        """Pages of a running request."""
        ((slot, s),) = [(slot, s) for slot, s in self.audit.running() if s["request_id"] == request_id]
        return self._memory["page_table"][slot, : s["n_pages"]].tolist()  # type: ignore[no-any-return]

    def refs(self, pages: list[int]) -> list[int]:
        return self._memory["pages"]["refs"][pages].tolist()  # type: ignore[no-any-return]

    def places(self, page: int) -> int:
        """How often a page stands among the free ones and on the lists of cached ones."""
        free = self._memory["free_pages"][: self._memory["state"][0]["n_free_pages"]].tolist()
        return int(free.count(page) + self.audit.in_lists().count(page))


def test_a_page_listed_twice_is_freed_once(library: ctypes.CDLL) -> None:
    """Two compute the same prompt at once; the pages of one take the place of the other's, and each ends by itself."""
    planner = Watched(library)
    short, long = planner.ask(range(9), 2), planner.ask(range(9), 6)
    for _ in range(2):
        planner.round()
    assert planner.ledger.counts["twin"] == 2
    shared = planner.table(short)[:2]
    assert planner.table(long)[:2] == shared
    assert planner.refs(shared) == [2, 2]
    planner.until_ended(short)
    assert planner.refs(shared) == [1, 1]
    assert [planner.places(page) for page in shared] == [0, 0]
    planner.until_ended(long)
    assert planner.refs(shared) == [0, 0]
    assert [planner.places(page) for page in shared] == [1, 1]
    planner.finish()


def test_a_page_is_not_freed_while_a_step_reads_it(library: ctypes.CDLL) -> None:
    """Who filled a prefix is cancelled while a step of another reads it, and a third takes every page that there is."""
    planner = Watched(library, pages=12)
    first, second = planner.ask(range(9), 20), planner.ask(range(9), 20)
    for _ in range(3):
        planner.round()
    read = planner.table(second)
    assert planner.refs(read)[:2] == [2, 2]
    planner.cancel(first)
    third = planner.ask(range(30, 60), 4)
    least = planner._plan.pages
    for _ in range(6):
        planner.round()
        least = min(least, int(planner._memory["state"][0]["n_free_pages"]))
        assert set(read) <= set(planner.table(second))
        assert not any(planner.places(page) for page in read)
    assert planner.asked[first].reason == "cancelled"
    assert least == 0
    assert planner.asked[third].admitted
    planner.finish()  # every row has found what it reads


def test_hits_count_neither_retries_nor_recomputation(library: ctypes.CDLL) -> None:
    """A prompt that is looked up in many rounds before there are pages counts once; what comes back counts never."""
    planner = Watched(library, running=2, pages=11)
    warm = planner.ask(range(9), 1)
    planner.until_ended(warm)
    large = planner.ask(range(20, 54), 3)  # 9 pages
    planner.round()
    refused = planner.ask(range(9), 2)  # finds 2 pages, and waits for a third
    waited = 0
    while planner.open:
        planner.round()
        waited += not planner.asked[refused].admitted
    assert waited > 1
    grows = planner.ask(range(20, 40), 20)  # to 10 pages
    planner.round()
    preempted = planner.ask(range(9), 14)
    planner.until_ended(grows, preempted)
    admitted = [(event.request_id, event.n_cached) for event in planner.events if isinstance(event, Admitted)]
    assert admitted == [(warm, 0), (large, 0), (refused, 8), (grows, 20 - PAGE), (preempted, 8)]
    resumed = [event for event in planner.events if isinstance(event, Resumed)]
    assert {event.request_id for event in resumed} == {preempted}
    assert any(event.n_cached for event in resumed)
    planner.finish()


def test_a_partly_filled_page_fills_up(library: ctypes.CDLL) -> None:
    """A prompt ends within a page, decoding fills it: its tokens are counted one by one, and then it can be found."""
    planner = Watched(library, running=1)
    first = planner.ask(range(PAGE + 1), 8)
    planner.until_ended(first)
    planner.round()
    steps = [event.values for event in planner.events if isinstance(event, StepDone)]
    assert [step["live_tokens"] for step in steps] == [*range(PAGE + 1, PAGE + 8), 0]
    assert [step["live_pages"] for step in steps] == [2, 2, 2, 2, 3, 3, 3, 0]
    turn = [*range(PAGE + 1), *range(8), 60]  # the prompt, its answer, and a new question
    second = planner.ask(turn, 1)  # type: ignore[arg-type]
    planner.until_ended(second)
    ((found,),) = [[e.n_cached for e in planner.events if isinstance(e, Admitted) and e.request_id == second]]
    assert found == (PAGE + 1 + 7) // PAGE * PAGE  # the last token of an output is not stored
    planner.finish()


def test_prompt_pages_stay_when_drafts_are_rejected(library: ctypes.CDLL) -> None:
    """Every draft is wrong: its pages come and go behind the prompt's, which nothing touches."""
    planner = Watched(library, running=1, block=9)
    request = planner.ask(range(PAGE + 2), 20, wrong=True)
    planner.round()
    prompt = planner.table(request)
    assert len(prompt) == 2
    sizes = set()
    while not planner.asked[request].reason:
        planner.round()
        if planner.asked[request].reason:
            break
        assert planner.table(request)[:2] == prompt
        assert planner.refs(prompt) == [1, 1]
        sizes.add(len(planner.table(request)) - -(-(PAGE + 2 + len(planner.asked[request].tokens)) // PAGE))
    steps = [event.values for event in planner.events if isinstance(event, StepDone)]
    assert sum(step["n_draft_rows"] for step in steps) > 50
    assert sum(step["n_accepted"] for step in steps) == 0
    assert max(step["pages_draft"] for step in steps) == 2
    assert max(sizes) == 2
    planner.finish()


@pytest.mark.parametrize("length", [PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 1, 3 * PAGE, 3 * PAGE + 1])
def test_no_hit_over_the_last_token(library: ctypes.CDLL, length: int) -> None:
    """The last prompt token is computed even if all of its pages are known: there is something to sample from."""
    planner = Watched(library, running=1)
    for _ in range(2):
        planner.until_ended(planner.ask(range(length), 6))
    found = [event.n_cached for event in planner.events if isinstance(event, Admitted)]
    assert found == [0, (length - 1) // PAGE * PAGE]
    steps = [event.values for event in planner.events if isinstance(event, StepDone)]
    assert sum(step["n_prefill_rows"] for step in steps) == 2 * length - found[1]
    assert min(step["n_prefill_rows"] for step in steps if step["n_prefill"]) > 0
    planner.finish()
