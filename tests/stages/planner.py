"""The compiled control plane, driven round by round, over a forward pass that only remembers what was stored where.

All that a round did is held against what Python knows: `Ledger` follows its decisions, `Audit` counts the tables anew
and plans the step a second time, each row finds the tokens before it in the pages of its table, and each text is known.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from stages.audit import Audit
from stages.ledger import Ledger

from xlpk import layout
from xlpk.backend import Admitted, Event, Finished, Preempted, Resumed, StepDone, Token
from xlpk.backends.memory import (
    Limits,
    aligned_zeros,
    buffer_table,
    dims_record,
    session_values,
    start_values,
)
from xlpk.backends.play import MODEL
from xlpk.backends.submitter import _event, _step, _submission
from xlpk.kv import KVPlan
from xlpk.speculation import Keyed, NoSpec, Oracle, Proposer
from xlpk.toolchain import build_shared
from xlpk.workload import Request

VOCAB = 64
_MODEL = replace(MODEL, vocab_size=VOCAB, max_position_embeddings=4096)


def build(cache: Path, folder: Path | None = None) -> ctypes.CDLL:
    """planner.cpp over the kernels in `folder`; by default over ours."""
    source = Path(__file__).with_name("planner.cpp")
    return ctypes.CDLL(str(build_shared(source, cache, folder=folder).path))


@dataclass
class Asked:
    """A request and its fate. `text`: the whole output, known beforehand."""

    request: Request
    text: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    cancelled: bool = False
    expired: bool = False
    admitted: bool = False


class Planner:
    """Also what `Audit` needs of a backend."""

    def __init__(
        self,
        library: ctypes.CDLL,
        limits: Limits,
        *,
        pages: int,
        page_size: int,
        max_len: int = 48,
        prefix_sharing: bool = True,
        eviction: str = "lru",
        swap_pages: int = 0,
        block: int = 1,
        events: int = 256,
        records: int = 64,
        pinned_pages: int = 0,
    ) -> None:
        """`block`: of drafts that are the right answers but where a request says otherwise; 1: none. `pinned_pages`:
        that no request counts on."""
        self.library, self.limits, self.acceptance = library, limits, Keyed()
        self.spec: Proposer = Oracle(block=block, mismatch_stride=0) if block > 1 else NoSpec()
        self._plan = KVPlan(pages, page_size, 1, "bf16", max_len, prefix_sharing, eviction, swap_pages, pinned_pages)
        self._model = SimpleNamespace(config=_MODEL)
        shapes = buffer_table(_MODEL, self._plan, limits, warps=1, logits=False)
        shapes |= {name: ((events,), shapes[name][1]) for name in ("events", "logprobs")}
        shapes["step_records"] = ((records,), shapes["step_records"][1])
        shapes["trace"] = ((1024,), layout.TRACE_ENTRY.dtype)
        self._memory = {name: aligned_zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        start_values(self._memory, self._plan)
        self.params, self.dims = np.zeros((), layout.PARAMS.dtype), dims_record(_MODEL, self._plan)
        for name, buffer in self._memory.items():
            self.params[name] = buffer.ctypes.data if buffer.size else 0
        for name, value in session_values(_MODEL, self._plan, limits, self.spec, Keyed(), shapes).items():
            self.params[name] = value
        self.params["trace_capacity"] = 1024
        self.audit = Audit(self)  # type: ignore[arg-type]
        self.ledger = Ledger(pages, swap_pages)
        self.stored = np.full((pages, page_size), -1)  # token + VOCAB * position
        self.swapped = np.full((swap_pages, page_size), -1)
        self.asked: dict[int, Asked] = {}
        self.causes: Counter[str] = Counter()
        self.failed = False
        self.now_ns = 10**6

    # ------------------------------------------------------------------------------------------ the host's side

    @property
    def most_tokens(self) -> int:
        """Positions of a request at most, beside what may be pinned."""
        return min(self._plan.max_len, self._plan.usable_pages * self._plan.page_size)

    @property
    def pinned_pages(self) -> set[tuple[int, ...]]:
        """What is pinned, or will be: each page as the tokens up to its end."""
        size = self._plan.page_size
        prompts = [asked.request.prompt for asked in self.asked.values() if asked.request.pin]
        return {prompt[:end] for prompt in prompts for end in range(size, len(prompt) + 1, size)}

    def submit(self, request: Request, text: Sequence[int]) -> bool:
        """False: a ring is full. `text`: the tokens that sampling will find; `request.oracle`: what is drafted."""
        mailbox = self._memory["mailbox"][0]
        record, tokens = _submission(request)
        if mailbox["submit_tail"] - mailbox["submit_head"] >= self.params["submission_capacity"]:
            return False
        if mailbox["prompt_tail"] + tokens.size - mailbox["prompt_head"] > self.params["prompt_capacity"]:
            return False
        prompts, submissions = self._memory["prompts"], self._memory["submissions"]
        begin = int(mailbox["prompt_tail"])
        prompts[(begin + np.arange(tokens.size)) % prompts.size] = tokens
        record["prompt_begin"] = begin
        submissions[int(mailbox["submit_tail"]) % submissions.size] = record
        mailbox["prompt_tail"] += tokens.size
        mailbox["submit_tail"] += 1
        self.asked[request.request_id] = Asked(request, tuple(text))
        return True

    def cancel(self, request_id: int) -> None:
        mailbox, cancels = self._memory["mailbox"][0], self._memory["cancels"]
        assert mailbox["cancel_tail"] - mailbox["cancel_head"] < cancels.size
        cancels[int(mailbox["cancel_tail"]) % cancels.size] = request_id
        mailbox["cancel_tail"] += 1
        if request_id in self.asked:
            self.asked[request_id].cancelled = True

    def expire(self, request_id: int) -> None:
        """The deadline of a request that the loop has seen is now."""
        state, queue = self._memory["state"][0], self._memory["queue"]
        for slot in self._memory["slots"]:
            if slot["state"] and slot["request_id"] == request_id:
                slot["deadline_ns"] = 1
        for entry in self._memory["heap"][: state["n_queued"]]:
            if entry["slot"] < 0 and queue[int(entry["number"]) % queue.size]["request_id"] == request_id:
                queue[int(entry["number"]) % queue.size]["deadline_ns"] = 1
        state["next_deadline_ns"] = 1
        self.asked[request_id].expired = True

    def part(self, request_id: int) -> str:
        """Where a request is: `unseen`, `queued` without a slot, or its slot's state."""
        slots, state = self._memory["slots"], self._memory["state"][0]
        for slot in slots[slots["state"] != 0]:
            if slot["request_id"] == request_id:
                return str(layout.SlotState(int(slot["state"])).name.lower())
        mailbox = self._memory["mailbox"][0]
        unseen = range(int(state["submit_seen"]), int(mailbox["submit_tail"]))
        submissions = self._memory["submissions"]
        return (
            "unseen"
            if any(submissions[at % submissions.size]["request_id"] == request_id for at in unseen)
            else "queued"
        )

    @property
    def open(self) -> list[int]:
        """Ids of requests whose end was not seen, in order."""
        return [request_id for request_id, asked in self.asked.items() if not asked.reason]

    # ------------------------------------------------------------------------------------------ a round

    def round(self, *, away: bool = False) -> None:
        """One round of control and the step that it planned. `away`: the host takes no events."""
        self.failed = True  # until all of it was checked
        self.now_ns += 1000
        records = (ctypes.c_void_p(record.ctypes.data) for record in (self.params, self.dims))
        self.library.planner_round(*records, ctypes.c_uint64(self.now_ns))
        assert self._memory["grid"][0]["abort"] == 0, layout.AbortReason(int(self._memory["grid"][0]["abort"])).name
        if self._memory["step"][0]["n_rows"]:
            self.forward()
        self.follow()
        events = [] if away else self.take()
        self.audit(events)
        self.note(events)
        self.failed = False

    def forward(self) -> None:
        """Moves pages, stores each row's token, finds all that it attends to, samples what the request's text says."""
        step, page_size = self._memory["step"][0], self._plan.page_size
        for move in self._memory["moves"][: step["n_moves"]]:
            page, place = int(move["page"]), int(move["swap_page"])
            if move["out"]:
                self.swapped[place] = self.stored[page]
            else:
                self.stored[page] = self.swapped[place]
            self.causes["swapped out" if move["out"] else "swapped in"] += 1
        table, refs = self._memory["page_table"], self._memory["pages"]["refs"]
        rows = self._memory["rows"][: step["n_rows"]]
        for row in rows:
            slot, position = int(row["slot"]), int(row["position"])
            page = table[slot, position // page_size]
            assert refs[page] == 1, f"page {page}, which is written, has more holders than one"
            self.stored[page, position % page_size] = row["token"] + VOCAB * position
        for row in rows:
            slot, position = int(row["slot"]), int(row["position"])
            s = self._memory["slots"][slot]
            asked = self.asked[int(s["request_id"])]
            done = int(s["length"] - s["prompt_len"])
            known = [*asked.request.prompt, *asked.text[:done], *s["drafts"][: s["n_drafts"]].tolist()]
            self.causes["shared pages read"] += int((refs[table[slot, : position // page_size]] > 1).any())
            found = self.stored[table[slot, : position // page_size + 1]].ravel()[: position + 1]
            expected = np.asarray(known[: position + 1]) + VOCAB * np.arange(position + 1)
            assert (found == expected).all(), f"request {asked.request.request_id}, position {position}"
            if row["sample_row"] >= 0:
                at = position + 1 - int(s["prompt_len"])
                token = asked.text[at] if at < len(asked.text) else 0
                self._memory["best"][row["sample_row"]] = (1 << 32) | (0xFFFFFFFF - token)

    def follow(self) -> None:
        """The round's decisions, one by one; then the tables say what the decisions do."""
        mailbox, ring, state = self._memory["mailbox"][0], self._memory["trace"], self._memory["state"][0]
        assert mailbox["trace_lost"] == 0
        for at in range(int(mailbox["trace_head"]), int(mailbox["trace_tail"])):
            self.ledger.apply(ring[at % ring.size].tolist())
        mailbox["trace_head"] = mailbox["trace_tail"]
        pages, slots, ledger = self._memory["pages"], self._memory["slots"], self.ledger
        assert pages["refs"].tolist() == ledger.refs
        assert pages["content"].tolist() == ledger.content
        assert set(np.flatnonzero(pages["pinned"]).tolist()) == ledger.pinned
        assert len(ledger.pinned) <= len(self.pinned_pages), "the full pages of pinned prompts, and no others"
        assert set(self._memory["free_pages"][: state["n_free_pages"]].tolist()) == ledger.free
        assert set(self._memory["swap_free"][: state["n_free_swap"]].tolist()).isdisjoint(ledger.places)
        assert state["n_free_swap"] + len(ledger.places) == ledger.swap_pages
        known = Counter(ledger.state.values())
        assert (known["running"], known["preempted"]) == (state["n_order"], state["n_preempted"])
        assert known["queued"] + known["preempted"] == state["n_queued"]
        running = slots["request_id"][self._memory["order"][: state["n_order"]]].tolist()
        assert all(ledger.state[request_id] == "running" for request_id in running)

    def take(self) -> list[Event]:
        """What was published since."""
        mailbox, out = self._memory["mailbox"][0], []
        for kind, make in (("event", _event), ("step", _step)):
            ring = self._memory["events" if kind == "event" else "step_records"]
            head, tail = int(mailbox[f"{kind}_head"]), int(mailbox[f"{kind}_tail"])
            assert tail - head <= ring.size, "the loop wrote over what the host has not read"
            out += [make(ring[at % ring.size].tolist(), 0) for at in range(head, tail)]  # type: ignore[operator]
            mailbox[f"{kind}_head"] = tail
        return out

    def note(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, StepDone):
                for name in ("n_evictions", "n_preemptions", "n_recomputed_rows", "n_accepted"):
                    self.causes[name] += event.values[name]
                self.causes["rejected"] += event.values["n_draft_rows"] - event.values["n_accepted"]
                continue
            asked = self.asked[event.request_id]
            assert not asked.reason, "a request ends once"
            if isinstance(event, Token):
                asked.tokens.append(event.token)
            elif isinstance(event, Admitted):
                asked.admitted = True
                assert event.n_cached < len(asked.request.prompt), "the last token is computed"
                self.causes["found"] += event.n_cached > 0
            elif isinstance(event, Preempted | Resumed):
                assert asked.admitted
                self.causes[type(event).__name__.lower()] += 1
            elif isinstance(event, Finished):
                asked.reason = event.reason
                self.causes[event.reason] += 1
                self.check_text(asked)

    def check_text(self, asked: Asked) -> None:
        whole = asked.text
        for stop in asked.request.stop_token_ids:
            whole = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert tuple(asked.tokens) == whole[: len(asked.tokens)]
        if asked.reason in ("length", "stop"):
            assert tuple(asked.tokens) == whole
        else:
            assert asked.cancelled if asked.reason == "cancelled" else asked.expired and asked.reason == "deadline"

    def finish(self) -> None:
        """Everything ends, and nothing is left."""
        for _ in range(3000):
            if not self.open:
                break
            self.round()
        assert not self.open, "some requests never end"
        self.round()
        state, mailbox = self._memory["state"][0], self._memory["mailbox"][0]
        pages = self._memory["pages"]
        assert state["n_free_pages"] + state["n_cached_pages"] + pages["pinned"].sum() == self._plan.pages
        assert (pages["refs"] == pages["pinned"]).all()
        assert state["n_free_swap"] == self._plan.swap_pages
        assert mailbox["submit_head"] == mailbox["submit_tail"]
        assert mailbox["prompt_head"] == mailbox["prompt_tail"]
