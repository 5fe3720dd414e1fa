"""Run by test_race.py in a process with a sanitizer's runtime: sessions of 4 teams, used from 3 threads.

    python driver.py LIBRARY CHECKPOINT ANSWERS.json OUT.json SCENARIO ...

A scenario is ORCHESTRATION-PROPOSER, ORCHESTRATION-chaos: cancellations and a stop in mid-flight, persistent-quiet: the
host submits and does nothing else until the work must be done, persistent-lease: the loop leaves and is entered again,
ORCHESTRATION-pressure and -swap: all but the first request, with pages for some of them only, or ORCHESTRATION-storm:
the same three times over by priority, some cancelled or late, until a stop; ids modulo WAVE are those of `requests`.
ANSWERS: the right texts by request id, once known.
OUT: `outputs` by scenario and request id, [reason, tokens, (drafts, accepted) of each verification], the reason of a
request that the stop cut off being "", and `causes` by scenario: counts. The step always has room for all drafts.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from xlpk.backend import Admitted, Event, Finished, Preempted, StepDone, Token
from xlpk.backends import memory
from xlpk.backends.cpu import CpuBackend, CpuLibrary
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.speculation import Ngram, NoSpec, Oracle
from xlpk.toolchain import Build
from xlpk.workload import Request

SPECS = {
    "none": NoSpec(),
    "quiet": NoSpec(),
    "ngram": Ngram(block=4),
    "chaos": Ngram(block=4),
    "oracle": Oracle(block=4, mismatch_stride=3),
    "lease": Ngram(block=4),
    "pressure": NoSpec(),
    "swap": Ngram(block=4),
    "storm": NoSpec(),
}
TIGHT = {  # the KV group where there are too few pages
    "pressure": KV(budget="12pages", page_size=4, eviction="slru"),
    "swap": KV(budget="12pages", page_size=4, preemption="swap", swap_space="12pages"),
    "storm": KV(budget="12pages", page_size=4, preemption="swap", swap_space="8pages", eviction="slru"),
}
CUT = ("chaos", "storm")  # stopped before the last two have ended
WAVE = 100
TRACED = ("oracle", "lease")
PLANNED = ("swap", "lease", "storm")  # a team of its own takes what arrives beside the steps, where there is a loop
MAX_LEN = 320
VOCAB = 131


def requests(answers: dict[str, list[int]]) -> list[Request]:
    """Greedy and sampled ones; the first crosses an attention span, the others repeat themselves, the last are one."""
    rng = np.random.RandomState(0)
    words = [rng.randint(0, VOCAB, 5) for _ in range(6)]
    out = []
    for i, (length, n) in enumerate(((258, 3), (7, 8), (19, 6), (1, 9), (12, 5), (13, 8), (13, 8))):
        prompt = words[min(i, 5)][np.arange(length) % 5].tolist()
        oracle = tuple(answers.get(str(i), ()))
        options: dict[str, Any] = {
            1: {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
            3: {"top_k": 40, "top_p": 0.9, "logprobs": 2},
            4: {"logit_bias": ((5, 2.0), (9, 1.0))},
        }.get(i, {})
        out.append(
            Request(i, tuple(prompt), n, temperature=0.8 * (i % 2), seed=i, ignore_eos=True, oracle=oracle, **options)
        )
    return out


def waves(batch: list[Request]) -> list[Request]:
    """Three times each, of three priorities; in the second wave some are late before they can be done."""
    return [
        replace(
            request,
            request_id=request.request_id + WAVE * wave,
            priority=(request.request_id + wave) % 3,
            deadline_ms=0.5 if wave == 1 and request.request_id % 3 == 2 else 0.0,
        )
        for wave in range(3)
        for request in batch
    ]


def small_tables() -> None:
    """Scratch for a few rows, so that phases work in several tiles; rings that wrap around."""
    floats, table = memory.scratch_floats, memory.buffer_table

    def least(config: Any, limits: memory.Limits, *, warps: int) -> int:
        bins = 2 * (2 + 2 * 256)  # the filter's, a copy a lane
        return max(floats(config, memory.Limits(limits.max_num_seqs, 2, 1), warps=warps), bins)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        buffers = table(*args, **kwargs)
        sizes = {"events": 128, "step_records": 64, "submissions": 2, "cancels": 2, "queue": 2, "gone": 2}
        return buffers | {name: ((size,), buffers[name][1]) for name, size in sizes.items()}

    memory.scratch_floats, memory.buffer_table = least, wrapped


def serve(
    model: Model, library: CpuLibrary, scenario: str, answers: dict[str, list[int]]
) -> tuple[dict[int, Any], Any]:
    orchestration, kind = scenario.split("-")
    backend = CpuBackend(
        cache=Path(),
        library=library,
        orchestration=orchestration,
        threads=4,
        max_num_seqs=3,
        max_step_rows=24,
        prefill_chunk=10,
        policy="priority" if kind == "storm" else "fcfs",
        ageing_steps=8,
        spec=SPECS[kind],
        spin_deadline_s=120.0,
        lease_s=0.02 if kind == "lease" else 0.0,
        planner="team" if kind in PLANNED and orchestration == "persistent" else "auto",
        trace=kind in TRACED,
        spans=256 if kind in TRACED else 0,  # rings that wrap around
    )
    tight = TIGHT.get(kind)
    kv = tight or KV(budget="60pages", page_size=16)
    backend.open(model, KVPlan.make(kv, model.config, model.weights.dtype, MAX_LEN))
    batch = requests(answers)[1 if tight else 0 :]
    if kind == "storm":
        batch = waves(batch)
    causes = {"preempted": 0, "cached": 0, "moved": 0, "evicted": 0}
    tokens: dict[int, list[int]] = {request.request_id: [] for request in batch}
    verified: dict[int, list[tuple[int, int]]] = {request.request_id: [] for request in batch}
    reasons: dict[int, str] = dict.fromkeys(tokens, "")
    lock = threading.Lock()
    give_up = time.monotonic() + 300
    stop = threading.Event()

    def producer(own: list[Request]) -> None:
        """One producer of the ring at a time; both while the loop runs."""
        for request in own:
            while not stop.is_set():
                with lock:
                    if backend.submit(request):
                        break
                time.sleep(0.002)
            if (kind == "chaos" and request.request_id % 2) or (kind == "storm" and request.request_id % 5 == 3):
                with lock:
                    backend.cancel(request.request_id)

    def note(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Token):
                tokens[event.request_id].append(event.token)
                if event.n_drafts >= 0:
                    verified[event.request_id].append((event.n_drafts, event.n_accepted))
            elif isinstance(event, Preempted):
                causes["preempted"] += 1
            elif isinstance(event, Admitted):
                causes["cached"] += event.n_cached
            elif isinstance(event, StepDone):
                causes["moved"] += event.values["n_moves"]
                causes["evicted"] += event.values["n_evictions"]
            elif isinstance(event, Finished):
                assert not reasons[event.request_id]
                reasons[event.request_id] = event.reason

    if kind == "quiet":
        producer(batch)
        time.sleep(1)
    threads = [threading.Thread(target=producer, args=(batch[half::2],)) for half in (0, 1)]
    for thread in threads if kind != "quiet" else []:
        thread.start()
    try:
        enough = len(batch) - 2 if kind in CUT else len(batch)
        while sum(map(bool, reasons.values())) < enough:
            assert time.monotonic() < give_up, "too slow"
            note(backend.poll())
            time.sleep(0.001)
    finally:
        stop.set()
        for thread in threads if kind != "quiet" else []:
            thread.join()
        report = backend.close()
    assert kind != "lease" or report.launches > 2
    assert (backend.spans()[1] > 0) == (kind in TRACED)
    return {i: [reasons[i], tokens[i], verified[i]] for i in tokens}, causes


def main() -> None:
    path, checkpoint, answers_file, out, *scenarios = sys.argv[1:]
    answers = json.loads(Path(answers_file).read_text()) if Path(answers_file).exists() else {}
    small_tables()
    library = CpuLibrary(Build(Path(path), "", "", 0.0, True))
    model = load_model("race", Path(checkpoint))
    assert model.config.vocab_size == VOCAB
    done = {scenario: serve(model, library, scenario, answers) for scenario in scenarios}
    outputs, causes = ({scenario: both[i] for scenario, both in done.items()} for i in (0, 1))
    Path(out).write_text(json.dumps({"outputs": outputs, "causes": causes}))


if __name__ == "__main__":
    main()
