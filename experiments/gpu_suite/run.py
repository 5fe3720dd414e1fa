"""Everything that wants a real GPU, in one command that can be interrupted and resumed.

    python experiments/gpu_suite/run.py [--out FOLDER] [--from FOLDER] [--only NAME,...] [--again] [--seconds N]

Each job is a process with a deadline, and all end within `--seconds`; what one found is in `suite.json` as soon as it
ends. Jobs that are in it are not run again, but those that `--seconds` cut off are. Without `--out` results go to
`experiments/results/<device>/`, from which they are committed; the stand-in driver may not write under `experiments`.
`suite.md` is the same for people.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCHEMA = 1
ORCHESTRATIONS = "persistent,graph,launched,launched_phase"
TRANSFORMERS = "hf,hf_static,hf_compiled"
# tests/backends/test_*.py. Not `counters`, which compares with the stand-in's own.
SUITE = ("contract", "gpu_resident", "equality", "sampling", "gpu_sweep", "gpu_upload", "cancel", "modes")
LEAST_S = 15.0  # with less time left no job is begun
LOST = 4  # exit code of a process that lost the device
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
FILES = ("suite.json", "microbench.json")  # what another run goes on from


@dataclass(frozen=True)
class Job:
    """One process. `read`: what its output and its folder come to. `resume`: the argument with which it goes on where
    an earlier one of this device was cut off or lost it. `skip`: asked when its turn has come, why it cannot run."""

    name: str
    command: list[str]
    deadline_s: float
    read: Callable[[subprocess.CompletedProcess[str], Path], Any]
    resume: str = ""
    skip: Callable[[], str] = lambda: ""


def lines(done: subprocess.CompletedProcess[str], folder: Path) -> list[str]:
    return done.stdout.splitlines()[-40:]


def as_json(done: subprocess.CompletedProcess[str], folder: Path) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


def swept(done: subprocess.CompletedProcess[str], folder: Path) -> list[dict[str, Any]]:
    """The points of the only sweep in the job's folder: overrides, status, metrics, raw gaps between tokens."""
    points = []
    for point in sorted(folder.glob("outputs/sweeps/*/*/*/status.json")):
        status = json.loads(point.read_text())
        metrics, log = point.with_name("metrics.json"), point.with_name("events.jsonl")
        gaps: list[int] = []
        if log.exists():
            steps = [json.loads(line) for line in log.read_text().splitlines() if '"event":"step"' in line]
            ends = [step["end_ns"] for step in steps if not step.get("warmup") and step["n_decode"]]
            gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
        sizes = {} if "model=llama_1b_shape" not in status.get("overrides", []) else {"bytes_per_token": shape_bytes()}
        points.append(
            {
                **sizes,
                "overrides": status.get("overrides", []),
                "status": status["status"],
                "error": status.get("error"),
                "metrics": json.loads(metrics.read_text()) if metrics.exists() else {},
                "build": _build(point.with_name("build.json")),
                "step_gap_ns": gaps,
            }
        )
    return points


def shape_bytes() -> int:
    """Weight bytes that a decode step of llama_1b_shape must read."""
    from xlpk.model import SHAPES

    return SHAPES["llama_1b_shape"].bytes_per_token("bf16")


def _build(file: Path) -> dict[str, str]:
    """How the backend was built: device, versions."""
    found: dict[str, str] = json.loads(file.read_text()).get("backend", {}) if file.exists() else {}
    return found


def no_transformers() -> str:
    """Why transformers cannot run on the GPU; empty: it can. Asked in another process: torch would take the device."""
    question = "import torch, transformers; print(torch.cuda.is_available())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", question], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return "torch could not be imported in 120 s"
    if done.returncode:
        return f"torch and transformers: {(done.stderr.splitlines() or ['?'])[-1]}"
    return "" if done.stdout.split()[-1:] == ["True"] else "this torch sees no GPU"


