"""`python -m xlpk.bench` (`make bench`): what this machine reads, and what xlpk and transformers make of it.

Each measurement is a child process of its own. A round runs all of them one after another, so that every ratio compares
neighbours in time; the table shows medians over rounds and the interval from the least to the most. MBU is the bytes a
token must move, times tokens a second, over the read bandwidth of the same round with the same number of threads.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.backend import Finished, StepDone
from xlpk.backends.cpu import CpuBackend, CpuLibrary, usable_cores
from xlpk.backends.memory import aligned_zeros
from xlpk.errors import InputError, ToolError
from xlpk.kv import KV, KVPlan
from xlpk.model import SHAPES, Model, load_model
from xlpk.toolchain import build_cpu_library, build_shared, kernels_folder
from xlpk.units import format_bytes
from xlpk.workload import Request

MODELS = ("tiny", "llama_160m_shape", "llama_1b_shape")
PEER_MODES = ("eager", "static", "compiled")
PROMPT = 128  # tokens
WIDTHS = (1, 8, 16, 64)  # rows of a step
PAGE = 16  # tokens
CHILD_LIMIT_S = 1800


# ---------------------------------------------------------------------------------------------- in the child


def read_bandwidth(cache: Path, threads: int, buffer_bytes: int, passes: int = 3) -> dict[str, float]:
    """Best GB/s over kernels and passes, and which kernel it was."""
    dll = ctypes.CDLL(str(build_shared(kernels_folder() / "bandwidth.cpp", cache).path))
    dll.xl_read_seconds.restype = ctypes.c_double
    unit = 512 * threads
    words = aligned_zeros((buffer_bytes // unit * unit // 8,), np.uint64)
    words[:] = 1  # a page that nobody wrote is the shared page of zeros, and stays in the cache
    best: dict[str, float] = {"gb_per_s": 0.0, "kernel": -1}
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
    return tuple(np.random.default_rng(seed).integers(3, model.config.vocab_size, length).tolist())


def measure_xlpk(
    cache: Path, name: str, threads: int, decode: int, repeats: int, widths: Sequence[int], folder: Path | None = None
) -> dict[str, Any]:
    """Medians over `repeats` in one session: prefill and decode tokens/s, step seconds by width, peak memory.

    `folder`: another copy of the kernels, to compare two.
    """
    library = CpuLibrary(build_cpu_library(cache, folder=folder))
    model = open_model(name, library)
    rows = max(PROMPT, *widths)
    backend = CpuBackend(
        cache=cache,
        library=library,
        threads=threads,
        max_num_seqs=max(widths),
        max_step_rows=rows,
        prefill_chunk=PROMPT,
    )
    pages = max(max(widths) * 2, (PROMPT + decode) // PAGE + 2)
    plan = KVPlan.make(KV(budget=f"{pages}pages", page_size=PAGE), model.config, model.weights.dtype, PROMPT + decode)
    backend.open(model, plan)
    next_id = 0

    def serve(prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[StepDone]:
        """Steps of a batch that runs to its end."""
        nonlocal next_id
        for prompt in prompts:
            request = Request(next_id, prompt, new_tokens, temperature=0.0, ignore_eos=True)
            while not backend.submit(request):
                time.sleep(0.001)
            next_id += 1
        steps: list[StepDone] = []
        left = len(prompts)
        while left:
            time.sleep(0.002)
            for event in backend.poll():
                left -= isinstance(event, Finished)
                if isinstance(event, StepDone):
                    steps.append(event)
        # The last step is published after the events that ended the batch.
        deadline = time.monotonic() + 1.0
        while sum(step.values["n_finished"] for step in steps) < len(prompts) and time.monotonic() < deadline:
            steps += [event for event in backend.poll() if isinstance(event, StepDone)]
        return steps

    def seconds(steps: Sequence[StepDone], wanted: Callable[[dict[str, Any]], bool]) -> list[float]:
        return [1e-9 * (s.values["end_ns"] - s.values["begin_ns"]) for s in steps if wanted(s.values)]

    prefill, decode_s, phases = [], [], []
    by_width: dict[int, list[float]] = {width: [] for width in widths}
    for repeat in range(repeats + 1):  # the first one warms up
        steps = serve([prompt_of(model, PROMPT, repeat)], decode)
        if repeat:
            prefill.append(PROMPT / sum(seconds(steps, lambda v: v["n_prefill_rows"] > 0)))
            one = [s for s in steps if s.values["n_decode_rows"] == 1]
            decode_s += seconds(one, lambda v: True)
            phases += [s.phase_ns for s in one]
        for width in widths:
            steps = serve([prompt_of(model, 8, 100 * repeat + i) for i in range(width)], 8)
            if repeat:
                by_width[width] += seconds(steps, lambda v, n=width: v["n_decode_rows"] == n == v["n_rows"])  # type: ignore[misc]
    backend.close()
    step_s = float(np.median(decode_s))
    moved = model.config.bytes_per_token(model.weights.dtype)
    stored = model.weights.nbytes + plan.total_bytes
    peak = peak_bytes()
    return {
        "prefill_tokens_per_s": float(np.median(prefill)),
        "decode_tokens_per_s": 1 / step_s,
        "bytes_per_token": moved,
        "decode_gb_per_s": moved / step_s / 1e9,
        "width_step_s": {str(width): float(np.median(found)) for width, found in by_width.items()},
        "phase_us": {name: float(np.median([p[name] for p in phases])) / 1e3 for name in phases[0]},
        "peak_bytes": peak,
        "stored_bytes": stored,
    }


def peak_bytes() -> int:
    """VmHWM of this process; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measure(job: dict[str, Any], cache: Path) -> dict[str, Any]:
    """What a child does: one job -> its numbers."""
    if job["kind"] == "bandwidth":
        return dict(read_bandwidth(cache, job["threads"], job["buffer_bytes"]))
    if job["kind"] == "xlpk":
        return measure_xlpk(cache, job["model"], job["threads"], job["decode"], job["repeats"], job["widths"])
    from xlpk.backends.hf_speed import measure_transformers

    library = CpuLibrary(build_cpu_library(cache))
    model = open_model(job["model"], library)
    prompt = prompt_of(model, PROMPT, 1)
    return measure_transformers(
        model, cache / "bench", job["mode"], job["threads"], prompt, job["decode"], job["repeats"]
    )


