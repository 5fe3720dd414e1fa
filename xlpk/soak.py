"""`python -m xlpk.soak`: the control plane under random play for 10^9 events, on all cores, every check of play.cpp on.

A seed draws sizes, policies and the play itself, so it is all that a fault needs to come again. Stops at the first one,
with the command that plays it. What was played is kept in OUTPUTS/soak.json and counts until the kernels change.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlpk.backends.library import usable_cores
from xlpk.backends.memory import Limits
from xlpk.backends.play import play
from xlpk.errors import InputError, ToolError
from xlpk.kv import EVICTIONS
from xlpk.layout import Policy
from xlpk.speculation import Forced, Greedy, Keyed, Ngram, NoSpec, Oracle
from xlpk.toolchain import build_shared, kernels_folder

REQUESTS = 3000  # of a play: about 80,000 events
CAUSES = ("cancelled", "late", "preemptions", "evictions", "moves", "cached_tokens", "accepted")
SAVE_S = 5.0


def scene(seed: int) -> dict[str, Any]:
    """The arguments of `play` that follow from a seed."""
    draw = random.Random(seed)
    running = draw.choice((1, 2, 8, 16))
    page_size = draw.choice((1, 4, 8, 16, 32))
    rules = {
        "seed": seed,
        "max_requests": REQUESTS,
        "max_events": 1 << 40,
        "mean_prompt": draw.choice((10, 50, 90)),
        "mean_output": draw.choice((2, 30, 60)),
        "prefixes": draw.choice((0, 1, 4)),
        "prefix_tokens": draw.choice((32, 64, 100)),
        "arrivals_per_step": draw.choice((1, 1, 4)),
        "cancel_one_in": draw.choice((0, 4, 15)),
        "deadline_one_in": draw.choice((0, 5, 40)),
        "private_one_in": draw.choice((0, 3, 8)),
        "away_one_in": draw.choice((0, 3)),
        "priorities": draw.choice((1, 3)),
        "recount_every": draw.choice((20, 50)),
    }
    policy = draw.choice(list(Policy))
    limits = Limits(
        running, draw.choice((24, 48, 96)), draw.choice((1, 24, 64)), draw.choice((8, 64)), policy, draw.choice((8, 32))
    )
    block = draw.choice((2, 5, 16))
    return {
        "rules": rules,
        "limits": limits,
        "pages": max(16, draw.choice((300, 400, 700, 3200)) // page_size),
        "page_size": page_size,
        "max_len": 256,
        "prefix_sharing": draw.random() < 0.9,
        "eviction": draw.choice(list(EVICTIONS)),
        "swap_pages": draw.choice((0, 0, 8, 60)),
        "events": draw.choice((512, 16384)),
        "spec": draw.choice((NoSpec(), Ngram(block=block), Oracle(block=block, mismatch_stride=draw.choice((0, 3))))),
        "acceptance": draw.choice((Keyed(), Greedy(), Forced(stride=draw.choice((2, 5))))),
    }


@dataclass
class Progress:
    """Seeds below `next_seed` were played without a fault."""

    next_seed: int = 0
    events: int = 0
    causes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))

    def add(self, result: dict[str, Any]) -> None:
        self.next_seed += 1
        self.events += result["events"]
        for cause in CAUSES:
            self.causes[cause] += result[cause]


def read_progress(path: Path, kernels: str) -> Progress:
    """Of these kernels; a new one if there is none, or if it is not readable."""
    try:
        found = json.loads(path.read_text())
        if found["kernels"] != kernels:
            return Progress()
        causes = {cause: int(found["causes"][cause]) for cause in CAUSES}
        return Progress(int(found["next_seed"]), int(found["events"]), causes)
    except (OSError, ValueError, KeyError, TypeError):
        return Progress()


def write_progress(path: Path, kernels: str, progress: Progress) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps({"kernels": kernels, **vars(progress)}) + "\n")
    beside.replace(path)


def results(cache: Path, first: int, jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(seed, what its play came to), in the order of seeds, for ever."""
    with ThreadPoolExecutor(jobs) as pool:  # a play holds no lock of the interpreter
        under_way: deque[tuple[int, Future[dict[str, Any]]]] = deque()
        seed = first
        try:
            while True:
                while len(under_way) < 2 * jobs:
                    under_way.append((seed, pool.submit(lambda chosen: play(cache, **scene(chosen)), seed)))
                    seed += 1
                done, future = under_way.popleft()
                yield done, future.result()
        finally:
            for _, future in under_way:
                future.cancel()


def soak(outputs: Path, events: int, jobs: int) -> int:
    """Plays on until `events` events were played in all -> exit code."""
    cache = outputs / "cache"
    kernels = build_shared(kernels_folder() / "play.cpp", cache).path.stem
    state = outputs / "soak.json"
    progress = read_progress(state, kernels)
    before, begin_s = progress.events, time.monotonic()
    saved_s = shown_s = begin_s
    if progress.next_seed:
        print(f"soak: goes on behind seed {progress.next_seed - 1}, {progress.events:,} events ({state})")
    try:
        for seed, result in results(cache, progress.next_seed, jobs):
            if result["fault"] != "none":
                write_progress(state, kernels, progress)
                fault = f"{result['fault']} (detail {result['detail']}) after {result['events']:,} events"
                print(f"\nsoak: seed {seed}: {fault}")
                print(f"soak: plays it again: python -m xlpk.soak --only {seed}")
                return 1
            progress.add(result)
            now_s = time.monotonic()
            if now_s - shown_s > (0.5 if sys.stdout.isatty() else 30) or progress.events >= events:
                rate = (progress.events - before) / (now_s - begin_s)
                line = f"soak: {progress.events:,} of {events:,} events, {rate:,.0f}/s, next seed {progress.next_seed}"
                print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)
                shown_s = now_s
            if now_s - saved_s > SAVE_S or progress.events >= events:
                write_progress(state, kernels, progress)
                saved_s = now_s
            if progress.events >= events:
                break
    except KeyboardInterrupt:
        write_progress(state, kernels, progress)
        raise
    print("\nsoak: no fault; " + ", ".join(f"{count:,} {cause}" for cause, count in progress.causes.items()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """-> exit code: 1 a fault was found, 2 bad arguments, 3 no compiler, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m xlpk.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--events", default="1e9", help="events in all, those of earlier calls included (1e9)")
    parser.add_argument("--jobs", type=int, default=0, help="plays at once; 0: one a core")
    parser.add_argument("--only", type=int, metavar="SEED", help="plays this seed alone and shows what it came to")
    parser.add_argument("--outputs", default="outputs", help="folder of builds and of soak.json (outputs)")
    args = parser.parse_args(argv)
    outputs = Path(args.outputs).resolve()
    try:
        events = _count(args.events)
        if args.jobs < 0:
            raise InputError("--jobs", args.jobs, "at least 0")
        outputs.mkdir(parents=True, exist_ok=True)
        if args.only is None:
            return soak(outputs, events, args.jobs or usable_cores())
        result = play(outputs / "cache", **scene(args.only))
    except (InputError, ToolError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nsoak: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(json.dumps(result))
    return int(result["fault"] != "none")


def _count(text: str) -> int:
    """`1e9` -> 1000000000."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e15:
        raise InputError("--events", text, "a number of events, 1 to 1e15, such as 1e9")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
