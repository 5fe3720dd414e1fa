"""`python -m xlpk.bench_child`: one engine in a process of its own, measured whenever a line on stdin asks for it.

A job is a JSON object of one line, an answer too. What is slow to make (weights, compiled code) is made for the first
job and kept for the rounds that follow; between two answers the process computes nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.backend import Finished, StepDone, Token
from xlpk.backends.cpu import CpuBackend
from xlpk.backends.library import CpuLibrary
from xlpk.backends.memory import aligned_zeros
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.toolchain import build_cpu_library, build_shared, kernels_folder
from xlpk.weights import Weights
from xlpk.workload import Request

PROMPT = 128  # tokens
SHORT = 8  # tokens of a prompt where a step's width is measured
PAGE = 16  # tokens
POLL_S = 0.002  # seldom: whoever polls takes a core from the loop

Job = dict[str, Any]
Answer = dict[str, Any]


def read_bandwidth(cache: Path, threads: int, buffer_bytes: int, passes: int = 3) -> Answer:
    """Best GB/s over kernels and passes, and which kernel it was."""
    dll = ctypes.CDLL(str(build_shared(kernels_folder() / "bandwidth.cpp", cache).path))
    dll.xl_read_seconds.restype = ctypes.c_double
    unit = 512 * threads
    words = aligned_zeros((buffer_bytes // unit * unit // 8,), np.uint64)
    words[:] = 1  # a page that nobody wrote is the shared page of zeros, and stays in the cache
    best: Answer = {"gb_per_s": 0.0, "kernel": -1}
    for _ in range(passes):
        for kernel in range(dll.xl_read_kernels()):
            total = ctypes.c_uint64()
            seconds = dll.xl_read_seconds(
                ctypes.c_void_p(words.ctypes.data), ctypes.c_uint64(words.nbytes), threads, kernel, ctypes.byref(total)
            )
            assert total.value == words.size
            if words.nbytes / seconds / 1e9 > best["gb_per_s"]:
                best = {"gb_per_s": words.nbytes / seconds / 1e9, "kernel": kernel}
    return best


def open_model(name: str, library: CpuLibrary) -> Model:
    return load_model(name, fill=library.fill_hash)


def prompt_of(model: Model, length: int, seed: int) -> tuple[int, ...]:
    """Token ids by a seed: the same for every engine."""
    return tuple(np.random.default_rng(seed).integers(3, model.config.vocab_size, length).tolist())


def hollow(model: Model) -> Model:
    """A model of as many layers and next to no weights: its step is what a step costs besides reading them."""
    config = replace(
        model.config, hidden_size=32, intermediate_size=32, num_attention_heads=1, num_key_value_heads=1, head_dim=64,
        vocab_size=64, bos_token_id=0, eos_token_ids=(0,), rope_scaling=None,
    )  # fmt: skip
    return Model("hollow", config, Weights.from_hash(config, 0, model.weights.dtype), None)


class Session:
    """A model in the CPU backend. Requests are served in batches; greedy."""

    def __init__(self, model: Model, library: CpuLibrary, cache: Path, threads: int, widest: int, tokens: int) -> None:
        """`widest`: requests of a batch at most. `tokens`: positions of a request at most, for batches of one."""
        self.backend = CpuBackend(
            cache=cache,
            library=library,
            threads=threads,
            max_num_seqs=widest,
            max_step_rows=max(PROMPT, widest),
            prefill_chunk=PROMPT,
        )
        pages = max(tokens // PAGE + 1, widest * ((SHORT + _width_tokens(model)) // PAGE + 1))
        kv = KV(budget=f"{pages}pages", page_size=PAGE)
        self.plan = KVPlan.make(kv, model.config, model.weights.dtype, tokens)
        self.backend.open(model, self.plan)
        self._next_id = 0

    def serve(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[list[StepDone], list[int]]:
        """Runs a batch to its end -> its steps in order, and the output of the first prompt."""
        first = self._next_id
        self._next_id += len(prompts)
        for number, prompt in enumerate(prompts):
            request = Request(first + number, prompt, new_tokens, temperature=0.0, ignore_eos=True, share_prefix=False)
            while not self.backend.submit(request):
                time.sleep(POLL_S)
        steps: list[StepDone] = []
        output: list[int] = []
        left = len(prompts)
        # The step that ended the batch is published after its events.
        while left or sum(step.values["n_finished"] for step in steps) < len(prompts):
            time.sleep(POLL_S)
            for event in self.backend.poll():
                left -= isinstance(event, Finished)
                if isinstance(event, StepDone):
                    steps.append(event)
                elif isinstance(event, Token) and event.request_id == first:
                    output.append(event.token)
        return steps, output

    def step_seconds(self, model: Model, width: int, seed: int) -> list[float]:
        """Seconds of the decode steps that have exactly `width` rows."""
        prompts = [prompt_of(model, SHORT, seed + row) for row in range(width)]
        steps, _ = self.serve(prompts, _width_tokens(model))
        return _periods(steps, lambda v: v["n_decode_rows"] == width == v["n_rows"])


def _width_tokens(model: Model) -> int:
    """Tokens for each row where a step's width is measured: more where a step is short."""
    return int(np.clip(4e9 / model.config.bytes_per_token(model.weights.dtype), 8, 64))


