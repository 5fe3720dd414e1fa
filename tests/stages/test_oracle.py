"""The simulator is the oracle of the compiled control plane: fed with the same, both decide the same, entry by entry.

Sessions are driven round by round over tables of tokens (`stages.driven`), played by kernels/play.cpp, and run by the
backends over real weights. Bugs planted on either side have to show.
"""

from __future__ import annotations

import importlib
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import kinds
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from kinds import CACHE
from stages.bugs import Bug, broken
from stages.driven import Case, Run, drive
from stages.oracle_bugs import KERNEL_BUGS, PYTHON_BUGS
from stages.plays import RULES, limits, sizes
from stages.sessions import Log

import xlpk.simulator
from xlpk.backend import Event
from xlpk.backends.play import MODEL, play
from xlpk.kv import KV, KVPlan
from xlpk.layout import Policy, TraceKind
from xlpk.model import Model
from xlpk.simulator import Rules, SimRequest, replay
from xlpk.speculation import Acceptance, Forced, Greedy, Keyed, Ngram, NoSpec, Oracle, Proposer
from xlpk.workload import Request

HEAVY = pytest.mark.heavy
SPECS: list[Proposer] = [
    NoSpec(),
    Ngram(block=4),
    Ngram(block=6, min_n=2),
    Oracle(block=4, mismatch_stride=3),
    Oracle(block=8, mismatch_stride=0),
]
ACCEPTANCES: list[Acceptance] = [Keyed(), Greedy(), Forced(stride=3)]
CHOICES: dict[str, list[Any]] = {
    "pages": [9, 12, 20, 60, 104],
    "page_size": [1, 2, 4, 8],
    "running": [1, 3, 4],
    "few_slots": [False, True],
    "rows": [4, 9, 16, 40],
    "chunk": [1, 5, 16],
    "policy": list(Policy),
    "eviction": ["lru", "fifo", "slru"],
    "swap_pages": [0, 6, 40],
    "prefix_sharing": [True, True, True, False],
    "spec": SPECS,
    "acceptance": ACCEPTANCES,
    "events": [128, 256],
    "repeated": [0.1, 0.3, 0.9],
    "outputs": [3, 12, 12],
    "arrivals": [0.3, 0.95],
    "cancels": [0.03, 0.3],
    "pin": [False, False, True],
}
# What has to have happened for equality to mean anything.
CAUSES = {
    "admit",
    "alloc",
    "cancel",
    "commit",
    "demote",
    "evict",
    "hold",
    "move",
    "pin",
    "preempt",
    "publish",
    "release",
}
CAUSES |= {"cancelled", "deadline", "eos", "error", "length", "stop", "target"}
CAUSES |= {"accepted", "came_back", "found", "merged", "recomputed", "rejected", "swapped"}
# Pages that nearly all were found: SLRU's protected list overflows.
DEMOTING = [
    Case(seed, pages=20, page_size=2, running=1, eviction="slru", repeated=1.0, outputs=2, requests=40)
    for seed in range(3)
]

# More than a hundred small pages, nearly all of them taken: one is kept free.
TIGHT = [Case(seed, pages=104, page_size=1, running=4, rows=40, chunk=16, arrivals=0.95) for seed in (0, 8, 10)]

# Requests of good priority preempt so many others that these have the slots.
CROWDED = [
    Case(
        seed,
        pages=pages,
        running=3,
        few_slots=True,
        rows=40,
        chunk=16,
        policy=Policy.PRIORITY,
        eviction="fifo",
        swap_pages=40,
        arrivals=0.6,
        outputs=20,
        requests=60,
    )
    for seed, pages in ((23, 16), (29, 20))
]


def drawn(seed: int) -> Case:
    """A case whose sizes and policies follow from the seed too."""
    rng = random.Random(seed)
    return Case(seed, **{name: rng.choice(values) for name, values in CHOICES.items()})


def check(run: Run) -> None:
    assert not run.aborted, f"{run.aborted}: {run.case}"
    differences = run.differences()
    assert not differences, f"{run.case}\n{differences[0]}"


@pytest.mark.parametrize("examples", [45, pytest.param(2000, marks=HEAVY)])
def test_driven_sessions(examples: int) -> None:
    """More than 10^4 steps with the plays below; a falsifying case names its seed."""
    causes: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.example(DEMOTING[0])
    @hypothesis.given(
        st.builds(
            Case, seed=st.integers(0, 2**32 - 1), **{name: st.sampled_from(values) for name, values in CHOICES.items()}
        )
    )
    def sessions(case: Case) -> None:
        run = drive(case, CACHE)
        causes.update(run.causes)
        check(run)

    sessions()
    assert causes["step"] > 90 * examples
    assert not CAUSES - set(+causes), causes


