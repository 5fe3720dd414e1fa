"""A request inside the control plane: its tokens, where it stands, and the pages that it has."""

from __future__ import annotations

import enum
from typing import Any

from xlpk.layout import SlotState
from xlpk.simulator.rules import Rules, SimRequest

WAITING, PREFILL, DECODE, PREEMPTED, ENDED = (
    SlotState.WAITING,
    SlotState.PREFILL,
    SlotState.DECODE,
    SlotState.PREEMPTED,
    SlotState.FREE,
)


class Sequence:
    """The tokens of a request, prompt and output, and all that is known of them."""

    __slots__ = (
        "computed",
        "content",
        "deadline_ns",
        "drafts",
        "ends",
        "filtered",
        "in_rings",
        "keys",
        "limit",
        "memo",
        "n_addressable",
        "n_stored",
        "ngrams",
        "number",
        "pin",
        "prompt_len",
        "rank",
        "request",
        "request_id",
        "row_count",
        "share",
        "state",
        "swapped",
        "swapped_tokens",
        "table",
        "tokens",
    )

    def __init__(self, rules: Rules, request: SimRequest, number: int) -> None:
        self.request = request
        self.request_id = request.request_id
        self.number = number  # of its submission, from 0
        self.rank = 0
        self.deadline_ns = 0  # on the loop's clock; 0: none
        self.state: enum.IntEnum = WAITING
        self.in_rings = True  # it was never admitted, and has not ended
        self.tokens = list(request.prompt)
        self.prompt_len = len(request.prompt)
        self.limit = self.prompt_len + request.max_new_tokens
        eos_ids = frozenset() if request.ignore_eos else rules.eos_ids
        self.filtered = request.filtered
        self.ends = eos_ids | frozenset(request.stop_token_ids)
        self.computed = 0  # its first tokens, whose K and V are stored
        self.n_stored = 0  # most that were stored before a preemption
        self.row_count = 0  # rows of the step in flight
        self.drafts: list[int] = []
        self.table: list[int] = []  # its pages, in order
        self.share = request.share and rules.prefix_sharing
        self.pin = self.share and request.pin
        self.n_addressable = 0  # its first pages, that others can find
        self.content = 0  # of the last of these
        self.keys: list[tuple[int, ...]] = []  # tokens of its full pages, as far as anybody has asked
        self.swapped: list[int] = []  # places in the swap space of its first pages
        self.swapped_tokens = 0  # tokens in them
        self.ngrams: Any = None  # of the drafter
        self.memo: Any = None  # of whoever decides its tokens

    @property
    def n_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    def page_tokens(self, index: int, page_size: int) -> tuple[int, ...]:
        """The tokens of its full page `index`."""
        keys = self.keys
        while len(keys) <= index:
            begin = len(keys) * page_size
            keys.append(tuple(self.tokens[begin : begin + page_size]))
        return keys[index]
