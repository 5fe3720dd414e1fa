"""`python -m xlpk.bench --control`: how fast the control plane decides, alone and within steps of the tiny model.

Alone: kernels/play.cpp without its checks, one core, prompts of 128 and outputs of 64 tokens in the mean. A decision is
one row planned in one step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xlpk import layout
from xlpk.backends.memory import Limits
from xlpk.backends.play import play
from xlpk.speculation import Ngram, NoSpec

RULES = {
    "seed": 1,
    "max_events": 1 << 40,
    "mean_prompt": 128,
    "mean_output": 64,
    "prefixes": 4,
    "prefix_tokens": 64,
    "arrivals_per_step": 4,
}
CASES = ((1, NoSpec()), (1, Ngram(block=4)), (64, NoSpec()), (64, Ngram(block=4)))  # requests at once, drafts


def measure(cache: Path, requests: int = 20_000) -> list[dict[str, Any]]:
    """A row a case: rows a step, decisions a second, microseconds of control a step."""
    out = []
    for running, spec in CASES:
        limits = Limits(running, 256, 64, 1024, layout.Policy.FCFS, 64)
        count = max(200, requests * running // 64)
        done = play(cache, {**RULES, "max_requests": count}, limits, pages=4096, spec=spec)
        if done["fault"] != "none":
            raise AssertionError(done)
        out.append(
            {
                "running": running,
                "spec": spec.name,
                "requests": done["requests"],
                "rows_per_step": done["rows"] / done["steps"],
                "decisions_per_s": done["rows"] / done["control_ns"] * 1e9,
                "control_us_per_step": done["control_ns"] / done["steps"] / 1e3,
                "hit_rate": done["cached_tokens"] / done["prompt_tokens"],
            }
        )
    return out


def print_control(rows: list[dict[str, Any]]) -> None:
    print("the control plane alone, one core: prompts of 128, outputs of 64 tokens in the mean")
    print("requests at once  drafts  rows a step  decisions/s  us a step")
    for row in rows:
        rate = f"{row['decisions_per_s'] / 1e6:.1f} M"
        print(
            f"{row['running']:16d}  {row['spec']:6}  {row['rows_per_step']:11.1f}  {rate:>11}"
            f"  {row['control_us_per_step']:9.2f}"
        )