def played(seed: int, requests: int) -> int:
    """Replays a play, with requests that are prepared beside the step that runs -> its steps."""
    spec: Proposer = (NoSpec(), Ngram(block=5), Oracle(block=4))[seed % 3]
    acceptance: Acceptance = Forced(stride=3) if seed % 4 == 3 else Keyed()
    plan = KVPlan(page_bytes=1, dtype="bf16", **sizes(seed))
    scene = {"seed": seed, "max_requests": requests, "prepares": 1, "arrivals_beside": seed % 3, "pins": seed % 2}
    options = {"spec": spec, "acceptance": acceptance, **sizes(seed)}
    done = play(CACHE, {**RULES, **scene}, limits(seed), trace=True, events=512, **options)
    assert done.result["fault"] == "none"
    asked = [
        SimRequest(
            one.request_id,
            one.prompt,
            one.max_new_tokens,
            ignore_eos=True,
            priority=one.priority,
            deadline_ns=one.deadline_ns,
            share=one.share,
            pin=index < scene["pins"],
            oracle=one.answers,
        )
        for index, one in enumerate(done.requests)
    ]
    rules = Rules.make(limits(seed), plan, spec, acceptance, (), MODEL.vocab_size)
    differences = replay(rules, asked, done.outputs, done.entries.tolist(), may_leave=False)
    assert not differences, f"seed {seed}\n{differences[0]}"
    beside = [entry for entry in done.entries.tolist() if entry[2] == TraceKind.SEEN and entry[3]]
    assert bool(beside) == (scene["arrivals_beside"] > 0)
    return int(done.result["steps"])


@pytest.mark.parametrize(
    ("seed", "requests"),
    [*((seed, 400) for seed in (0, 5, 7)), *(pytest.param(seed, 2000, marks=HEAVY) for seed in range(8, 32))],
)
def test_plays(seed: int, requests: int) -> None:
    assert played(seed, requests) > requests / 2


# ---------------------------------------------------------------------------------------------- real runs


def crowd(count: int) -> list[Request]:
    """Half of the prompts share a prefix, one is pinned; outputs outgrow the pages; some end early."""
    rng = np.random.RandomState(count)
    prefix = tuple(rng.randint(3, 17, 12).tolist())
    return [
        Request(
            number,
            (prefix if number % 2 else ()) + tuple(rng.randint(3, 17, 1 + number % 9).tolist()),
            30,
            temperature=0.9 * (number % 3 > 0),
            seed=number,
            ignore_eos=number % 4 > 0,
            stop_token_ids=(5,) if number % 5 == 4 else (),
            priority=number % 3,
            deadline_ms=1.0 if number % 7 == 6 else 0.0,
            logprobs=2 if number % 6 == 5 else None,
            pin=number == 1,
            oracle=tuple(rng.randint(3, 17, 30).tolist()),
        )
        for number in range(count)
    ]


