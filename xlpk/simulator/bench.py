"""`python -m xlpk.simulator.bench`: how fast the simulated control plane decides, on one core.

A plain decode load: as many requests at once as there are places, each with 128 tokens of prompt and 512 of output,
pages for all. Counted from the first step in which all of them decode: rows, a decode token or a draft in one step, a
second of everything that a round does, its events and records written and taken.
"""

from __future__ import annotations

import json
import time

from xlpk import layout
from xlpk.simulator.control import ControlPlane
from xlpk.simulator.outcomes import Synthetic
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.trace import Trace
from xlpk.speculation import Keyed, Ngram, NoSpec, Proposer

VOCAB_SIZE = 1 << 15
PROMPT, OUTPUT, STEP_NS = 128, 512, 1_000_000


def rules(running: int, spec: Proposer) -> Rules:
    """Places, pages and rows for `running` requests at their ends."""
    return Rules(
        max_running=running,
        max_slots=2 * running,
        max_rows=running * spec.block + 256,
        prefill_chunk=64,
        n_pages=running * (PROMPT + OUTPUT) // 16 + 1,
        page_size=16,
        n_swap_pages=0,
        prefix_sharing=True,
        eviction=layout.Eviction.LRU,
        policy=layout.Policy.FCFS,
        ageing_steps=64,
        proposer=spec,
        acceptance=Keyed(),
        eos_ids=frozenset(),
        vocab_size=VOCAB_SIZE,
        submission_capacity=2 * running,
        prompt_capacity=1 << 20,
    )


def measure(running: int, spec: Proposer, *, traced: bool = False) -> dict[str, float]:
    """-> rows, steps, seconds, rows a second of `running` requests that decode, to their ends."""
    prompts = [tuple((7 * request + 3 * place) % VOCAB_SIZE for place in range(PROMPT)) for request in range(running)]
    trace = Trace() if traced else None
    outcomes = Synthetic(VOCAB_SIZE, rate=0.7 if not isinstance(spec, NoSpec) else None)
    control = ControlPlane(rules(running, spec), outcomes, trace)
    for request_id, prompt in enumerate(prompts):
        assert control.submit(SimRequest(request_id, prompt, OUTPUT, ignore_eos=True))
    now_ns = rows = steps = 0
    begin = 0.0
    while not control.idle:
        step = control.round(now_ns)
        now_ns += STEP_NS
        if begin:
            rows += step.n_rows if step else 0
            steps += 1
        elif step and step.n_decode == running:
            begin = time.perf_counter()
        control.events.clear()
        control.records.clear()
        if trace:
            trace.entries.clear()
    seconds = time.perf_counter() - begin
    return {"rows": rows, "steps": steps, "seconds": seconds, "rows_per_s": rows / seconds}


def main() -> None:
    print("the simulated control plane, one core: prompts of 128, outputs of 512 tokens, 64 requests at once")
    print("drafts  traced  rows/s")
    rates = {}
    for spec, traced in ((NoSpec(), False), (NoSpec(), True), (Ngram(block=4), False)):
        rate = max(measure(64, spec, traced=traced)["rows_per_s"] for _ in range(3))
        rates[f"{spec.name}{'_traced' if traced else ''}"] = round(rate)
        print(f"{spec.name:6}  {'yes' if traced else 'no':6}  {rate / 1e3:4.0f} k")
    print(json.dumps({"rows_per_s": rates}))


if __name__ == "__main__":
    main()