# ---------------------------------------------------------------------------------------------- in the parent


def run_child(job: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The job's numbers, or {"error": the last line it wrote}."""
    command = [sys.executable, "-m", "xlpk.bench", "--cache", str(cache), "--child", json.dumps(job)]
    threads = str(job["threads"])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": threads}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=CHILD_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {CHILD_LIMIT_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def jobs_of(args: argparse.Namespace, peers: bool) -> list[dict[str, Any]]:
    """One round: bandwidth directly before what is compared with it."""
    jobs: list[dict[str, Any]] = []
    for model in args.models:
        for threads in args.threads:
            common = {"model": model, "threads": threads, "decode": args.decode, "repeats": args.repeats}
            jobs.append(
                {"kind": "bandwidth", "threads": threads, "model": model, "buffer_bytes": args.buffer_mib << 20}
            )
            jobs.append({"kind": "xlpk", **common, "widths": args.widths})
            if peers:
                jobs += [{"kind": "transformers", **common, "mode": mode} for mode in args.peer_modes]
    return jobs


def key_of(job: dict[str, Any]) -> str:
    return "/".join(str(job[part]) for part in ("kind", "model", "threads", "mode") if part in job)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": float(min(values)), "most": float(max(values))}


def summarise(rounds: Sequence[dict[str, dict[str, Any]]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each (model, threads): medians and intervals over the rounds in which a child answered."""
    rows = []
    for model in args.models:
        for threads in args.threads:
            at = f"{model}/{threads}"
            pairs = [(r[f"bandwidth/{at}"], r[f"xlpk/{at}"]) for r in rounds]
            failed = [found["error"] for pair in pairs for found in pair if "error" in found]
            if failed:
                raise ToolError(f"bench {at}: {failed[0]}")
            ours = [own for _, own in pairs]
            one = [own["width_step_s"][str(args.widths[0])] for own in ours]
            row: dict[str, Any] = {
                "model": model,
                "threads": threads,
                "read_gb_per_s": spread([read["gb_per_s"] for read, _ in pairs]),
                "bytes_per_token": ours[0]["bytes_per_token"],
                "prefill_tokens_per_s": spread([own["prefill_tokens_per_s"] for own in ours]),
                "decode_tokens_per_s": spread([own["decode_tokens_per_s"] for own in ours]),
                "mbu": spread([own["decode_gb_per_s"] / read["gb_per_s"] for read, own in pairs]),
                "step_us": spread([1e6 * value for value in one]),
                "width_cost": {
                    str(width): spread(
                        [own["width_step_s"][str(width)] / base for own, base in zip(ours, one, strict=True)]
                    )
                    for width in args.widths
                },
                "phase_us": {
                    name: float(np.median([own["phase_us"][name] for own in ours])) for name in ours[0]["phase_us"]
                },
                "peak_bytes": max(own["peak_bytes"] for own in ours),
                "stored_bytes": ours[0]["stored_bytes"],
                "transformers": {},
            }
            for mode in args.peer_modes:
                found = [r[f"transformers/{at}/{mode}"] for r in rounds if f"transformers/{at}/{mode}" in r]
                good = [one for one in found if "error" not in one]
                if good:
                    row["transformers"][mode] = {
                        name: spread([one[name] for one in good])
                        for name in ("prefill_tokens_per_s", "decode_tokens_per_s")
                    }
                elif found:
                    row["transformers"][mode] = {"error": found[0]["error"]}
            rows.append(row)
    return rows


def _shown(value: dict[str, float], digits: int = 0) -> str:
    return f"{value['median']:,.{digits}f} [{value['least']:,.{digits}f}, {value['most']:,.{digits}f}]"


def print_table(rows: Sequence[dict[str, Any]], peers_line: str | None) -> None:
    """For people: medians, and the least and the most in brackets."""
    lines = [("", "threads", "prefill tok/s", "decode tok/s", "MBU", "read GB/s", "MB/token", "peak - stored")]
    for row in rows:
        lines.append(
            (
                row["model"],
                str(row["threads"]),
                _shown(row["prefill_tokens_per_s"]),
                _shown(row["decode_tokens_per_s"], 1),
                _shown(row["mbu"], 2),
                _shown(row["read_gb_per_s"], 1),
                f"{row['bytes_per_token'] / 1e6:,.1f}",
                format_bytes(row["peak_bytes"] - row["stored_bytes"]) if row["peak_bytes"] else "-",
            )
        )
        for mode, found in row["transformers"].items():
            numbers = (
                (found["error"][:60], "")
                if "error" in found
                else (_shown(found["prefill_tokens_per_s"]), _shown(found["decode_tokens_per_s"], 1))
            )
            lines.append((f"  transformers {mode}", str(row["threads"]), *numbers, "", "", "", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()
    for row in rows:
        cost = ", ".join(f"{width} rows {_shown(found, 2)}" for width, found in row["width_cost"].items())
        print(
            f"{row['model']}, {row['threads']} threads: "
            f"a step of one row {_shown(row['step_us'], 1)} us; relative: {cost}"
        )
        print("  us by phase: " + ", ".join(f"{name} {value:.1f}" for name, value in row["phase_us"].items()))
    if peers_line:
        print(peers_line)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m xlpk.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(["tiny", *SHAPES]))
    parser.add_argument(
        "--threads", type=_numbers, default=None, help="such as 1,2; default: 1, and 2 where there are two cores"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that every child is started")
    parser.add_argument("--repeats", type=int, default=3, help="measurements in a child")
    parser.add_argument("--decode", type=int, default=48, help="tokens decoded")
    parser.add_argument("--widths", type=_numbers, default=list(WIDTHS), help="rows of a step; the first is the base")
    parser.add_argument("--peer-modes", default=",".join(PEER_MODES), help="of " + ", ".join(PEER_MODES))
    parser.add_argument("--no-peers", action="store_true", help="without transformers")
    parser.add_argument("--buffer-mib", type=int, default=2048, help="MiB read to measure bandwidth")
    parser.add_argument("--quick", action="store_true", help="the tiny model, one round: does it work at all")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the JSON goes to OUTPUTS/bench")
    parser.add_argument("--cache", type=Path, default=None, help="builds; default: OUTPUTS/cache")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.cache = args.cache or args.outputs / "cache"
    args.models, args.peer_modes = args.models.split(","), args.peer_modes.split(",")
    args.threads = args.threads or ([1, 2] if usable_cores() > 1 else [1])
    if args.quick:
        args.models, args.rounds, args.repeats, args.decode, args.buffer_mib = ["tiny"], 1, 1, 16, 64
    for model in args.models:
        if model != "tiny" and model not in SHAPES:
            raise InputError("--models", model, f"of tiny, {', '.join(SHAPES)}")
    for mode in args.peer_modes:
        if mode not in PEER_MODES:
            raise InputError("--peer-modes", mode, f"of {', '.join(PEER_MODES)}")
    for option in ("rounds", "repeats", "buffer_mib"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option.replace('_', '-')}", getattr(args, option), "at least 1")
    if args.decode < 2:
        raise InputError("--decode", args.decode, "at least 2")
    if min(args.widths) < 1 or min(args.threads) < 1:
        raise InputError("--widths, --threads", f"{args.widths}, {args.threads}", "numbers of at least 1")
    return args


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds -> the report, which is printed and written too."""
    build_cpu_library(args.cache)  # here, so that no child's time has a compiler beside it
    build_shared(kernels_folder() / "bandwidth.cpp", args.cache)
    peers, peers_line = not args.no_peers, None
    if peers and not (find_spec("torch") and find_spec("transformers")):
        peers, peers_line = False, "transformers: skipped, torch and transformers are not installed (the extra `peers`)"
    rounds: list[dict[str, dict[str, Any]]] = []
    jobs = jobs_of(args, peers)
    for number in range(args.rounds):
        found = {}
        for index, job in enumerate(jobs):
            print(f"round {number + 1}/{args.rounds}, {index + 1}/{len(jobs)}: {key_of(job)}", file=sys.stderr)
            found[key_of(job)] = run_child(job, args.cache)
        rounds.append(found)
    rows = summarise(rounds, args)
    print_table(rows, peers_line)
    report = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "cores": usable_cores(),
        "rounds": args.rounds,
        "repeats": args.repeats,
        "prompt_tokens": PROMPT,
        "decode_tokens": args.decode,
        "rows": rows,
    }
    folder = args.outputs / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(report)
    (folder / f"{datetime.now():%Y-%m-%d-%H%M%S}.json").write_text(line + "\n")
    print(line)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.child:
            print(json.dumps(measure(json.loads(args.child), args.cache)))
        else:
            bench(args)
    except (InputError, ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