def run_and_replay(model: Model, spec: Proposer, acceptance: Acceptance, swap: bool, **options: Any) -> Counter[str]:
    """A session of the current kind, replayed -> what happened in it."""
    limits = {"max_num_seqs": 5, "max_step_rows": 40, "prefill_chunk": 6, "policy": "priority"}
    backend = kinds.make(spec=spec, acceptance=acceptance, trace=True, **limits, **options)
    preemption = {"preemption": "swap", "swap_space": "40pages"} if swap else {}
    config = KV(budget="24pages", page_size=4, eviction="slru", **preemption)
    plan = KVPlan.make(config, model.config, model.weights.dtype, 64)
    requests, events, log = crowd(24), [], Log()
    waiting, give_up = requests.copy(), time.monotonic() + 300
    backend.open(model, plan)
    try:
        while log.n_finished < len(requests):
            while (
                waiting and (len(waiting) > 12 or len(events) > 20 * (12 - len(waiting))) and backend.submit(waiting[0])
            ):
                del waiting[0]
            new: list[Event] = backend.poll()
            log.add(new)
            events += new
            if len(events) % 11 == 0 and (number := len(events) // 11 % len(requests)) != 1:  # whose prompt is pinned
                backend.cancel(number)
            assert time.monotonic() < give_up
        events += backend.poll()
    finally:
        backend.close()
    assert backend.lost_decisions == 0
    rules = Rules.make(backend.limits, plan, spec, acceptance, model.config.eos_token_ids, model.config.vocab_size)
    case = Case(0, spec=spec, acceptance=acceptance)
    run = Run(case, [SimRequest.of(request) for request in requests], backend.decisions().tolist(), events, "")
    differences = replay(rules, run.requests, log.tokens, run.entries, events=events)
    assert not differences, differences[0]
    assert len([entry for entry in run.entries if entry[2] == TraceKind.STEP]) > 30
    return run.causes


REAL = [
    pytest.param("cpu", {"orchestration": "launched", "threads": 1}, id="cpu-launched"),
    pytest.param("cpu", {"orchestration": "persistent", "threads": 2}, id="cpu-persistent"),
    pytest.param(
        "cpu", {"orchestration": "persistent", "threads": 2, "planner": "team"}, id="cpu-planner-team", marks=HEAVY
    ),
    *(pytest.param(kind, {}, id=kind, marks=HEAVY) for kind in kinds.GPU),
]


@pytest.mark.parametrize("swap", [pytest.param(False, marks=HEAVY), True], ids=["recompute", "swap"])
@pytest.mark.parametrize(
    ("spec", "acceptance"),
    [
        pytest.param(NoSpec(), Keyed(), id="none", marks=HEAVY),
        pytest.param(Ngram(block=4), Greedy(), id="ngram-greedy"),
        pytest.param(Oracle(block=4), Forced(stride=3), id="oracle-forced", marks=HEAVY),
    ],
)
@pytest.mark.parametrize(("kind", "options"), REAL)
def test_real_runs(
    small: Callable[[str], Model],
    kind: str,
    options: dict[str, Any],
    spec: Proposer,
    acceptance: Acceptance,
    swap: bool,
) -> None:
    with kinds.on(kind):
        causes = run_and_replay(small("alphabet"), spec, acceptance, swap, **options)
    assert causes["preempt"] > 0
    assert causes["evict"] > 0
    assert causes["pin"] > 0
    assert (causes["move"] > 0) == swap
    assert causes["rejected"] > 0 or isinstance(spec, NoSpec)


# ---------------------------------------------------------------------------------------------- planted bugs


CASES = [*(drawn(seed) for seed in range(60)), *DEMOTING, *TIGHT, *CROWDED]


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [drive(case, CACHE) for case in CASES]


def test_the_cases_of_the_bugs_agree(runs: list[Run]) -> None:
    causes: Counter[str] = Counter()
    for run in runs:
        check(run)
        causes.update(run.causes)
    assert not CAUSES - set(+causes), causes


@pytest.fixture
def mutated(tmp_path: Path) -> Iterator[Callable[[Bug], ModuleType]]:
    """The simulator with a bug, as a package of its own."""
    made: list[str] = []

    def make(bug: Bug) -> ModuleType:
        name = f"mutated_{tmp_path.name}"
        folder = tmp_path / name
        shutil.copytree(Path(xlpk.simulator.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in folder.glob("*.py"):
            text = file.read_text()
            if file.name == bug.file:
                assert text.count(bug.right) == 1, f"{bug.file} has it once: {bug.right}"
                text = text.replace(bug.right, bug.wrong)
            file.write_text(text.replace("xlpk.simulator", name))
        made.append(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            return importlib.import_module(name)

    yield make
    for module in [module for module in sys.modules if module.split(".")[0] in made]:
        del sys.modules[module]


@pytest.mark.parametrize("bug", PYTHON_BUGS, ids=lambda bug: bug.name)
def test_a_bug_of_the_simulator_shows(bug: Bug, runs: list[Run], mutated: Callable[[Bug], ModuleType]) -> None:
    simulator = mutated(bug)
    assert any(run.differences(simulator) for run in runs)


@pytest.mark.parametrize(
    "bug", [KERNEL_BUGS[0], *(pytest.param(bug, marks=HEAVY) for bug in KERNEL_BUGS[1:])], ids=lambda bug: bug.name
)
def test_a_bug_of_the_kernels_shows(bug: Bug, tmp_path: Path) -> None:
    folder = broken(tmp_path, [(bug.file, bug.right, bug.wrong)])
    found = (drive(case, tmp_path, folder) for case in CASES)
    assert any(run.aborted or run.differences() for run in found)


def test_the_first_difference_is_told(runs: list[Run]) -> None:
    """Round, what was recorded, what was simulated, and what stands around it."""
    run = max(runs, key=lambda run: len(run.entries))
    at = next(i for i, entry in enumerate(run.entries) if i > 500 and entry[2] == TraceKind.ALLOC)
    number, value, kind, page, *rest = run.entries[at]
    wrong = [*run.entries[:at], (number, value, kind, page + 1, *rest), *run.entries[at + 1 :]]
    (text,) = replace(run, entries=wrong).differences()
    assert text.splitlines()[0].startswith(f"round {number}, entry ")
    assert f"recorded:  ALLOC page={page + 1}" in text
    assert f"simulated: ALLOC page={page}" in text
    assert len(text.splitlines()) <= 12
