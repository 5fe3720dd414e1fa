"""The planner and the scheduler under long random play, every check of kernels/play.cpp on, and bugs that it must find.

A play draws requests, shared prefixes, cancellations and deadlines from a seed; each row stores its token in its page,
each sampled token is a function of what the page table leads to, texts are compared with the sequences themselves, and
all tables are counted anew every few events.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import CACHE

from xlpk.backends.memory import Limits
from xlpk.backends.play import play
from xlpk.layout import Policy, TraceKind
from xlpk.speculation import Ngram, NoSpec
from xlpk.toolchain import kernels_folder

RULES = {
    "seed": 1,
    "max_requests": 3000,
    "max_events": 1 << 40,
    "mean_prompt": 50,
    "mean_output": 30,
    "prefixes": 4,
    "prefix_tokens": 64,
    "arrivals_per_step": 1,
    "cancel_one_in": 15,
    "deadline_one_in": 40,
    "private_one_in": 8,
    "away_one_in": 3,
    "priorities": 3,
    "arrivals_beside": 1,
    "recount_every": 20,
}


def scene(seed: int, **rules: int) -> dict[str, Any]:
    """A play whose sizes and policies follow from the seed too."""
    policy = list(Policy)[seed % 3]
    return play(
        CACHE,
        {**RULES, "seed": seed, "prepares": seed // 2 % 2, "pins": seed % 4 // 3, **rules},
        Limits(max_num_seqs=8, max_step_rows=48, prefill_chunk=24, max_waiting=64, policy=policy, ageing_steps=32),
        pages=(36, 48, 90, 400)[seed // 3 % 4],
        page_size=(8, 16, 4)[seed // 2 % 3],
        max_len=256,
        eviction=("lru", "slru", "fifo")[seed // 5 % 3],
        swap_pages=(0, 40, 8)[seed // 7 % 3],
        spec=Ngram(block=5) if seed % 2 else NoSpec(),
    )


@pytest.mark.parametrize("seed", range(12))
def test_play(seed: int) -> None:
    """12 x about 80,000 events: over 10^6 with the heavy ones."""
    result = scene(seed)
    assert (result["fault"], result["detail"]) == ("none", 0), f"seed {seed}"
    assert result["requests"] == result["finished"] + result["cancelled"] + result["late"] >= 3000
    for cause in ("finished", "cancelled", "evictions", "cached_tokens"):
        assert result[cause] > 0, cause
    if seed // 3 % 4 < 2:
        assert result["preemptions"] > 0
        assert (result["moves"] > 0) == (seed // 7 % 3 != 0)
    if seed % 2:
        assert 0 < result["accepted"] < result["drafts"]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_prepared_beside_a_step_changes_no_decision(seed: int) -> None:
    """The same requests arrive while steps run, taken beside them or by control: the same decisions, entry by entry."""
    traces = []
    for prepares in (0, 1):
        played = play(
            CACHE,
            {**RULES, "seed": seed, "max_requests": 600, "arrivals_per_step": 0, "deadline_one_in": 0}
            | {"prepares": prepares, "arrivals_beside": 1 + seed % 3, "pins": seed % 2, "recount_every": 50},
            Limits(5, 40, 24, 64, list(Policy)[seed % 3], 32),
            pages=(40, 60)[seed % 2],
            page_size=8,
            max_len=256,
            eviction=("lru", "slru", "fifo")[seed % 3],
            swap_pages=(0, 60)[seed // 2 % 2],
            spec=Ngram(block=4),
            trace=True,
        )
        assert played.result["fault"] == "none", played.result
        assert played.result["preemptions"] > 0
        entries = played.entries
        seen = entries["kind"] == TraceKind.SEEN
        assert seen.sum() == 600
        before = entries["kind"][np.maximum.accumulate(np.where(seen, -1, np.arange(len(entries))))]  # what is no SEEN
        beside = np.count_nonzero(seen & (before == TraceKind.STEP))
        assert beside > 500 if prepares else beside == 0
        traces.append(entries[~seen])
    one, two = traces
    assert one.shape == two.shape
    for field in ("kind", "value", "a", "b", "c"):
        assert (one[field] == two[field]).all(), field


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(100, 124))
def test_long_play(seed: int) -> None:
    result = scene(seed, max_requests=10000, recount_every=50)
    assert (result["fault"], result["detail"]) == ("none", 0), f"seed {seed}"
    assert result["events"] > 200_000


def test_the_same_seed_plays_the_same() -> None:
    """Its clock is virtual: deadlines end the same requests, and every count is the same."""
    one, two = (scene(3, deadline_one_in=4) for _ in range(2))
    del one["control_ns"], two["control_ns"]
    assert one == two
    assert one["late"] > 100


PAGES, KV, QUEUE, SCHEDULER = "stages/pages.h", "stages/kv.h", "stages/queue.h", "stages/scheduler.h"
PREEMPT, SWAP, COMMIT, PREFILL, CONTROL = (
    "stages/preempt.h",
    "stages/swap.h",
    "stages/commit.h",
    "stages/prefill.h",
    "control.h",
)


@dataclass(frozen=True)
class Bug:
    """What a source says, once, and what a bug makes of it."""

    name: str
    file: str
    right: str
    wrong: str
    weak_hash: bool = False  # with one that collides


BUGS = (
    Bug(
        "a hit over the last token",
        KV,
        "(slot.length - 1) / page_size",
        "slot.length / page_size",
    ),
    Bug(
        "a found page is not held",
        KV,
        "    hold_page(p, table[i]);\n",
        "    if (i != 1) hold_page(p, table[i]);\n",
    ),
    Bug(
        "a hash is believed",
        PAGES,
        "if (same == page_size) return page;",
        "return page;",
        weak_hash=True,
    ),
    Bug(
        "a parent is not compared",
        PAGES,
        "candidate.hash != hash || candidate.parent != parent",
        "candidate.hash != hash",
    ),
    Bug(
        "a page listed twice is freed twice",
        KV,
        "      table[slot.n_addressable] = other;\n",
        "",
    ),
    Bug(
        "an own page that has a twin is lost",
        KV,
        "      release_page(grid, p, own);\n",
        "",
    ),
    Bug(
        "a held page stays on its list",
        PAGES,
        "if (Eviction(p.eviction) != Eviction::kFifo) unlist_page(p, page);",
        "",
    ),
    Bug(
        "an evicted page can still be found",
        PAGES,
        "    forget_content(p, page);\n",
        "    p.pages[page].content = 0;\n",
    ),
    Bug(
        "an evicted page keeps its content",
        PAGES,
        "    forget_content(p, page);\n",
        "",
    ),
    Bug(
        "FIFO evicts a page that is held",
        PAGES,
        "while (page >= 0 && p.pages[page].refs > 0) page",
        "if (false) page",
    ),
    Bug(
        "the last holder frees an addressable page",
        PAGES,
        "  if (entry.content != 0) {\n    ++state.n_cached",
        "  if (false) {\n    ++state.n_cached",
    ),
    Bug(
        "a shared page is freed by the first who leaves",
        PAGES,
        "  if (entry.refs > 0) return;\n",
        "  if (entry.refs > 1) return;\n",
    ),
    Bug(
        "a page is published before it is full",
        KV,
        "(slot.n_addressable + 1) * page_size <= stored",
        "slot.n_addressable * page_size < stored",
    ),
    Bug(
        "the position after a hit is off by a page",
        KV,
        "slot.computed = found.n_pages * page_size;",
        "slot.computed = (found.n_pages + 1) * page_size;",
    ),
    Bug(
        "one page too few for a boundary",
        PAGES,
        "return (tokens + page_size - 1) / page_size;",
        "return tokens / page_size;",
    ),
    Bug(
        "rejected drafts take prompt pages along",
        COMMIT,
        "stage_kv_shrink(grid, p, page_size, slot_id, slot.computed);",
        "stage_kv_shrink(grid, p, page_size, slot_id, slot.computed - page_size);",
    ),
    Bug(
        "rejected drafts keep their pages, which are published",
        COMMIT,
        "stage_kv_publish(grid, p, page_size, slot_id, slot.computed);",
        "stage_kv_publish(grid, p, page_size, slot_id, slot.computed + slot.n_drafts);",
    ),
    Bug(
        "the first in rank is preempted",
        PREEMPT,
        "const int slot_id = p.order[--state.n_order];",
        "const int slot_id = p.order[0];\n"
        "  for (int i = 0; i + 1 < state.n_order; ++i) p.order[i] = p.order[i + 1];\n"
        "  --state.n_order;",
    ),
    Bug(
        "a returning request skips its last token",
        PREFILL,
        "slot.length > slot.prompt_len ? slot.length - 1 :",
        "slot.length > slot.prompt_len ? slot.length :",
    ),
    Bug(
        "a request is admitted into pages that are not there",
        SCHEDULER,
        "> available) return false;",
        "> available + 8) return false;",
    ),
    Bug(
        "hits that are cached count as available",
        SCHEDULER,
        "- found.n_cached - owed_pages",
        "- owed_pages",
    ),
    Bug(
        "a newcomer joins at the end whatever its rank",
        SCHEDULER,
        "if (!goes_before(slot.rank, slot.number, before.rank, before.number)) break;",
        "break;",
    ),
    Bug(
        "the heap settles upwards only",
        QUEUE,
        "for (int child; (child = 2 * at + 1) < count; at = child) {",
        "for (int child; (child = 2 * at + 1) < 0; at = child) {",
    ),
    Bug(
        "equal ranks in any order",
        QUEUE,
        "rank != other_rank ? rank < other_rank : number < other_number",
        "rank < other_rank",
    ),
    Bug(
        "a prompt's place in the ring is given back before it was copied",
        SCHEDULER,
        "  ring_entry(p.gone, p.submission_capacity, number) = 1;\n",
        "  ring_entry(p.gone, p.submission_capacity, number) = 1;\n"
        "  ring_entry(p.gone, p.submission_capacity, number + 1) = 1;\n",
    ),
    Bug(
        "a cancelled waiting request keeps its place in the ring",
        SCHEDULER,
        "reason, 0);\n  let_submission_go(p, entry.number);\n",
        "reason, 0);\n",
    ),
    Bug(
        "a cancelled running request stays in order",
        SCHEDULER,
        "  --p.state->n_order;\n  for (; i < p.state->n_order; ++i)",
        "  for (; i < p.state->n_order; ++i)",
    ),
    Bug(
        "a swapped page comes back to the wrong place",
        SWAP,
        "swap_table_of(p, slot_id)[slot.n_pages], false);",
        "swap_table_of(p, slot_id)[0], false);",
    ),
    Bug(
        "swap space of a cancelled request leaks",
        COMMIT,
        "  release_swap(p, slot_id);\n",
        "",
    ),
    Bug(
        "a page is pinned by every request that shares it",
        PAGES,
        "  if (entry.pinned) return;\n",
        "",
    ),
    Bug(
        "a pin holds no reference",
        PAGES,
        "  entry.pinned = 1;\n  ++entry.refs;\n",
        "  entry.pinned = 1;\n",
    ),
    Bug(
        "pinned pages count as held by tables",
        KV,
        "held + state.n_pinned_pages != state.n_refs",
        "held != state.n_refs",
    ),
    Bug(
        "a preempted request's slot is taken for another",
        SCHEDULER,
        "entry.slot >= 0 && !ran_before(p, entry) && (last",
        "entry.slot >= 0 && (last",
    ),
    Bug(
        "a prompt goes when it has a slot, which may be taken from it",
        SCHEDULER,
        "  return entry.slot = slot_id;\n",
        "  let_submission_go(p, entry.number);\n  return entry.slot = slot_id;\n",
    ),
    Bug(
        "moves are carried out twice",
        CONTROL,
        "  state.n_moves = 0;\n",
        "",
    ),
)


WEAK_HASH = "  return hash;\n", "  return hash & 15;\n"


def broken(tmp_path: Path, edits: list[tuple[str, str, str]]) -> Path:
    """The kernels with edits (file, what stands there once, what takes its place)."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, right, wrong in edits:
        text = (folder / file).read_text()
        assert text.count(right) == 1, f"{file} has it once: {right}"
        (folder / file).write_text(text.replace(right, wrong))
    return folder


