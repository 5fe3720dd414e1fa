"""The control plane between two polls of the launched orchestration, held against a second version of its rules.

After a poll the buffers hold the step that has just run and is not committed yet. `Audit` recomputes what that step had
to be (drafts, rows, pages) from the slots' states, and checks the commit that the next poll publishes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import Admitted, Event, Finished, StepDone, Token
from xlpk.backends.cpu import CpuBackend
from xlpk.speculation import Forced, Greedy, Ngram, NoSpec, Oracle

PREFILL, DECODE, PREEMPTED = (int(getattr(layout.SlotState, name)) for name in ("PREFILL", "DECODE", "PREEMPTED"))


@dataclass
class Planned:
    """What the step in flight was planned to be."""

    record: dict[str, int]  # fields of its StepRecord that are known
    drafts: dict[int, list[int]]  # by request id, of decoding requests
    lengths: dict[int, int]  # output tokens before the step, by request id
    computed: dict[int, int]  # tokens stored after the step but for accepted drafts, by request id
    picks: dict[int, list[tuple[int, int]]]  # (keyed sample, argmax) of each row of decoding requests, by request id


@dataclass
class Audit:
    """Call it with the events of every poll."""

    backend: CpuBackend
    planned: dict[int, Planned] = field(default_factory=dict)  # by step
    admitted: list[int] = field(default_factory=list)  # request ids, in order
    n_steps: int = 0
    n_proposed: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    drafts_cut: int = 0  # drafts that the row cap took away
    chunks_cut: int = 0  # prompt tokens that the row cap took away
    draft_pages: int = 0

    def __call__(self, events: list[Event]) -> None:
        self.admitted += [event.request_id for event in events if isinstance(event, Admitted)]
        self.check_commits(events)
        self.check_pages()
        if self.memory("step")["n_rows"]:
            self.check_plan()

    def memory(self, name: str) -> Any:
        assert self.backend._memory is not None
        buffer = self.backend._memory[name]
        return buffer[0] if name in ("state", "step", "mailbox", "record") else buffer

    def running(self) -> list[tuple[int, Any]]:
        """(slot, its record), oldest first."""
        order = self.memory("order")[: self.memory("state")["n_order"]].tolist()
        assert len(set(order)) == len(order)
        return [(slot, self.memory("slots")[slot]) for slot in order]

    def is_preempted(self, slot: int) -> bool:
        return slot >= 0 and bool(self.memory("slots")["state"][slot] == PREEMPTED)

    def pages_for(self, tokens: int) -> int:
        assert self.backend._plan is not None
        return self.backend._plan.pages_for(tokens)

    # ------------------------------------------------------------------------------------------ pages

    def check_pages(self) -> None:
        """Every page is free, cached, or held by as many tables as it says; whoever finds a page finds equal tokens."""
        state, pages, page_size = self.memory("state"), self.memory("pages"), self.memory("page_tokens").shape[1]
        running = self.running()
        ranks = [(int(s["rank"]), int(s["number"])) for _, s in running]
        assert ranks == sorted(ranks)
        refs = np.zeros(pages.size, int)
        for slot, s in running:
            table = self.memory("page_table")[slot, : s["n_pages"]]
            assert len(set(table.tolist())) == s["n_pages"]
            refs[table] += 1
            assert s["n_addressable"] * page_size <= s["computed"] <= s["n_pages"] * page_size
            parent = 0
            for index, page in enumerate(table[: s["n_addressable"]].tolist()):
                own = self.memory("tokens")[slot, index * page_size : (index + 1) * page_size]
                assert pages["content"][page] != 0
                assert pages["parent"][page] == parent
                assert self.memory("page_tokens")[page].tolist() == own.tolist()
                parent = int(pages["content"][page])
            assert s["content"] == parent
            assert not pages["content"][table[s["n_addressable"] :]].any()
        refs += pages["pinned"]
        assert pages["pinned"].sum() == state["n_pinned_pages"]
        np.testing.assert_array_equal(pages["refs"], refs)
        free = self.memory("free_pages")[: state["n_free_pages"]]
        assert len(set(free.tolist())) == free.size
        assert not refs[free].any()
        assert not pages["content"][free].any()
        addressable = pages["content"] != 0
        assert (addressable[refs == 0]).sum() == state["n_cached_pages"]
        assert (refs > 0).sum() == state["n_active_pages"]
        assert free.size + state["n_cached_pages"] + state["n_active_pages"] == pages.size
        assert refs.sum() == state["n_refs"]
        contents = pages["content"][addressable].tolist()
        assert len(set(contents)) == len(contents)
        assert self.in_buckets() == set(np.flatnonzero(addressable).tolist())
        fifo = self.backend._plan.eviction == "fifo"
        listed = addressable if fifo else addressable & (refs == 0)
        assert sorted(self.in_lists()) == np.flatnonzero(listed).tolist()
        states = {int(s): slot for slot, s in enumerate(self.memory("slots")["state"]) if s}
        assert not set(states) - {int(one) for one in layout.SlotState}
        heap = self.memory("heap")[: state["n_queued"]]
        parked = {int(entry["slot"]) for entry in heap if entry["slot"] >= 0}
        busy = {slot for slot, _ in running}
        assert not parked & busy
        for slot, s in enumerate(self.memory("slots")):
            assert (s["state"] != int(layout.SlotState.FREE)) == (slot in busy | parked)
            assert (s["state"] in (PREFILL, DECODE)) == (slot in busy)
        keys = [(int(entry["rank"]), int(entry["number"])) for entry in heap]
        assert all(keys[(at - 1) // 2] < keys[at] for at in range(1, len(keys)))
        assert state["n_preempted"] == sum(map(self.is_preempted, parked))
        self.check_swap(running)

    def check_swap(self, running: list[tuple[int, Any]]) -> None:
        """A place of the swap space is free, or has a page of one preempted request. Copies that were ordered and not
        carried out yet are on their way back to pages of running requests."""
        state, slots = self.memory("state"), self.memory("slots")
        places = self.memory("swap_free")[: state["n_free_swap"]].tolist()
        for slot, s in enumerate(slots):
            if s["state"] and s["n_swapped"]:
                assert s["state"] == PREEMPTED
                assert self.pages_for(int(s["swapped_tokens"])) == s["n_swapped"]
                places += self.memory("swap_table")[slot, : s["n_swapped"]].tolist()
        assert sorted(places) == list(range(self.memory("swap_free").size))
        tables = {slot: self.memory("page_table")[slot, : s["n_pages"]].tolist() for slot, s in running}
        for move in self.memory("moves")[: state["n_moves"]]:
            assert not move["out"]
            assert move["page"] in tables[int(move["slot"])]

    def in_buckets(self) -> set[int]:
        """Pages that a hash leads to, each from its own bucket."""
        pages, buckets, found = self.memory("pages"), self.memory("buckets"), set()
        for number, page in enumerate(buckets.tolist()):
            while page >= 0:
                assert page not in found
                assert int(pages["hash"][page]) % buckets.size == number
                found.add(page)
                page = int(pages["bucket_next"][page])
        return found

    def in_lists(self) -> list[int]:
        """Pages of the eviction lists, oldest first, walked in both directions."""
        state, pages, out = self.memory("state"), self.memory("pages"), []
        for which in range(2):
            line, page = [], int(state["oldest"][which])
            while page >= 0:
                assert pages["list"][page] == which
                line.append(page)
                page = int(pages["newer"][page])
            back, page = [], int(state["newest"][which])
            while page >= 0:
                back.append(page)
                page = int(pages["older"][page])
            assert back == line[::-1]
            assert len(line) == state["n_listed"][which]
            out += line
        return out

    # ------------------------------------------------------------------------------------------ the step

    def chunk(self, s: Any) -> int:
        end = int(s["prompt_len"] if s["length"] == s["prompt_len"] else s["length"] - 1)
        return min(end - int(s["computed"]), self.backend.limits.prefill_chunk)

    def room(self, s: Any) -> int:
        """Tokens for which the slot has pages behind those that are stored."""
        return int(s["n_pages"] * self.memory("page_tokens").shape[1] - s["computed"])

    def propose(self, slot: int, s: Any, count: int) -> list[int]:
        spec = self.backend.spec
        tokens = self.memory("tokens")[slot, : s["length"]].tolist()
        if isinstance(spec, Ngram):
            return spec.propose(tokens, count)
        if isinstance(spec, Oracle):
            done = int(s["length"] - s["prompt_len"])
            answers = self.memory("oracle")[slot, done : s["oracle_len"] - 1].tolist()[:count]
            stride, vocab = spec.mismatch_stride, self.backend._model.config.vocab_size
            return [
                (answer + 1) % vocab if stride > 0 and (done + j + 1) % stride == 0 else answer
                for j, answer in enumerate(answers)
            ]
        assert isinstance(spec, NoSpec)
        return []

    def pick(self, row: int) -> tuple[int, int]:
        """The step's (keyed sample, argmax) for a row; decode rows come first, so they are the first sampled ones."""
        keyed, greedy = (0xFFFFFFFF - (int(word) & 0xFFFFFFFF) for word in self.memory("best")[row])
        return keyed, greedy

    def check_plan(self) -> None:
        limits, step, running = self.backend.limits, self.memory("step"), self.running()
        decoding = [(slot, s) for slot, s in running if s["state"] == DECODE]
        prefilling = [(slot, s) for slot, s in running if s["state"] == PREFILL]
        assert len(decoding) + len(prefilling) == len(running)
        spare = max(0, limits.max_step_rows - len(decoding) - sum(self.chunk(s) for _, s in prefilling))
        draft_rows = int(self.memory("state")["draft_rows"])
        # Drafts are counted before pages are: who is preempted then leaves rows that nobody takes.
        preempted = int(self.memory("record")["n_preemptions"]) > 0
        assert draft_rows <= spare if preempted else draft_rows == spare
        spare = draft_rows
        rows: list[tuple[int, int, int, bool]] = []  # slot, position, token, sampled
        drafts_of: dict[int, list[int]] = {}
        pages_draft = context = recomputed = 0
        locked: set[int] = set()
        computed: dict[int, int] = {}
        picks: dict[int, list[tuple[int, int]]] = {}
        for slot, s in decoding:
            length = int(s["length"])
            assert s["computed"] == length - 1
            left = int(s["max_new_tokens"]) - (length - int(s["prompt_len"]))
            wanted = max(0, min(self.backend.spec.block, left) - 1)
            drafts = self.propose(slot, s, wanted)[:spare]
            spare -= len(drafts)
            drafts = drafts[: self.room(s) - 1]
            self.drafts_cut += len(self.propose(slot, s, wanted)) - len(drafts)
            assert s["drafts"][: s["n_drafts"]].tolist() == drafts
            sequence = [int(self.memory("tokens")[slot, length - 1]), *drafts]
            rows += [(slot, length - 1 + i, token, True) for i, token in enumerate(sequence)]
            assert s["n_pages"] == self.pages_for(length + len(drafts))
            pages_draft += int(s["n_pages"]) - self.pages_for(length)
            locked |= set(self.memory("page_table")[slot, : self.pages_for(length)].tolist())
            drafts_of[int(s["request_id"])] = drafts
            context += length + len(drafts)
            computed[int(s["request_id"])] = length
            picks[int(s["request_id"])] = [self.pick(len(rows) - len(sequence) + i) for i in range(len(sequence))]
        n_prefill = n_chunk_rows = 0
        for slot, s in prefilling:
            begin, count = int(s["computed"]), min(self.chunk(s), limits.max_step_rows - len(rows), self.room(s))
            self.chunks_cut += self.chunk(s) - count
            tokens = self.memory("tokens")[slot, begin : begin + count].tolist()
            last = int(s["prompt_len"]) - 1 if s["length"] == s["prompt_len"] else -1
            rows += [(slot, begin + i, token, begin + i == last) for i, token in enumerate(tokens)]
            assert s["n_pages"] >= self.pages_for(begin + count)
            n_chunk_rows += count
            n_prefill += count > 0
            recomputed += sum(begin + i < s["n_stored"] for i in range(count))
            locked |= set(self.memory("page_table")[slot, : s["n_pages"]].tolist()) if count else set()
            context += begin + count if count else 0
            computed[int(s["request_id"])] = begin + count
        planned = self.memory("rows")[: step["n_rows"]]
        assert [
            (int(r["slot"]), int(r["position"]), int(r["token"]), bool(r["sample_row"] >= 0)) for r in planned
        ] == rows
        assert len(rows) <= limits.max_step_rows
        sampled = [index for index, row in enumerate(rows) if row[3]]
        assert self.memory("sample_rows")[: step["n_sample_rows"]].tolist() == sampled
        assert planned["sample_row"][sampled].tolist() == list(range(len(sampled)))
        n_drafts = sum(map(len, drafts_of.values()))
        state, refs = self.memory("state"), self.memory("pages")["refs"]
        idle = [
            set(self.memory("page_table")[slot, : s["n_pages"]].tolist()) for slot, s in running if not s["row_count"]
        ]
        locked |= {page for page in set().union(*idle) if refs[page] > 1}
        locked |= set(np.flatnonzero(self.memory("pages")["pinned"]).tolist())
        waiting = int(self.memory("mailbox")["submit_tail"] - state["submit_seen"])
        never = [
            entry for entry in self.memory("heap")[: state["n_queued"]] if not self.is_preempted(int(entry["slot"]))
        ]
        record = {
            "step": self.n_steps + 1,
            "n_rows": len(rows),
            "n_prefill_rows": n_chunk_rows,
            "n_decode_rows": len(decoding),
            "n_draft_rows": n_drafts,
            "n_sample_rows": len(sampled),
            "n_prefill": n_prefill,
            "n_decode": len(decoding),
            "n_waiting": waiting + len(never),
            "n_preempted": int((self.memory("slots")["state"] == PREEMPTED).sum()),
            "n_recomputed_rows": recomputed,
            "pages_total": refs.size,
            "pages_free": int(state["n_free_pages"]),
            "pages_cached": int(state["n_cached_pages"]),
            "pages_draft": pages_draft,
            "pages_active": int((refs > 0).sum()) - pages_draft,
            "pages_locked": len(locked),
            "pages_pinned": int(self.memory("pages")["pinned"].sum()),
            "context_tokens": context,
        }
        self.n_steps += 1
        self.n_proposed += n_drafts
        self.draft_pages += pages_draft
        lengths = {int(s["request_id"]): int(s["length"] - s["prompt_len"]) for _, s in running}
        self.planned[int(step["step"])] = Planned(record, drafts_of, lengths, computed, picks)

    # ------------------------------------------------------------------------------------------ the commit

    def check_commits(self, events: list[Event]) -> None:
        emitted: dict[tuple[int, int], list[Token]] = defaultdict(list)
        ended: dict[tuple[int, int], str] = {}
        for event in events:
            if isinstance(event, Token):
                emitted[event.step, event.request_id].append(event)
            elif isinstance(event, Finished):
                ended[event.step, event.request_id] = event.reason
        n_tokens: dict[int, int] = defaultdict(int)
        n_accepted: dict[int, int] = defaultdict(int)
        stored = {step: dict(planned.computed) for step, planned in self.planned.items()}
        for (step, request_id), tokens in emitted.items():
            planned = self.planned[step]
            first = planned.lengths[request_id]
            assert [token.output_index for token in tokens] == list(range(first, first + len(tokens)))
            n_tokens[step] += len(tokens)
            drafts = planned.drafts.get(request_id)
            if drafts is None:  # a prompt's last chunk
                assert [(token.n_drafts, token.n_accepted) for token in tokens] == [(-1, -1)]
                continue
            assert tokens[0].n_drafts == len(drafts)
            assert all((token.n_drafts, token.n_accepted) == (-1, -1) for token in tokens[1:])
            n_accepted[step] += tokens[0].n_accepted
            stored[step][request_id] += tokens[0].n_accepted
            expected = self.verify(drafts, planned.picks[request_id], first)
            accepted = len(tokens) - 1  # the last token of an output is the target's own
            assert tokens[0].n_accepted == accepted
            self.n_accepted += accepted
            self.n_rejected += len(drafts) - accepted
            text = [token.token for token in tokens]
            assert text == expected[: len(text)]
            assert len(text) == len(expected) or ended[step, request_id] in ("eos", "stop", "length")
        for event in events:
            if not isinstance(event, StepDone):
                continue
            planned = self.planned[event.step]
            assert {name: event.values[name] for name in planned.record} == planned.record
            assert event.values["n_tokens"] == n_tokens[event.step]
            assert event.values["n_accepted"] == n_accepted[event.step]
            early = ("cancelled", "deadline")  # not by the step
            over = [id for (step, id), reason in ended.items() if step == event.step and reason not in early]
            assert event.values["n_finished"] == len(over)
            live = [count for id, count in stored[event.step].items() if id not in over]
            if not self.backend._plan.prefix_sharing:
                assert event.values["live_tokens"] == sum(live)
                assert event.values["live_pages"] == sum(map(self.pages_for, live))
            total = sum(event.values[f"pages_{kind}"] for kind in ("free", "cached", "active", "draft"))
            assert total == event.values["pages_total"]

    def verify(self, drafts: list[int], picks: list[tuple[int, int]], first: int) -> list[int]:
        """The tokens of a verification: the drafts that hold, then one token of the target's own."""
        policy = self.backend.acceptance
        for n, draft in enumerate(drafts):
            keyed, greedy = picks[n]
            holds = draft == (greedy if isinstance(policy, Greedy) else keyed)
            if isinstance(policy, Forced) and (first + n + 1) % policy.stride == 0:
                holds = False
            if not holds:
                return [*drafts[:n], keyed]
        return [*drafts, picks[len(drafts)][0]]
