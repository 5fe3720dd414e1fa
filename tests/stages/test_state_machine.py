"""The planner as a state machine: Hypothesis chooses what happens, round by round, and shrinks what goes wrong.

Each event of a round is entered in a ledger, after each round all tables are counted anew (`stages.planner`), every row
has to find the tokens before it, and every output is known beforehand. The seed stands in the name of the test.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from kinds import CACHE
from stages.bugs import Bug, broken
from stages.planner import VOCAB, Planner, build
from stages.planner_bugs import BUGS, KV, PAGES, WEAK_HASH

from xlpk.backends.memory import Limits
from xlpk.layout import Policy
from xlpk.workload import Request

PARTS = ("unseen", "queued", "waiting", "prefill", "decode", "preempted")  # of a request's life
PINNED = 3  # pages at most
FAMILIES = [[(7 * family + 3 * i + i * i) % VOCAB for i in range(16)] for family in range(2)]


class PlannerMachine(RuleBasedStateMachine):
    """Rules are what a host can do, and rounds of control; what control then does (admit, extend, share, lock, draft,
    commit, roll back, evict, preempt, swap) follows from small pools of pages, and `causes` counts it."""

    library: ClassVar[ctypes.CDLL]
    causes: ClassVar[Counter[str]]

    @initialize(
        pages=st.integers(8, 20),
        page_size=st.sampled_from([2, 4]),
        running=st.integers(1, 4),
        eviction=st.sampled_from(["lru", "fifo", "slru"]),
        swap_pages=st.sampled_from([0, 5, 24]),
        block=st.sampled_from([1, 4]),
        policy=st.sampled_from(list(Policy)),
        sharing=st.sampled_from([True, True, True, False]),
        chunk=st.integers(1, 8),
        events=st.sampled_from([128, 256]),
    )
    def begin(
        self,
        pages: int,
        page_size: int,
        running: int,
        eviction: str,
        swap_pages: int,
        block: int,
        policy: Policy,
        sharing: bool,
        chunk: int,
        events: int,
    ) -> None:
        limits = Limits(running, running + 2 * chunk + 3, chunk, 8, policy, 4)
        self.planner = Planner(
            self.library,
            limits,
            pages=pages,
            page_size=page_size,
            prefix_sharing=sharing,
            eviction=eviction,
            swap_pages=swap_pages,
            block=block,
            events=events,
            pinned_pages=PINNED if sharing else 0,
        )
        self.next_id = 0
        self.sharing, self.page_size = sharing, page_size

    @rule(
        family=st.integers(0, 1),
        common=st.integers(0, 16),
        own=st.integers(0, 6),
        new=st.integers(1, 16),
        wrong=st.integers(0, 2**16 - 1),
        stop=st.integers(0, 40),
        priority=st.integers(0, 2),
        share=st.sampled_from([True, True, True, False]),
        pin=st.sampled_from([False, False, False, True]),
    )
    def submit(
        self, family: int, common: int, own: int, new: int, wrong: int, stop: int, priority: int, share: bool, pin: bool
    ) -> None:
        """A prompt that begins as others do. Bit i of `wrong`: the draft of output token i is not what is sampled."""
        number = self.next_id
        most = self.planner.most_tokens
        prompt = [*FAMILIES[family][:common], *((number * 5 + i) % VOCAB for i in range(own))][: most - 1] or [1]
        new = min(new, most - len(prompt))
        # Outputs repeat those of others with the same beginning: what decoding filled is shared too.
        text = [(11 * family + 5 * (len(prompt) + i)) % VOCAB for i in range(new)]
        drafts = [(token + (wrong >> i & 1)) % VOCAB for i, token in enumerate(text)]
        request = Request(
            number,
            tuple(prompt),
            new,
            ignore_eos=True,
            oracle=tuple(drafts) if self.planner.spec.block > 1 else (),
            stop_token_ids=(text[stop],) if stop < new else (),
            priority=priority,
            share_prefix=share,
        )
        if pin and share and self.sharing:
            asking = replace(request, pin=True)
            pages = {asking.prompt[:end] for end in range(self.page_size, len(prompt) + 1, self.page_size)}
            if len(self.planner.pinned_pages | pages) <= PINNED:
                request = asking
        if self.planner.submit(request, text):
            self.next_id += 1

    @rule(count=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
    def crowd(self, count: int, seed: int) -> None:
        """Several at once, whose outputs need more pages than there are."""
        draw = random.Random(seed)
        for _ in range(count):
            self.submit(
                family=draw.randrange(2),
                common=draw.randrange(10),
                own=draw.randrange(4),
                new=draw.randrange(8, 30),
                wrong=draw.getrandbits(30) & draw.getrandbits(30),
                stop=draw.randrange(60),
                priority=draw.randrange(3),
                share=draw.randrange(5) > 0,
                pin=draw.randrange(8) == 0,
            )

    @rule(count=st.integers(1, 12))
    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.planner.round()

    @rule(count=st.integers(1, 40))
    def rounds_without_a_host(self, count: int) -> None:
        """Nobody reads events: in time the loop stands, and goes on where it stood."""
        for _ in range(count):
            self.planner.round(away=True)
            self.causes["stood"] += bool(self.planner.open) and not self.planner._memory["step"]["n_rows"][0]

    @precondition(lambda self: self.planner.open)
    @rule(part=st.sampled_from(PARTS), which=st.integers(0, 3))
    def cancel(self, part: str, which: int) -> None:
        if (request_id := self.one(part, which)) is not None and not self.planner.asked[request_id].cancelled:
            self.causes[f"cancelled {part}"] += 1
            self.planner.cancel(request_id)
            self.planner.round()

    @rule()
    def cancel_a_stranger(self) -> None:
        self.planner.cancel(10**6)
        self.planner.round()

    @precondition(lambda self: self.planner.open)
    @rule(part=st.sampled_from(PARTS[1:]), which=st.integers(0, 3))
    def expire(self, part: str, which: int) -> None:
        if (request_id := self.one(part, which)) is not None:
            self.causes[f"expired {part}"] += 1
            self.planner.expire(request_id)
            self.planner.round()

    def one(self, part: str, which: int) -> int | None:
        """A request in that part of its life, if there is one."""
        found = [request_id for request_id in self.planner.open if self.planner.part(request_id) == part]
        return found[which % len(found)] if found else None

    def teardown(self) -> None:
        if hasattr(self, "planner") and not self.planner.failed:
            self.planner.finish()
            self.causes.update(self.planner.causes)
            self.causes.update(self.planner.ledger.counts)
            self.causes["events"] += self.planner.ledger.counts.total()


def play(library: ctypes.CDLL, seed: int, examples: int, steps: int, *, shrink: bool = True) -> Counter[str]:
    """Counts of what happened. The first failure is shrunk, shown and raised."""

    class Machine(PlannerMachine):
        pass

    Machine.library, Machine.causes = library, Counter()
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        database=None,
        deadline=None,
        phases=phases,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=chosen)
    return Machine.causes


# What control did and what was done to it, in each run of the machine.
CAUSES = ["admit", "publish", "found", "twin", "n_accepted", "rejected", "evict", "pin", "preempt", "resumed", "stood"]
CAUSES += [
    "n_recomputed_rows",
    "shared pages read",
    "swapped out",
    "swapped in",
    "length",
    "stop",
    "cancelled",
    "deadline",
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(CACHE)


@pytest.mark.parametrize("seed", [3])
def test_conservation_after_each_event(library: ctypes.CDLL, seed: int) -> None:
    causes = play(library, seed, 70, 30)
    assert [name for name in CAUSES if not causes[name]] == []


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1000, 1010))
def test_conservation_after_many_events(library: ctypes.CDLL, seed: int) -> None:
    causes = play(library, seed, 400, 40)
    often = [f"{how} {part}" for how in ("cancelled", "expired") for part in ("queued", "decode", "preempted")]
    assert [name for name in (*CAUSES, *often) if not causes[name]] == []
    assert causes["events"] > 200_000


PINS = (  # which plays have none of
    Bug(
        "what a pinned request put out is pinned when it comes back",
        KV,
        "if (slot.pin && (i + 1) * page_size <= slot.prompt_len)",
        "if (slot.pin)",
    ),
    Bug("a page is pinned twice", PAGES, "  if (entry.pinned) return;\n", ""),
    Bug("a pin is no reference", PAGES, "  ++entry.refs;\n  ++state.n_refs;\n  ++state.n_pinned_pages;\n", ""),
)


def fault_of(bug: Bug, tmp_path: Path, seeds: int = 4) -> str:
    """What the machine says of kernels with that bug; empty: it finds nothing."""
    weak = [(PAGES, *WEAK_HASH)] if bug.weak_hash else []
    library = build(tmp_path, broken(tmp_path, [(bug.file, bug.right, bug.wrong), *weak]))
    for seed in range(seeds):
        try:
            play(library, seed, 200, 40, shrink=False)
        except (AssertionError, IndexError, KeyError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


# A slot is taken from another only when more wait than there are slots, which few rules come to; the plays find it.
CROWDED = "a preempted request's slot is taken for another"


@pytest.mark.heavy
@pytest.mark.parametrize("bug", [*(bug for bug in BUGS if bug.name != CROWDED), *PINS], ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    assert fault_of(bug, tmp_path)