def first_fault(folder: Path, cache: Path, seeds: int = 24) -> str:
    """What the first play of these sources that goes wrong ends with; `none` if all go well."""
    for seed in range(seeds):
        result = play(
            cache,
            {**RULES, "seed": seed, "max_requests": 1500, "recount_every": 5}
            | {"prepares": seed % 2, "pins": 2 * (seed % 4 == 1)},
            Limits(8, 48, 24, 64, list(Policy)[seed % 3], 32),
            pages=(36, 48, 90)[seed // 3 % 3],
            page_size=8,
            max_len=256,
            eviction=("lru", "slru", "fifo")[seed % 3],
            swap_pages=(0, 60)[seed // 2 % 2],
            events=256,
            spec=Ngram(block=5) if seed % 2 else NoSpec(),
            folder=folder,
        )
        if result["fault"] != "none":
            return str(result["fault"])
    return "none"


@pytest.mark.parametrize(
    "bug", [BUGS[0], *(pytest.param(bug, marks=pytest.mark.heavy) for bug in BUGS[1:])], ids=lambda bug: bug.name
)
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    weak = [(PAGES, *WEAK_HASH)] if bug.weak_hash else []
    assert first_fault(broken(tmp_path, [(bug.file, bug.right, bug.wrong), *weak]), tmp_path) != "none"


@pytest.mark.heavy
def test_colliding_hashes_cost_time_only(tmp_path: Path) -> None:
    """16 hashes for all pages: tokens and parents decide."""
    assert first_fault(broken(tmp_path, [(PAGES, *WEAK_HASH)]), tmp_path) == "none"