def jobs(out: Path) -> list[Job]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tax = [python, "-m", "xlpk.run", "-m", "experiment=launch_tax", "tracking=none", f"backend={ORCHESTRATIONS}"]
    big = ["model=llama_1b_shape", "model.max_len=1024", "workload=synthetic", "workload.requests=1"]
    shape = ["workload.prompt_len=128", "workload.output_len=128"]
    peer = [python, "-m", "xlpk.run", "-m", "mode=serial_decode", "tracking=none", f"backend={TRANSFORMERS}"]
    agreement = [
        python,
        str(HERE / "agreement.py"),
        "--outputs",
        str(ROOT / "outputs" / "gpu_suite" / "agreement-runs"),
    ]
    microbench = [python, str(ROOT / "experiments" / "microbench" / "run.py"), "--out", str(out)]
    found = [
        Job("doctor", [python, "-m", "xlpk.cli", "doctor", "--json"], 120, as_json),
        Job("microbench", microbench, 300, lines, resume="--resume"),
        Job("speed", [python, str(HERE / "speed.py")], 200, as_json),
        Job("llama_1b_shape", [*tax, *big, *shape], 300, swept),
        Job("llama_1b_shape transformers", [*peer, *big, *shape], 400, swept, skip=no_transformers),
        Job("numerics", [*pytest, "-m", "heavy", str(ROOT / "tests" / "gpu")], 200, lines),
        Job("agreement", agreement, 300, as_json),
        Job("hazards", [python, str(HERE / "hazards.py")], 180, as_json),
        Job("launch_tax", tax, 200, swept),
    ]
    for name in SUITE:
        file = ROOT / "tests" / "backends" / f"test_{name}.py"
        found.append(Job(f"contract {name}", [*pytest, "-m", "heavy", str(file)], 400, lines))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        small = ["backend=launched", "tracking=none", "sampling.max_new_tokens=4", "workload.requests=1"]
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "xlpk.run", *small]
            found.append(Job(f"sanitizer {tool}", command, 300, lines))
    return [job for job in found if Path(job.command[1]).suffix != ".py" or Path(job.command[1]).exists()]


def run(job: Job, folder: Path, left_s: float, resume: bool) -> dict[str, Any]:
    """The job's record: exit code, seconds, result or the end of what it said; `cut`: it had too little time.

    `left_s`: for this job, its own deadline aside. `resume`: go on where an earlier one ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    where = folder if job.command[1:2] == ["-m"] and "pytest" not in job.command else ROOT
    cache = folder / "outputs" / "cache"
    if not cache.exists():
        (ROOT / "outputs" / "cache").mkdir(parents=True, exist_ok=True)
        cache.parent.mkdir(exist_ok=True)
        cache.symlink_to(ROOT / "outputs" / "cache")
    deadline_s = min(job.deadline_s, left_s)
    command = [*job.command, job.resume] if resume and job.resume else job.command
    while True:
        done = run_process(command, where, deadline_s - (time.monotonic() - begin))
        again = done.returncode == LOST and job.resume
        if not again or deadline_s - (time.monotonic() - begin) < LEAST_S:
            break
        command = [*job.command, job.resume]  # what cost the device is not tried again
    record: dict[str, Any] = {"exit_code": done.returncode, "seconds": round(time.monotonic() - begin, 1)}
    if done.returncode == -signal.SIGKILL and deadline_s < job.deadline_s:
        record["cut"] = True
    try:
        record["result"] = job.read(done, folder)
    except (ValueError, LookupError, OSError) as error:
        record["unreadable"] = f"{type(error).__name__}: {error}"
    if done.returncode:
        record["said"] = [*done.stdout.splitlines()[-15:], *done.stderr.splitlines()[-25:]]
    return record


def run_process(command: list[str], where: Path, deadline_s: float) -> subprocess.CompletedProcess[str]:
    """The command to its end; after `deadline_s` it is killed, with its children."""
    process = subprocess.Popen(
        command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        err += f"\nkilled after {deadline_s:.0f} s"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, by the kernel's own word or else by the management library's."""
    try:
        first = KERNEL_MODULE.read_text().partition("\n")[0]
    except OSError:
        first = ""
    if found := re.search(r"(?<= )\d+\.\d+(\.\d+)?(?= )", first):
        return found[0]
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # of an optional package, or of a machine without the library
        return None
    return str(version)


def machine() -> dict[str, Any]:
    """Which device, driver and commit."""
    from xlpk.backends import driver
    from xlpk.backends.gpu_device import import_driver

    cuda = import_driver()
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "schema": SCHEMA,
        "device": cuda.Device(0).name(),
        "uuid": driver.device_uuid(0),
        "driver": nvidia_driver(),
        "driver_cuda": list(driver.driver_version()),
        "commit": git.stdout.strip() or None,
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


