"""Who waits, in a binary heap by (rank, number); the smallest goes first.

Ranks do not change while a request waits: ageing is in them. The order in which the heap holds the others is the order
in which the deadlines of one round end them, so it is the compiled heap's (kernels/stages/queue.h).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from xlpk.layout import TOKENS_PER_LEVEL, Policy
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.sequence import Sequence


def rank_of(rules: Rules, request: SimRequest, n_steps: int) -> int:
    """Under PRIORITY the step of arrival plus `ageing_steps` a level; SHORTEST_PROMPT has a level for 16 tokens."""
    if rules.policy is Policy.PRIORITY:
        return n_steps + rules.ageing_steps * request.priority
    if rules.policy is Policy.SHORTEST_PROMPT:
        return n_steps + rules.ageing_steps * (len(request.prompt) // TOKENS_PER_LEVEL)
    return 0


class Waiting:
    """Requests that were never admitted, and those that were preempted."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        """As the heap holds them."""
        return (sequence for _, _, sequence in self._heap)

    def __getitem__(self, at: int) -> Sequence:
        """The sequence at this place of the heap."""
        return self._heap[at][2]

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.rank, sequence.number, sequence))

    def pop(self) -> Sequence:
        return heapq.heappop(self._heap)[2]

    def remove(self, sequence: Sequence) -> None:
        """The heap's last entry takes its place, and moves up or down."""
        heap = self._heap
        at = next(i for i, (_, _, other) in enumerate(heap) if other is sequence)
        entry = heap.pop()
        if at == len(heap):
            return
        while at > 0 and entry[:2] < heap[(at - 1) // 2][:2]:
            heap[at] = heap[(at - 1) // 2]
            at = (at - 1) // 2
        while (child := 2 * at + 1) < len(heap):
            if child + 1 < len(heap) and heap[child + 1][:2] < heap[child][:2]:
                child += 1
            if not heap[child][:2] < entry[:2]:
                break
            heap[at] = heap[child]
            at = child
        heap[at] = entry
