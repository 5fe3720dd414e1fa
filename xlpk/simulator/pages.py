"""The page pool: FREE -> ACTIVE (in page tables) -> CACHED (in none, found by its content) -> FREE or ACTIVE again.

A full page is addressable: it is found by its tokens and by the content of the page before it. The compiled pool
(kernels/stages/pages.h) finds it through a hash of the same.
"""

from __future__ import annotations

from collections import OrderedDict

from xlpk.layout import PROTECTED_SHARE, Eviction, TraceKind
from xlpk.simulator.trace import Trace

Key = tuple[int, tuple[int, ...]]  # content of the page before it (0: it is the first), its tokens

EVICT, ALLOC, HOLD, RELEASE = map(int, (TraceKind.EVICT, TraceKind.ALLOC, TraceKind.HOLD, TraceKind.RELEASE))
PUBLISH, DEMOTE, PIN = map(int, (TraceKind.PUBLISH, TraceKind.DEMOTE, TraceKind.PIN))
FREED, CACHED, HELD = range(3)  # what a RELEASE leaves


class Page:
    """One page. `content` numbers what it holds, 0 while it is not addressable."""

    __slots__ = ("content", "hits", "key", "pinned", "refs")

    def __init__(self) -> None:
        self.refs = 0  # page tables that have it, and its pin
        self.pinned = False  # it is held for good
        self.content = 0
        self.key: Key = (0, ())
        self.hits = 0  # requests that found it


class PagePool:
    """All pages of a session. Free ones lie on a stack, page 0 on top at first."""

    def __init__(self, n_pages: int, eviction: Eviction, trace: Trace | None = None) -> None:
        self.pages = [Page() for _ in range(n_pages)]
        self.free = list(range(n_pages - 1, -1, -1))
        self.n_cached = 0
        self.n_active = 0
        self.n_refs = 0
        self.n_pinned = 0
        self.n_evictions = 0
        self.n_contents = 0
        self._found: dict[Key, int] = {}
        # Oldest first. LRU and SLRU list cached pages by when they were let go, FIFO addressable ones by when they
        # became so. SLRU's second list has those that were found, up to all pages but one in PROTECTED_SHARE.
        self._lists: tuple[OrderedDict[int, None], OrderedDict[int, None]] = (OrderedDict(), OrderedDict())
        self._eviction = eviction
        self._trace = trace

    @property
    def n_unheld(self) -> int:
        """Pages that may be given out."""
        return len(self.free) + self.n_cached

    def find(self, key: Key) -> int | None:
        """The addressable page with these tokens behind this content."""
        return self._found.get(key)

    def take(self) -> int | None:
        """A page for a new owner: a free one, else a cached one whose content is forgotten; None: there is neither."""
        if self.free:
            page = self.free.pop()
        elif self.n_cached:
            page = self._next_victim()
            if self._trace:
                self._trace(EVICT, self.pages[page].content, page)
            self._unlist(page)
            self._forget(page)
            self.n_cached -= 1
            self.n_evictions += 1
        else:
            return None
        self.pages[page].refs = 1
        self.n_refs += 1
        self.n_active += 1
        if self._trace:
            self._trace(ALLOC, 0, page)
        return page

    def hold(self, page: int) -> None:
        """One more table has an addressable page."""
        entry = self.pages[page]
        entry.refs += 1
        self.n_refs += 1
        if entry.refs == 1:
            if self._eviction is not Eviction.FIFO:
                self._unlist(page)
            self.n_cached -= 1
            self.n_active += 1
        if self._trace:
            self._trace(HOLD, entry.content, page, entry.refs)

    def pin(self, page: int) -> None:
        """An addressable page is held for good."""
        entry = self.pages[page]
        if entry.pinned:
            return
        entry.pinned = True
        entry.refs += 1
        self.n_refs += 1
        self.n_pinned += 1
        if self._trace:
            self._trace(PIN, entry.content, page, entry.refs)

    def release(self, page: int) -> None:
        """One table less has the page; the last one leaves it cached if it is addressable, else free."""
        entry = self.pages[page]
        entry.refs -= 1
        self.n_refs -= 1
        if self._trace:
            becomes = HELD if entry.refs else CACHED if entry.content else FREED
            self._trace(RELEASE, 0, page, entry.refs, becomes)
        if entry.refs:
            return
        self.n_active -= 1
        if entry.content:
            self.n_cached += 1
            self._list_cached(page)
        else:
            self.free.append(page)

    def publish(self, page: int, key: Key) -> None:
        """A full page becomes addressable; its content is new."""
        entry = self.pages[page]
        self.n_contents += 1
        entry.content, entry.key, entry.hits = self.n_contents, key, 0
        self._found[key] = page
        if self._eviction is Eviction.FIFO:
            self._lists[0][page] = None
        if self._trace:
            self._trace(PUBLISH, entry.content, page)

    def _next_victim(self) -> int:
        """The cached page that the policy gives up first. FIFO walks past pages that are held."""
        for pages in self._lists:
            for page in pages:
                if self.pages[page].refs == 0:
                    return page
        raise AssertionError("no cached page is listed")

    def _unlist(self, page: int) -> None:
        for pages in self._lists:
            pages.pop(page, None)

    def _list_cached(self, page: int) -> None:
        if self._eviction is Eviction.FIFO:
            return  # listed since it became addressable
        probation, protected = self._lists
        if self._eviction is Eviction.LRU or self.pages[page].hits == 0:
            probation[page] = None
            return
        protected[page] = None
        if len(protected) > len(self.pages) - len(self.pages) // PROTECTED_SHARE:
            demoted, _ = protected.popitem(last=False)
            probation[demoted] = None
            if self._trace:
                self._trace(DEMOTE, 0, demoted)

    def _forget(self, page: int) -> None:
        entry = self.pages[page]
        del self._found[entry.key]
        entry.content = entry.hits = 0
