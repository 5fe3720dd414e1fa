"""`python -m xlpk.bench` (`make bench`, `make bench-peers`): what this machine reads, what xlpk and others make of it.

Each engine is a process of its own that lives as long as its model and number of threads are measured. A round asks all
of them, one after another, so that every ratio compares neighbours in time; between its turns an engine computes
nothing. docs/performance.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xlpk import bench_batching, bench_control
from xlpk.backends.library import usable_cores
from xlpk.bench_report import print_report, spread, summarise
from xlpk.bench_startup import first_token, print_startup, startup
from xlpk.errors import InputError, ToolError
from xlpk.model import SHAPES
from xlpk.toolchain import build_cpu_library, build_shared, kernels_folder

MODELS = ("tiny", "llama_160m_shape", "llama_1b_shape")
PEERS = {  # engine -> (its modes, the modules that it needs, the extra that brings them)
    "transformers": (("eager", "static", "compiled", "max_autotune"), ("torch", "transformers"), "peers"),
    "llama.cpp": (("bf16", "f16"), ("llama_cpp", "gguf"), "bench-peers"),
}
WIDTHS = (1, 8, 16, 64)  # rows of a step
# (tokens decoded, prompts read) in one turn: more of them where they are short.
TURN, LONG_TURN = {"tiny": (256, 9), "llama_160m_shape": (64, 3)}, (24, 1)
ANSWER_LIMIT_S = 900  # torch compiles in there
# numpy asks for huge pages by itself; these ask for them on behalf of the peers.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}

Job = dict[str, Any]
Answer = dict[str, Any]


class Child:
    """A running `xlpk.bench_child`."""

    def __init__(self, cache: Path, threads: int, extra: dict[str, str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (what it writes besides answers)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "xlpk.bench_child", str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads), **extra},
        )

    def ask(self, job: Job) -> Answer:
        """The answer, or {"error": one line}; after the latter the child may be gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_LIMIT_S)
        if not ready:
            self._process.kill()
            return {"error": f"no answer in {ANSWER_LIMIT_S} s"}
        line = self._process.stdout.readline()
        if line:
            answer: Answer = json.loads(line)
            return answer
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return {"error": f"exit code {code}: " + (said[-1][:200] if said else "it said nothing")}

    def close(self) -> None:
        """Its end of input ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def engine_jobs(args: argparse.Namespace, model: str, threads: int, files: Answer) -> dict[str, Job]:
    """One round: name of an engine -> what it is asked. Bandwidth stands directly before what is compared with it."""
    decode, prefills = TURN.get(model, LONG_TURN)
    common: Job = {"model": model, "threads": threads, "decode": args.decode or decode, "prefills": prefills}
    ours = {
        **common,
        "engine": "xlpk",
        "widest": max(args.widths),
        "folder": files.get("folder"),
        "fixed_cost": model == "tiny",
    }
    jobs: dict[str, Job] = {
        "bandwidth": {"engine": "bandwidth", "threads": threads, "buffer_bytes": args.buffer_mib << 20},
        "xlpk": {**ours, "mapped": False, "widths": args.widths},
    }
    if args.mapped and model in SHAPES:
        jobs["xlpk mapped"] = {**ours, "mapped": True, "widths": [], "fixed_cost": False}
    for peer in args.peers:
        engine, _, mode = peer.partition(":")
        job = {**common, "engine": engine, "mode": mode, "prompt": files["prompt"], "dtype": files["dtype"]}
        if engine == "transformers":
            job["folder"] = files["folder"]
        else:
            job["gguf"] = files["gguf"][mode]
        jobs[f"{engine} {mode}"] = job
    return jobs


def process_of(name: str, job: Job) -> str:
    """Which process answers a job: the modes of transformers share one but for `max_autotune`."""
    return "transformers" if job["engine"] == "transformers" and job["mode"] != "max_autotune" else name


@contextlib.contextmanager
def children(args: argparse.Namespace, jobs: dict[str, Job], threads: int) -> Iterator[dict[str, Child]]:
    """Name of an engine -> its process; all end with the block."""
    started: dict[str, Child] = {}
    try:
        for name, job in jobs.items():
            peer = job["engine"] in PEERS
            started.setdefault(process_of(name, job), Child(args.cache, threads, HUGE_PAGES if peer else {}))
        yield {name: started[process_of(name, job)] for name, job in jobs.items()}
    finally:
        for child in started.values():
            child.close()


def measure(args: argparse.Namespace, model: str, threads: int) -> list[dict[str, Answer]]:
    """The rounds of one model and number of threads: name of an engine -> its answer."""
    files: Answer = {}
    modes = {name: [p.partition(":")[2] for p in args.peers if p.startswith(name)] for name in PEERS}
    if args.peers or args.mapped:
        writer = Child(args.cache, usable_cores(), {})
        wanted = bool(modes["transformers"] or args.mapped)
        files = writer.ask({"engine": "files", "model": model, "folder": wanted, "gguf": modes["llama.cpp"]})
        writer.close()
        if "error" in files:
            raise ToolError(f"bench {model}, files for the peers: {files['error']}")
    jobs = engine_jobs(args, model, threads, files)
    rounds: list[dict[str, Answer]] = []
    with children(args, jobs, threads) as running:
        for number in range(args.rounds):
            answers: dict[str, Answer] = {}
            for name, job in jobs.items():
                failed = rounds and "error" in rounds[-1][name]
                begin = time.monotonic()
                answers[name] = rounds[-1][name] if failed else running[name].ask(job)
                took = f"{time.monotonic() - begin:.1f} s"
                say(f"{model}, {threads} threads, round {number + 1}/{args.rounds}: {name}, {took}")
                if "error" in answers[name] and job["engine"] not in PEERS:
                    raise ToolError(f"bench {model}, {threads} threads, {name}: {answers[name]['error']}")
            rounds.append(answers)
    return rounds


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = [f"{engine}:{mode}" for engine, (modes, _, _) in PEERS.items() for mode in modes]
    parser = argparse.ArgumentParser(prog="python -m xlpk.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(["tiny", *SHAPES]))
    parser.add_argument(
        "--threads", type=_numbers, default=None, help="such as 1,2; default: 1, and 2 where there are two cores"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that every engine is measured")
    parser.add_argument("--decode", type=int, default=None, help="tokens decoded in a turn; default: by the model")
    parser.add_argument("--widths", type=_numbers, default=list(WIDTHS), help="rows of a step; the first is the base")
    parser.add_argument("--peers", default="transformers", help="none, or of " + ", ".join([*PEERS, *known]))
    parser.add_argument("--no-mapped", dest="mapped", action="store_false", help="without xlpk on a mapped checkpoint")
    parser.add_argument("--buffer-mib", type=int, default=2048, help="MiB read to measure bandwidth")
    parser.add_argument("--quick", action="store_true", help="the tiny model, one round: does it work at all")
    parser.add_argument("--startup", action="store_true", help="only what a run costs beside its measurement")
    parser.add_argument("--control", action="store_true", help="only how fast the control plane decides, alone")
    parser.add_argument("--batching", action="store_true", help="only what batching gains, and control within steps")
    parser.add_argument("--requests", type=int, default=100_000, help="of the one launch of --batching")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the JSON goes to OUTPUTS/bench")
    parser.add_argument("--cache", type=Path, default=None, help="builds, files for peers; default: OUTPUTS/cache")
    args = parser.parse_args(argv)
    args.cache = args.cache or args.outputs / "cache"
    args.models = args.models.split(",")
    args.threads = args.threads or ([1, 2] if usable_cores() > 1 else [1])
    if args.quick:
        args.models, args.rounds, args.decode, args.buffer_mib = ["tiny"], 1, 16, 64
    for model in args.models:
        if model != "tiny" and model not in SHAPES:
            raise InputError("--models", model, f"of tiny, {', '.join(SHAPES)}")
    peers: list[str] = []
    for peer in [] if args.peers == "none" else args.peers.split(","):
        if peer not in PEERS and peer not in known:
            raise InputError("--peers", peer, f"none, or of {', '.join([*PEERS, *known])}")
        peers += [name for name in known if peer in (name, name.partition(":")[0]) and name not in peers]
    args.peers = peers
    for option in ("rounds", "buffer_mib", "requests"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option.replace('_', '-')}", getattr(args, option), "at least 1")
    if args.decode is not None and args.decode < 3:
        raise InputError("--decode", args.decode, "at least 3")
    if min(args.widths) < 1 or min(args.threads) < 1:
        raise InputError("--widths, --threads", f"{args.widths}, {args.threads}", "numbers of at least 1")
    return args


def missing_peers(args: argparse.Namespace) -> list[str]:
    """Takes the peers that are not installed out of `args.peers` -> a line for each."""
    notes = []
    for engine, (_, modules, extra) in PEERS.items():
        absent = [module for module in modules if not find_spec(module)]
        kept = [peer for peer in args.peers if not peer.startswith(engine)]
        if absent and kept != args.peers:
            notes.append(f"{engine}: skipped, {' and '.join(absent)} not installed (the extra `{extra}`)")
            args.peers = kept
    return notes


def bench(args: argparse.Namespace) -> Answer:
    """All of it -> the report, which is printed and written too."""
    begin = time.monotonic()
    build_cpu_library(args.cache)  # here, so that no measurement has a compiler beside it
    build_shared(kernels_folder() / "bandwidth.cpp", args.cache)
    notes = missing_peers(args)
    rows: list[Answer] = []
    for model in args.models:
        for threads in args.threads:
            rows.append(summarise(model, threads, measure(args, model, threads), args.widths))
    cold: Answer = {}
    whole: Answer = {}
    if "tiny" in args.models:
        first_token(args.cache)  # brings what it reads into the page cache
        starts = [first_token(args.cache) for _ in range(args.rounds)]
        cold = {name: spread([start[name] for start in starts]) for name in starts[0]}
        whole = {} if args.quick else startup(args.cache, args.rounds)
    report = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "cores": usable_cores(),
        "rounds": args.rounds,
        "seconds": round(time.monotonic() - begin, 1),
        "rows": rows,
        "first_token": cold,
        "startup": whole,
        "skipped": notes,
    }
    folder = args.outputs / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(report)
    (folder / f"{datetime.now():%Y-%m-%d-%H%M%S}.json").write_text(line + "\n")
    print_report(report)
    if whole:
        print_startup(whole)
    print(line)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.startup:
            build_cpu_library(args.cache)
            report = startup(args.cache, args.rounds)
            print_startup(report)
            print(json.dumps(report))
        elif args.control:
            rows = bench_control.measure(args.cache)
            bench_control.print_control(rows)
            print(json.dumps(rows))
        elif args.batching:
            report = bench_batching.measure(args.cache, args.rounds, args.requests)
            bench_batching.print_batching(report)
            print(json.dumps(report))
        else:
            bench(args)
    except (InputError, ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
