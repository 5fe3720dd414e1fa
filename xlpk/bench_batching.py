"""`python -m xlpk.bench --batching`: what batching gains on the tiny model, and what control costs within its steps.

A round measures the cases one after another, so that ratios compare neighbours in time. Then many short requests over
one launch: requests a second, and the memory of the process, which must not grow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import StepDone
from xlpk.backends.cpu import CpuBackend
from xlpk.backends.library import CpuLibrary
from xlpk.backends.submitter import _submission
from xlpk.bench_report import shown, spread
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.speculation import Ngram, NoSpec
from xlpk.toolchain import build_cpu_library
from xlpk.workload import Request

Answer = dict[str, Any]

MANY = 64  # requests of a batch
PROMPT, OUTPUT, PREFIX = 16, 64, 64  # tokens
SHORT = (8, 4)  # prompt and output tokens of the requests of one launch
MAX_LEN = 256
PAGE = 16  # tokens
POLL_S = 0.002  # seldom: whoever polls takes a core from the loop
_BATCH = 4096  # events taken in one call


@dataclass(frozen=True)
class Case:
    """Requests that run at once, and what they meet."""

    running: int
    what: str  # ample, drafts, pressure, sharing

    @property
    def requests(self) -> int:
        """One after another where they run one at a time, else all at once."""
        return max(self.running, 8)

    @property
    def kv(self) -> KV:
        each = -(-(PROMPT + OUTPUT) // PAGE)
        if self.what == "pressure":  # half of what they need at their ends
            return KV(budget=f"{max(each, self.running * each // 2)}pages", page_size=PAGE)
        return KV(budget=f"{self.running * (each + PREFIX // PAGE + 1)}pages", page_size=PAGE)


CASES = (Case(1, "ample"), Case(MANY, "ample"), Case(MANY, "drafts"), Case(MANY, "pressure"), Case(MANY, "sharing"))


def prompts_of(model: Model, case: Case) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    prefix = rng.integers(0, model.config.vocab_size, PREFIX if case.what == "sharing" else 0).tolist()
    return [(*prefix, *rng.integers(0, model.config.vocab_size, PROMPT).tolist()) for _ in range(case.requests)]


def open_backend(model: Model, library: CpuLibrary, running: int, kv: KV, drafts: bool = False) -> CpuBackend:
    backend = CpuBackend(
        cache=Path(),
        library=library,
        max_num_seqs=running,
        max_step_rows=4 * MANY,
        prefill_chunk=MANY,
        max_waiting=1024,
        spec=Ngram(block=4) if drafts else NoSpec(),
    )
    backend.open(model, KVPlan.make(kv, model.config, model.weights.dtype, MAX_LEN))
    return backend


def serve(backend: CpuBackend, requests: Sequence[Request]) -> list[StepDone]:
    """The steps of these requests, to the end of the last."""
    for request in requests:
        while not backend.submit(request):
            time.sleep(POLL_S)
    steps: list[StepDone] = []
    while sum(step.values["n_finished"] for step in steps) < len(requests):
        time.sleep(POLL_S)
        steps += [event for event in backend.poll() if isinstance(event, StepDone)]
    return steps


def batch(model: Model, library: CpuLibrary, case: Case) -> Answer:
    """One batch from its first step to its last: tokens a second, control's share of the time of all phases."""
    prompts = prompts_of(model, case)
    requests = [Request(i, prompt, OUTPUT, temperature=0.0, ignore_eos=True) for i, prompt in enumerate(prompts)]
    backend = open_backend(model, library, case.running, case.kv, case.what == "drafts")
    try:
        serve(backend, [replace(requests[0], request_id=len(requests))])  # warm, and there is something to share
        steps = serve(backend, requests)
    finally:
        backend.close()
    values = [step.values for step in steps]
    seconds = 1e-9 * (values[-1]["end_ns"] - values[0]["begin_ns"])
    phase_us = {name: sum(step.phase_ns[name] for step in steps) / 1e3 / len(steps) for name in steps[0].phase_ns}
    return {
        "tokens_per_s": sum(v["n_tokens"] for v in values) / seconds,
        "step_us": 1e6 * seconds / len(steps),
        "rows_per_step": sum(v["n_rows"] for v in values) / len(steps),
        "control_share": phase_us["control"] / sum(phase_us.values()),
        "preemptions": sum(v["n_preemptions"] for v in values),
        "prefill_rows": sum(v["n_prefill_rows"] for v in values),
        **{f"{name}_us": us for name, us in phase_us.items()},
    }