COLUMNS = {
    "device ITL p50, ms": "device_latency/itl_ms.p50",
    "TTFT p50, ms": "latency/ttft_ms.p50",
    "launches": "host/launches",
    "syncs": "host/syncs",
    "copies in": "host/h2d_copies",
    "copies out": "host/d2h_copies",
}


def sweep_rows(points: list[dict[str, Any]], read_gb_per_s: float | None) -> list[str]:
    """A row a backend. Of a model whose bytes are known: its weights' bytes a gap between tokens, and their share of
    what the micro-benchmark reads (MBU)."""
    sized = any("bytes_per_token" in point for point in points)
    titles = [*COLUMNS, *(["weights, GB/s", "MBU"] if sized else [])]
    out = [f"| backend | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for point in points:
        backend = next((o for o in point["overrides"] if o.startswith("backend=")), "?").removeprefix("backend=")
        if not point["metrics"]:
            out.append(f"| {backend} | {point['error']} |")
            continue
        shown = [_cell(point["metrics"].get(key)) for key in COLUMNS.values()]
        gap_ms = point["metrics"].get("device_latency/itl_ms.p50")
        if sized:
            rate = point["bytes_per_token"] / gap_ms / 1e6 if gap_ms and "bytes_per_token" in point else None
            share = rate / read_gb_per_s if rate and read_gb_per_s else None
            shown += [_cell(rate), "-" if share is None else f"{share:.1%}"]
        out.append(f"| {backend} | {' | '.join(shown)} |")
    return out


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def agreement_rows(found: dict[str, Any]) -> list[str]:
    """The table of agreement.py, and what it left out."""
    keys = {
        "KL mean, nats": "kl_nats.mean", "KL most": "kl_nats.max", "NLL / float32's": "nll_ratio",
        "same top-1": "top1_agreement", "tokens": "tokens", "decided": "decided", "the oracle's": "argmax",
        "outside the bound": "outside", "like cpu": "like_cpu",
    }  # fmt: skip
    out = [f"| backend | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, one in found["backends"].items():
        shown = [f"{one[key]:.7g}" if one.get(key) is not None else "-" for key in keys.values()]
        out.append(
            f"| {name} | {' | '.join(shown)} |" if one["status"] == "FINISHED" else f"| {name} | {one['error']} |"
        )
    return out + [f"- not run: {name}: {why}" for name, why in found["skipped"].items()]


def read_bandwidth(suite: dict[str, Any]) -> float | None:
    """GB/s that the micro-benchmarks read with nothing else to do: of the line that they end with."""
    said = suite["jobs"].get("microbench", {}).get("result") or [""]
    try:
        value = json.loads(said[-1])["read_gb_per_s"]
    except (ValueError, LookupError, TypeError):
        return None
    return float(value) if value else None


def link_bandwidth(suite: dict[str, Any]) -> float | None:
    """GB/s from page-locked host memory to the device: of the doctor's line."""
    for finding in suite["jobs"].get("doctor", {}).get("result") or []:
        if finding["name"] == "device 0: link" and (rate := re.match(r"[\d.]+", finding["value"])):
            return float(rate[0])
    return None


def speed_rows(speed: dict[str, Any], link_gb_per_s: float | None) -> list[str]:
    """The table of speed.py; uploads beside the link's copy rate."""
    columns = {
        "weights in": "weight_layout", "planner": "planner",
        "device ITL p50, us": "itl_us.p50", "p99, us": "itl_us.p99", "weights, GB/s": "weights_gb_per_s",
        "upload, GB/s": "upload_gb_per_s",
    }  # fmt: skip
    titles = ["flight recorder", *columns, "of the link's rate"]
    out = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for one in speed["runs"]:
        rate = one["upload_gb_per_s"]
        share = f"{rate / link_gb_per_s:.0%}" if rate and link_gb_per_s else "-"
        cells = ("on" if one["flight"] else "off", *(one[key] for key in columns.values()), share)
        out.append(f"| {' | '.join(map(str, cells))} |")
    return out


def markdown(suite: dict[str, Any]) -> str:
    """The suite for people: states of the jobs, the doctor's lines, the tables of the sweeps."""
    about = suite["machine"]
    driver = f"driver {about['driver'] or 'unknown'} (CUDA {'.'.join(map(str, about['driver_cuda']))})"
    out = [f"# {about['device']}", "", f"Commit `{about['commit']}`, {driver}, {about['date']}.", ""]
    out += ["| job | exit code | seconds |", "|---|---|---|"]
    for name, job in suite["jobs"].items():
        code = f"not run: {job['skipped']}" if job.get("skipped") else job["exit_code"]
        out.append(f"| {name} | {code} | {job['seconds']} |")
    for finding in suite["jobs"].get("doctor", {}).get("result", []):
        out.append(f"- {finding['state']}: {finding['name']}: {finding['value']}")
    speed = suite["jobs"].get("speed", {}).get("result", {})
    if speed.get("runs"):
        out += ["", f"## speed: {speed['model']}, {speed['prompt_len']} + {speed['output_len']} tokens, batch 1", ""]
        out += speed_rows(speed, link_bandwidth(suite))
    for name in ("launch_tax", "llama_1b_shape", "llama_1b_shape transformers"):
        points = suite["jobs"].get(name, {}).get("result")
        if points:
            out += ["", f"## {name}", "", *sweep_rows(points, read_bandwidth(suite))]
    agreement = suite["jobs"].get("agreement", {}).get("result")
    if agreement:
        out += ["", "## The tiny model beside the oracle, float32 and the CPU", "", *agreement_rows(agreement)]
    hazards = suite["jobs"].get("hazards", {}).get("result", {})
    if hazards:
        shown = {
            name: "not in time" if value is None else value for name, value in hazards.items() if name != "samples"
        }
        out += ["", "## hazards", "", *(f"- {name}: {value}" for name, value in shown.items())]
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (experiments/results/<device>)")
    parser.add_argument("--from", dest="earlier", type=Path, help="folder of earlier results to go on from")
    parser.add_argument("--only", help="names of jobs, with commas between them")
    parser.add_argument("--again", action="store_true", help="run jobs that suite.json has already")
    parser.add_argument("--seconds", type=float, default=570.0, help="all jobs have ended after this long (570)")
    args = parser.parse_args()
    begin = time.monotonic()
    about = machine()
    device = re.sub(r"[^A-Za-z0-9]+", "-", about["device"]).strip("-").lower()
    experiments = ROOT / "experiments"
    out = (args.out or experiments / "results" / device).resolve()
    if "stand-in" in about["device"] and out.is_relative_to(experiments):
        print(f"the stand-in driver may not write results under {experiments}: give --out FOLDER", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES if args.earlier else ():
        if (args.earlier / name).exists() and not (out / name).exists():
            shutil.copyfile(args.earlier / name, out / name)
    file = out / "suite.json"
    suite = json.loads(file.read_text()) if file.exists() else {"machine": about, "jobs": {}}
    wanted = args.only.split(",") if args.only else None
    for job in jobs(out):
        record = suite["jobs"].get(job.name, {})
        done_before = record and not (record.get("cut") or record.get("skipped"))
        if (wanted and job.name not in wanted) or (done_before and not args.again):
            continue
        left_s = args.seconds - (time.monotonic() - begin)
        if left_s < LEAST_S:
            print(f"{job.name}: no time left; the same command goes on from here", flush=True)
            continue
        scratch = ROOT / "outputs" / "gpu_suite" / job.name.replace(" ", "-")
        shutil.rmtree(scratch, ignore_errors=True)
        resume = record.get("uuid") == about["uuid"] and not args.again
        why = job.skip()
        found = {"exit_code": None, "seconds": 0.0, "skipped": why} if why else run(job, scratch, left_s, resume)
        suite["jobs"][job.name] = {**found, "uuid": about["uuid"]}
        file.write_text(json.dumps(suite, indent=1) + "\n")
        (out / "suite.md").write_text(markdown(suite))
        ended = f"not run: {why}" if why else f"exit code {found['exit_code']}, {found['seconds']} s"
        print(f"{job.name}: {ended}", flush=True)
    print(f"{out / 'suite.md'}")
    return int(any(job["exit_code"] for job in suite["jobs"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
