"""Batch-1 decode of the resident loop: in turns with and without flight recorder, tiles, a planner team.

    python experiments/gpu_suite/speed.py [--model NAME] [--output-len N] [--turns N]

One JSON line. Gaps between tokens are the device clock's, in order; the weights' rate is their bytes over the median
gap. The upload's rate has all in it, from the allocation to the last byte's arrival.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.backend import Finished, Token
from xlpk.backends.library import CpuLibrary
from xlpk.backends.persistent import PersistentBackend
from xlpk.errors import BackendError, InputError, ToolError
from xlpk.isolate import leave_if_lost
from xlpk.kv import KV, KVPlan
from xlpk.model import Model, load_model
from xlpk.toolchain import build_cpu_library
from xlpk.workload import Request

CACHE = Path(__file__).resolve().parents[2] / "outputs" / "cache"
PROMPT_LEN = 128
WITHIN_S = 120.0
# (flight recorder, backend.weight_layout, scheduler.planner)
VARIANTS = ((True, "rows", "team"), (False, "rows", "team"), (True, "tiles", "team"), (True, "rows", "inline"))


def measure(
    model: Model, library: CpuLibrary, flight: bool, weight_layout: str, planner: str, output_len: int
) -> dict[str, Any]:
    """One session: a request to warm up, one that is measured."""
    backend = PersistentBackend(
        cache=CACHE, library=library, flight=flight, weight_layout=weight_layout, planner=planner, max_num_seqs=4
    )
    try:
        backend.open(model, KVPlan.make(KV(budget="128pages"), model.config, model.weights.dtype, 1024))
        decode(backend, 0, model.config.vocab_size, 16)
        stamps_ns = decode(backend, 1, model.config.vocab_size, output_len)
        details = backend.close().details
    finally:
        backend.close()
    gaps_us = np.diff(stamps_ns) / 1e3
    p50_us = float(np.median(gaps_us))
    upload_s = float(details["upload_seconds"])
    return {
        "flight": flight,
        "weight_layout": weight_layout,
        "planner": planner,
        "itl_us.p50": round(p50_us, 2),
        "itl_us.p99": round(float(np.percentile(gaps_us, 99)), 2),
        "weights_gb_per_s": round(model.weights.nbytes / p50_us / 1e3, 1),
        "upload_seconds": upload_s,
        "upload_gb_per_s": round(int(details["upload_bytes"]) / upload_s / 1e9, 2) if upload_s else None,
        "build_seconds": float(details["build_seconds"]),
        "gaps_us": gaps_us.tolist(),
    }


def decode(backend: PersistentBackend, request_id: int, vocab: int, output_len: int) -> list[int]:
    """When each token was published, by the device clock."""
    prompt = tuple((7 + 31 * position) % vocab for position in range(PROMPT_LEN))
    backend.submit(Request(request_id, prompt, output_len, ignore_eos=True, share_prefix=False))
    stamps_ns: list[int] = []
    give_up = time.monotonic() + WITHIN_S
    while time.monotonic() < give_up:
        events = backend.poll()
        stamps_ns += [event.device_ns for event in events if isinstance(event, Token)]
        if any(isinstance(event, Finished) for event in events):
            return stamps_ns
    raise BackendError(f"{len(stamps_ns)} of {output_len} tokens in {WITHIN_S:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_1b_shape")
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=2, help="sessions of each variant")
    chosen = parser.parse_args()
    library = CpuLibrary(build_cpu_library(CACHE))
    model = load_model(chosen.model, fill=library.fill_hash)
    runs = [measure(model, library, *how, chosen.output_len) for _ in range(chosen.turns) for how in VARIANTS]
    found = {"model": chosen.model, "weights_bytes": model.weights.nbytes}
    print(json.dumps({**found, "prompt_len": PROMPT_LEN, "output_len": chosen.output_len, "runs": runs}))


if __name__ == "__main__":
    code = 0
    try:
        main()
    except (BackendError, InputError, ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    leave_if_lost(code)
    sys.exit(code)
