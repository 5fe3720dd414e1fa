"""What a run costs beside its measurement: processes of the tiny model from start to end, by the wall clock.

The kernels are built, and the run before it has brought what a process reads into the page cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlpk.bench_report import shown, spread
from xlpk.errors import ToolError

Answer = dict[str, Any]
MOMENTS = {  # what is timed -> the first event in the log that says so
    "header": "header",  # config composed, model mapped, the backend about to be opened
    "submit": "submit",
    "step": "step",
    "token": "token",
    "end": "end",
}
LIMITS_S = {("none", "step_s"): 1.0, ("mlflow", "step_s"): 2.0, ("mlflow", "tracking_s"): 1.5}


@contextlib.contextmanager
def outputs_of(cache: Path) -> Iterator[Path]:
    """A folder for runs that shares the builds."""
    with tempfile.TemporaryDirectory() as held:
        outputs = Path(held)
        (outputs / "cache").symlink_to(cache.resolve())
        yield outputs


def one_run(outputs: Path, name: str, *options: str) -> Answer:
    """Seconds from before the process was started to each moment (of the first event of its kind) and to its exit."""
    overrides = (*options, f"run.outputs={outputs}", f"hydra.run.dir={outputs}/{name}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    command = [sys.executable, "-m", "xlpk.run", *overrides]
    begin_ns = time.monotonic_ns()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    exit_ns = time.monotonic_ns()
    if done.returncode:
        raise ToolError(f"bench, start of a run: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    seen: dict[str, int] = {}
    for line in (outputs / name / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        seen.setdefault(event["event"], event.get("host_ns", 0))
    moments = {f"{moment}_s": (seen[event] - begin_ns) / 1e9 for moment, event in MOMENTS.items()}
    return {**moments, "exit_s": (exit_ns - begin_ns) / 1e9}


def first_token(cache: Path) -> Answer:
    """Seconds from the start of a process to the first token that its host saw. Tracking and warm-up are off."""
    with outputs_of(cache) as outputs:
        found = one_run(outputs, "run", "tracking=none", "run.warmup_steps=0")
    return {name: found[name] for name in ("header_s", "submit_s", "token_s")}


def startup(cache: Path, rounds: int) -> Answer:
    """tracking -> moment -> median, least, most. `tracking_s`: what lies between the log's end and the process's, less
    what does without MLflow."""
    found: dict[str, list[Answer]] = {"none": [], "mlflow": []}
    with outputs_of(cache) as outputs:
        for number in range(rounds + 1):
            for tracking, runs in found.items():
                runs.append(one_run(outputs, f"{tracking}-{number}", f"tracking={tracking}"))
    for runs in found.values():
        del runs[0]  # made the store, and read everything for the first time
    for plain, logged in zip(found["none"], found["mlflow"], strict=True):
        logged["tracking_s"] = (logged["exit_s"] - logged["end_s"]) - (plain["exit_s"] - plain["end_s"])
    return {
        tracking: {name: spread([run[name] for run in runs]) for name in runs[0]} for tracking, runs in found.items()
    }


def print_startup(report: Answer) -> None:
    """For people."""
    for tracking, found in report.items():
        moments = ", ".join(f"{name.removesuffix('_s')} {shown(spread, 2)}" for name, spread in found.items())
        print(f"tracking={tracking}, seconds from the start of the process: {moments}")
    for (tracking, name), limit_s in LIMITS_S.items():
        found_s = report[tracking][name]["median"]
        print(f"  {tracking} {name.removesuffix('_s')}: {found_s:.2f} s, to reach {limit_s} s")
