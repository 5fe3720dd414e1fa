"""The pages of sequences: they grow with the tokens, full ones become addressable, and all go in the end."""

from __future__ import annotations

from xlpk.layout import TraceKind
from xlpk.simulator.pages import PagePool
from xlpk.simulator.rules import Rules
from xlpk.simulator.sequence import WAITING, Sequence
from xlpk.simulator.trace import Trace

MOVE = int(TraceKind.MOVE)


class KV:
    """Page tables over one pool, and the swap space. `moves`: copies ordered for the next step, by request."""

    def __init__(self, rules: Rules, trace: Trace | None = None) -> None:
        self.pool = PagePool(rules.n_pages, rules.eviction, trace)
        self.free_places = list(range(rules.n_swap_pages - 1, -1, -1))  # a stack
        self.moves: list[Sequence] = []
        self._page_size = rules.page_size
        self._trace = trace

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Gives pages until they hold `tokens` tokens; False: there are no more, and it keeps what it got."""
        while len(sequence.table) * self._page_size < tokens:
            page = self.pool.take()
            if page is None:
                return False
            sequence.table.append(page)
        return True

    def shrink(self, sequence: Sequence, tokens: int) -> None:
        """Gives back the pages behind those that hold `tokens` tokens, the last one first."""
        kept = self.pages_for(tokens)
        while len(sequence.table) > kept:
            self.pool.release(sequence.table.pop())

    def publish(self, sequence: Sequence, stored: int) -> None:
        """Makes the full pages of the first `stored` tokens addressable.

        A page that another request has made so meanwhile takes the place of the sequence's own.
        """
        if not sequence.share:
            return
        while (sequence.n_addressable + 1) * self._page_size <= stored:
            index = sequence.n_addressable
            key = (sequence.content, sequence.page_tokens(index, self._page_size))
            own, other = sequence.table[index], self.pool.find(key)
            if other is None:
                self.pool.publish(own, key)
            else:
                self.pool.hold(other)
                sequence.table[index] = other
                self.pool.release(own)
            page = sequence.table[index]
            sequence.content = self.pool.pages[page].content
            sequence.n_addressable += 1
            if sequence.pin and sequence.n_addressable * self._page_size <= sequence.prompt_len:
                self.pool.pin(page)

    def find_shared(self, sequence: Sequence) -> list[int]:
        """Addressable pages with the first tokens, up to the last page boundary before the last token.

        The last token has to be computed to be sampled from.
        """
        found: list[int] = []
        if sequence.share:
            content = 0
            while (len(found) + 1) * self._page_size < len(sequence.tokens):
                page = self.pool.find((content, sequence.page_tokens(len(found), self._page_size)))
                if page is None:
                    break
                found.append(page)
                content = self.pool.pages[page].content
        return found

    def hold_shared(self, sequence: Sequence, found: list[int]) -> None:
        """The sequence has what was found for it, and starts behind it."""
        for index, page in enumerate(found):
            self.pool.hold(page)
            if sequence.pin and (index + 1) * self._page_size <= sequence.prompt_len:  # it may find its output too
                self.pool.pin(page)
            self.pool.pages[page].hits += sequence.state is WAITING  # who comes back finds its own
        sequence.table = list(found)
        sequence.n_addressable = len(found)
        sequence.computed = len(found) * self._page_size
        sequence.content = self.pool.pages[found[-1]].content if found else 0

    def pages_to_swap(self, sequence: Sequence) -> int:
        """All pages that hold stored tokens if the swap space has room for them, else none."""
        count = self.pages_for(sequence.computed)
        return count if count <= len(self.free_places) else 0

    def swap_out(self, sequence: Sequence, count: int) -> None:
        """Orders the copies of its first `count` pages."""
        for page in sequence.table[:count]:
            place = self.free_places.pop()
            sequence.swapped.append(place)
            self._move(sequence, page, place, out=1)
        sequence.swapped_tokens = sequence.computed

    def swap_in(self, sequence: Sequence) -> int:
        """Gives it pages for what it has in the swap space behind the prefix that it shares -> how many."""
        before = len(sequence.table)
        if len(sequence.swapped) > before:
            for place in sequence.swapped[before:]:
                page = self.pool.take()
                assert page is not None, "it was admitted"
                self._move(sequence, page, place, out=0)
                sequence.table.append(page)
            sequence.computed = sequence.swapped_tokens
        return len(sequence.table) - before

    def release_swap(self, sequence: Sequence) -> None:
        while sequence.swapped:
            self.free_places.append(sequence.swapped.pop())
        sequence.swapped_tokens = 0

    def drop_moves(self, sequence: Sequence) -> bool:
        """Copies that were ordered for it and not carried out are dropped; whether there were any."""
        if not self.moves:
            return False
        kept = [owner for owner in self.moves if owner is not sequence]
        dropped = len(kept) < len(self.moves)
        self.moves = kept
        return dropped

    def _move(self, sequence: Sequence, page: int, place: int, out: int) -> None:
        self.moves.append(sequence)
        if self._trace:
            self._trace(MOVE, 0, page, place, out)