def _periods(steps: Sequence[StepDone], wanted: Callable[[dict[str, int]], bool]) -> list[float]:
    """Seconds from the end of one wanted step to the end of the next: what lies between two steps counts."""
    pairs = [(a.values, b.values) for a, b in pairwise(steps)]
    return [1e-9 * (b["end_ns"] - a["end_ns"]) for a, b in pairs if wanted(a) and wanted(b)]


def _prefill_seconds(steps: Sequence[StepDone]) -> float:
    """From the begin of the first step that has prompt rows to the end of the last."""
    chunks = [step.values for step in steps if step.values["n_prefill_rows"]]
    return 1e-9 * (chunks[-1]["end_ns"] - chunks[0]["begin_ns"])


class Xlpk:
    """xlpk itself. The backend is opened anew for each turn, so that no thread of it waits beside other engines."""

    def __init__(self, job: Job, cache: Path) -> None:
        self.library = CpuLibrary(build_cpu_library(cache))
        if job["mapped"]:  # the file that transformers reads, where it lies
            self.model = load_model(job["model"], Path(job["folder"]))
        else:
            self.model = open_model(job["model"], self.library)
        self.cache = cache

    def __call__(self, job: Job) -> Answer:
        model, threads, widths = self.model, job["threads"], job["widths"]
        tokens = PROMPT + job["decode"]
        session = Session(model, self.library, self.cache, threads, job["widest"], tokens)
        prompt = prompt_of(model, PROMPT, 1)
        session.serve([prompt], 4)  # warm
        prefill_s = [_prefill_seconds(session.serve([prompt], 1)[0]) for _ in range(job["prefills"] - 1)]
        steps, output = session.serve([prompt], job["decode"])
        prefill_s.append(_prefill_seconds(steps))
        decode = [step for step in steps if step.values["n_decode_rows"] == 1]
        by_width = {str(width): float(np.median(session.step_seconds(model, width, 100))) for width in widths}
        session.backend.close()
        step_s = float(np.median(_periods(decode, lambda v: True)))
        answer: Answer = {
            "prefill_tokens_per_s": PROMPT / float(np.median(prefill_s)),
            "decode_tokens_per_s": 1 / step_s,
            "tokens": output,
            "width_step_s": by_width,
            "phase_us": {
                name: float(np.median([s.phase_ns[name] for s in decode])) / 1e3 for name in steps[0].phase_ns
            },
            "bytes_per_token": model.config.bytes_per_token(model.weights.dtype),
            "weights_bytes": model.weights.nbytes,
            "kv_bytes": session.plan.total_bytes,
            "peak_bytes": peak_bytes(),
        }
        if job["fixed_cost"]:
            empty = hollow(model)
            session = Session(empty, self.library, self.cache, threads, 1, PROMPT)
            session.step_seconds(empty, 1, 0)
            answer["fixed_step_us"] = 1e6 * float(np.median(session.step_seconds(empty, 1, 1)))
            session.backend.close()
        return answer


def peak_bytes() -> int:
    """The most memory that was resident in this process (VmHWM), touched pages of mapped files included; 0: unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def write_files(job: Job, cache: Path) -> Answer:
    """Writes what the peers read, where it is not there yet -> {"folder": of the checkpoint, "gguf": {dtype: file}}."""
    from xlpk.backends.peer_files import gguf_file, hf_folder

    model = open_model(job["model"], CpuLibrary(build_cpu_library(cache)))
    files = cache / "bench"
    return {
        "folder": str(hf_folder(model, files)) if job["folder"] else None,
        "gguf": {dtype: str(gguf_file(model, dtype, files)) for dtype in job["gguf"]},
        "prompt": prompt_of(model, PROMPT, 1),
        "dtype": model.weights.dtype,
    }


def open_engine(job: Job, cache: Path) -> Callable[[Job], Answer]:
    """The engine that a job names, ready to answer such jobs."""
    if job["engine"] == "bandwidth":
        return lambda job: read_bandwidth(cache, job["threads"], job["buffer_bytes"])
    if job["engine"] == "files":
        return lambda job: write_files(job, cache)
    if job["engine"] == "xlpk":
        return Xlpk(job, cache)
    if job["engine"] == "transformers":
        from xlpk.backends.hf_speed import Transformers

        peer = Transformers(Path(job["folder"]), job["dtype"], job["threads"], cache / "inductor")
        return lambda job: peer.measure(job["mode"], job["prompt"], job["decode"], job["prefills"])
    from xlpk.backends.llama_cpp_speed import LlamaCpp

    context = len(job["prompt"]) + job["decode"]
    llama = LlamaCpp(Path(job["gguf"]), job["threads"], context)
    return lambda job: llama.measure(job["prompt"], job["decode"], job["prefills"])


def main(argv: Sequence[str] | None = None) -> int:
    (cache,) = map(Path, sys.argv[1:] if argv is None else argv)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    engine: Callable[[Job], Answer] | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            engine = engine or open_engine(job, cache)
            answer = engine(job)
        except Exception as error:  # of a peer: the others go on
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
