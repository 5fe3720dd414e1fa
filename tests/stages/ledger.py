"""Pages and requests as the decision trace tells of them, entry by entry: each has to be possible where it stands.

A second account of the same pages: `Audit` counts the tables after a round, `Ledger` follows every event in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from xlpk.layout import TRACE_ENTRY, TraceKind

# What stands before an ADMIT.
_ADMITTING = (TraceKind.HOLD, TraceKind.PIN, TraceKind.EVICT, TraceKind.ALLOC, TraceKind.MOVE)
_FIELDS = TRACE_ENTRY.dtype.names or ()


class Ledger:
    """What is so after the entries that were `apply`-ed."""

    def __init__(self, pages: int, swap_pages: int) -> None:
        self.refs, self.content = [0] * pages, [0] * pages  # of each page; content 0: it cannot be found
        self.free = set(range(pages))
        self.pinned: set[int] = set()  # pages that one reference never leaves
        self.contents = 0  # that pages have had
        self.evicted: int | None = None  # which has to be allocated next
        self.places: dict[int, int] = {}  # of the swap space -> the request whose page lies there
        self.swap_pages = swap_pages
        self.state: dict[int, str] = {}  # request -> queued, running, preempted; ended ones are gone
        self.preempting: tuple[int, int, int] | None = None  # request, pages to swap, references to give back
        self.returning: list[int] = []  # places that were read for the request that is admitted next
        self.admitted_in = -1  # the last round that admitted somebody
        self.held = 0  # by the request that is admitted next
        self.counts: Counter[str] = Counter()
        self.planned: dict[str, int] = defaultdict(int)  # of the round's step
        self._ended: set[int] = set()

    def apply(self, entry: Any) -> None:
        """One TRACE_ENTRY, as a tuple."""
        fields = dict(zip(_FIELDS, entry, strict=True))
        kind = TraceKind(fields["kind"])
        assert self.evicted is None or kind is TraceKind.ALLOC, "an evicted page gets its new owner at once"
        if self.preempting and not any(self.preempting[1:]):
            self.preempting = None
        if kind is TraceKind.ADMIT:
            self.admitted_in = fields["round"]
        assert kind is not TraceKind.PREEMPT or self.admitted_in != fields["round"], (
            "nobody is admitted at another's cost"
        )
        getattr(self, kind.name.lower(), self.other)(*(fields[name] for name in ("value", "a", "b", "c")))
        self.counts[kind.name.lower()] += 1
        if kind is TraceKind.RELEASE and self.held:
            self.counts["twin"] += 1  # a page that two had computed
        if kind not in _ADMITTING:
            self.held = 0
        cached = sum(content != 0 and refs == 0 for content, refs in zip(self.content, self.refs, strict=True))
        active = sum(refs > 0 for refs in self.refs)
        assert len(self.free) + cached + active + (self.evicted is not None) == len(self.refs), kind

    def other(self, *_: int) -> None:
        """Kinds that move no page and no request."""

    def alloc(self, _value: int, page: int, *_: int) -> None:
        assert page == self.evicted if self.evicted is not None else page in self.free
        self.free.discard(page)
        self.evicted = None
        assert self.refs[page] == self.content[page] == 0
        self.refs[page] = 1

    def evict(self, content: int, page: int, *_: int) -> None:
        assert not self.free, "no cached page goes while there is a free one"
        assert self.refs[page] == 0, "only what nobody holds goes"
        assert self.content[page] == content != 0
        self.content[page], self.evicted = 0, page

    def hold(self, content: int, page: int, refs: int, _c: int) -> None:
        assert self.content[page] == content != 0
        self.refs[page] += 1
        self.held += 1
        assert self.refs[page] == refs

    def release(self, _value: int, page: int, refs: int, left: int) -> None:
        assert self.refs[page] > 0, "freed twice"
        self.refs[page] -= 1
        assert self.refs[page] == refs >= (page in self.pinned)
        assert left == (2 if refs else int(self.content[page] != 0))
        if left == 0:
            assert page not in self.free
            self.free.add(page)
        if self.preempting:
            request, swaps, pages = self.preempting
            assert swaps == 0, "pages are copied before they go"
            self.preempting = (request, 0, pages - 1)

    def pin(self, content: int, page: int, refs: int, _c: int) -> None:
        assert self.content[page] == content != 0
        assert page not in self.pinned
        assert self.refs[page] > 0, "by the request that pins it"
        self.pinned.add(page)
        self.refs[page] += 1
        assert self.refs[page] == refs

    def publish(self, content: int, page: int, *_: int) -> None:
        assert self.content[page] == 0
        assert self.refs[page] == 1, "a page that nobody else can know"
        self.contents += 1
        assert content == self.contents
        self.content[page] = content

    def move(self, _value: int, page: int, place: int, out: int) -> None:
        assert 0 <= place < self.swap_pages
        assert self.refs[page] > 0
        if out:
            assert self.preempting
            assert place not in self.places
            request, swaps, pages = self.preempting
            assert swaps > 0
            self.places[place] = request
            self.preempting = (request, swaps - 1, pages)
        else:
            assert self.refs[page] == 1
            assert place in self.places
            self.returning.append(place)

    def seen(self, request: int, *_: int) -> None:
        assert request not in self.state
        assert request not in self._ended
        self.state[request] = "queued"

    def admit(self, request: int, resumed: int, found: int, returned: int) -> None:
        assert self.state[request] == ("preempted" if resumed else "queued")
        assert self.held == found
        assert len(self.returning) == returned
        assert all(self.places[place] == request for place in self.returning)
        self.state[request] = "running"
        self.leave_swap(request)

    def preempt(self, request: int, pages: int, swapped: int, _c: int) -> None:
        assert self.state[request] == "running"
        assert self.preempting is None
        self.state[request] = "preempted"
        self.preempting = (request, swapped, pages)

    def finish(self, request: int, *_: int) -> None:
        del self.state[request]
        self._ended.add(request)
        self.leave_swap(request)

    def plan(self, *_: int) -> None:
        self.planned.clear()

    def rows(self, request: int, _first: int, count: int, chunk: int) -> None:
        assert self.state[request] == "running"
        self.planned["rows"] += count
        self.planned["chunks" if chunk else "decodes"] += 1

    def step(self, _number: int, rows: int, *_: int) -> None:
        assert self.planned["rows"] == rows > 0

    def leave_swap(self, request: int) -> None:
        self.places = {place: owner for place, owner in self.places.items() if owner != request}
        self.returning.clear()