def resident_bytes() -> int:
    """Of this process now; 0: unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def stream(model: Model, library: CpuLibrary, requests: int) -> Answer:
    """`requests` short ones over one launch. The host keeps nothing of them: what grows is the loop's."""
    prompt_len, output_len = SHORT
    backend = open_backend(model, library, MANY, KV(budget=f"{4 * MANY}pages", page_size=PAGE))
    dll, params = library.dll, backend._params
    events = np.zeros(_BATCH, layout.EVENT.dtype)
    logprobs = np.zeros(_BATCH, layout.LOGPROBS.dtype)
    records = np.zeros(_BATCH, layout.STEP_RECORD.dtype)
    rng = np.random.default_rng(2)
    prompt = tuple(rng.integers(0, model.config.vocab_size, prompt_len).tolist())
    submission, tokens = _submission(Request(0, prompt, output_len, temperature=0.0, ignore_eos=True))
    sent = done = steps = n_tokens = 0
    resident: list[int] = []
    begin = time.monotonic()
    try:
        while done < requests:
            while sent < requests:
                submission["request_id"] = sent
                tokens[:] = (tokens + 1 + sent % 7) % model.config.vocab_size  # other prompts, other pages
                if not dll.xl_submit(params, submission.ctypes.data, tokens.ctypes.data):
                    break
                sent += 1
            steps += dll.xl_take_steps(params, records.ctypes.data, _BATCH)
            count = dll.xl_take_events(params, events.ctypes.data, logprobs.ctypes.data, _BATCH)
            kinds = events["kind"][:count]
            done += int((kinds == layout.EventKind.FINISHED).sum())
            n_tokens += int((kinds == layout.EventKind.TOKEN).sum())
            if done * 10 >= requests * (len(resident) + 1):
                resident.append(resident_bytes())
            backend._raise_if_aborted()
            if count < _BATCH // 4:
                time.sleep(POLL_S)
        seconds = time.monotonic() - begin
    finally:
        report = backend.close()
    return {
        "requests": requests,
        "launches": report.launches,
        "seconds": seconds,
        "requests_per_s": requests / seconds,
        "tokens": n_tokens,
        "steps": steps,
        "resident_bytes": resident,  # after each tenth of the requests
        "growth_bytes": max(resident) - resident[0],
    }


def measure(cache: Path, rounds: int, requests: int) -> Answer:
    """What `print_batching` prints: `cases` over the rounds, `batching_gain` by round, `stream`."""
    library, model = CpuLibrary(build_cpu_library(cache)), load_model("tiny")
    batch(model, library, CASES[1])  # warm
    found: dict[Case, list[Answer]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, answers in found.items():
            answers.append(batch(model, library, case))
    one, many = (found[case] for case in CASES[:2])
    return {
        "cases": [
            {
                "running": case.running,
                "what": case.what,
                **{key: spread([a[key] for a in answers]) for key in answers[0]},
            }
            for case, answers in found.items()
        ],
        "batching_gain": spread([b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(one, many, strict=True)]),
        "stream": stream(model, library, requests),
    }


def print_batching(report: Answer) -> None:
    rows: Sequence[Answer] = report["cases"]
    print(f"the tiny model, prompts of {PROMPT} and outputs of {OUTPUT} tokens; sharing: behind {PREFIX} common ones")
    print("requests  meet      tokens/s                  rows a step  us a step            control, us  its share")
    for row in rows:
        print(
            f"{row['running']:8d}  {row['what']:8}  {shown(row['tokens_per_s']):24}  "
            f"{row['rows_per_step']['median']:11.1f}  {shown(row['step_us']):19}  "
            f"{row['control_us']['median']:11.2f}  {row['control_share']['median']:.2%}"
        )
    print(f"{MANY} requests at once make {shown(report['batching_gain'], 2)} times the tokens/s of one")
    found = report["stream"]
    print(
        f"{found['requests']:,} requests of {SHORT[0]} + {SHORT[1]} tokens over {found['launches']} launch: "
        f"{found['requests_per_s']:,.0f}/s, {found['steps']:,} steps; resident memory grew by "
        f"{found['growth_bytes'] / 1024:,.0f} KiB after the first tenth"
    )
