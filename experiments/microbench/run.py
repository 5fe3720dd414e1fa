"""Runs the micro-benchmarks on the GPU: a table, one JSON and one Markdown file.

    python experiments/microbench/run.py --out FOLDER [--seconds N] [--resume]

Needs PyCUDA (docs/cuda.md) and nvcc or a cached cubin. `microbench.json` is written after every case, so what was
measured survives whatever happens to a later one; `--resume` measures only what it lacks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import HERE, Bench, build, source_hash
from cases import BARRIER, READ, STREAM_BYTES, Case, Machine, MiB, all_cases, ring_floor_ns
from tables import headline, markdown

from xlpk.backends import driver, gpu_device
from xlpk.backends.gpu_device import Device
from xlpk.errors import BackendError, HangError, InputError, ToolError
from xlpk.units import parse_bytes

ROOT = HERE.parents[1]
SCHEMA = 1


def clocks(uuid: str) -> dict[str, float] | None:
    """SM and memory clock (MHz), power (W), temperature (C) by nvidia-smi; None where it does not answer."""
    fields = {
        "sm_mhz": "clocks.sm",
        "memory_mhz": "clocks.mem",
        "power_w": "power.draw",
        "temperature_c": "temperature.gpu",
    }
    query = f"--query-gpu={','.join(fields.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return dict(zip(fields, map(float, answer.strip().split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def commit() -> dict[str, Any] | None:
    """Hash of the checkout and whether files differ from it; None outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"hash": head.stdout.strip(), "modified": bool(changes.stdout.strip())}


def write(path: Path, text: str) -> None:
    """Atomically."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def save(out: Path, results: Mapping[str, Any]) -> None:
    write(out / "microbench.json", json.dumps(results, indent=1) + "\n")
    write(out / "microbench.md", markdown(results))


def earlier_cases(out: Path, device_uuid: str, kernels: str, stream_bytes: int) -> dict[str, Any]:
    """What the folder has: all that was measured, and what cost the device, so that it is not tried again.

    InputError if it is of another device, other kernels or another stream.
    """
    path = out / "microbench.json"
    if not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_text())
        facts = (earlier["schema"], earlier["device"]["uuid"], earlier["kernels"], earlier["stream_bytes"])
        known = {case.name for case in all_cases()}
        cases: dict[str, Any] = {
            name: record
            for name, record in earlier["cases"].items()
            if name in known and ("error" not in record or record["fatal"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError("--resume", path, "a microbench.json that this program wrote") from None
    if facts != (SCHEMA, device_uuid, kernels, stream_bytes):
        raise InputError("--resume", path, "results of the same device, kernels and --bytes; or another --out")
    return cases


def run(out: Path, seconds: float, resume: bool, stream_bytes: int | None) -> dict[str, Any]:
    """Measures what there is time for; results are in `out` after each case."""
    give_up_s = time.monotonic() + seconds
    device = Device()
    lost, kept = False, list[Bench]()
    try:
        return run_on(device, out, give_up_s, resume, stream_bytes, kept)
    except BackendError as error:
        lost = isinstance(error, HangError) or device.sick() is not None
        raise
    finally:
        device.close(lost=lost, keep=kept)


def run_on(
    device: Device, out: Path, give_up_s: float, resume: bool, stream_bytes: int | None, kept: list[Bench]
) -> dict[str, Any]:
    """`run` on an open device; `give_up_s`: when to begin no further case, on the monotonic clock.

    What must not be freed while a kernel hangs is put into `kept`.
    """
    standin = "stand-in" in device.name
    if standin and ROOT / "experiments" in [out, *out.parents]:
        raise InputError("--out", out, f"a folder outside {ROOT / 'experiments'}: {device.name} measures nothing")
    wanted = stream_bytes or (8 * MiB if standin else STREAM_BYTES)
    least = max(case.blocks * case.tile_bytes for case in all_cases()) * device.multiprocessors
    if wanted < least:
        raise InputError("--bytes", wanted, f"at least {least}: a tile for each team of the largest case")
    uuid, kernels = driver.device_uuid(0), source_hash()
    cases = earlier_cases(out, uuid, kernels, wanted) if resume else {}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--out", out, f"a folder to write to ({error.strerror})") from None
    built = build(device.arch)
    bench = Bench(device, built, wanted, standin=standin)
    kept.append(bench)
    bench.fill()
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "device": {
            "name": device.name,
            "uuid": uuid,
            "compute_capability": list(device.compute_capability),
            "multiprocessors": device.multiprocessors,
            "memory_bytes": device.memory_bytes,
            "driver": list(driver.driver_version()),
        },
        "compiler": built.compiler,
        "commit": commit(),
        "kernels": kernels,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stream_bytes": wanted,
        "timer_step_ns": bench.timer_step_ns(),
        "clocks_before": clocks(uuid),
        "clocks_after": None,
        "cases": cases,
        "not_run": [],
    }
    try:
        for case in all_cases():
            if case.name not in cases:
                if time.monotonic() > give_up_s:
                    results["not_run"].append(case.name)
                    continue
                measure_into(cases, bench, case)
                save(out, results)
            bench.machine = learn(bench.machine, cases)
        results["clocks_after"] = clocks(uuid)
    finally:
        add_floors(bench.machine, cases)
        save(out, results)
    return results


def measure_into(cases: dict[str, Any], bench: Bench, case: Case) -> None:
    """Adds the case's record, or one that says why there is none. Raises BackendError if the device can do no more."""
    try:
        cases[case.name] = bench.measure(case)
    except BackendError as error:
        fatal = isinstance(error, HangError) or bench.device.sick() is not None
        failed = {"section": case.section, "parameters": case.parameters, "error": str(error), "fatal": fatal}
        cases[case.name] = failed
        if fatal:
            raise


def learn(machine: Machine, cases: Mapping[str, Any]) -> Machine:
    """The machine with the best bandwidth of the stream and the SM clock, as far as they are measured."""
    by_name = {case.name: case for case in all_cases()}
    rates = [
        record["gb_per_s"]
        for name, record in cases.items()
        if record["section"] == "read" and "error" not in record and by_name[name].hot_of_16 == 0
    ]
    clock = cases.get(READ.name, {}).get("cycles_per_ns", machine.cycles_per_ns)
    return replace(machine, cycles_per_ns=clock, read_bytes_per_ns=max(rates, default=None))


def add_floors(machine: Machine, cases: dict[str, Any]) -> None:
    """`floor_us` of the ring's cases: an ideal ring at the bandwidth and with the barrier that were measured."""
    barrier_ns = cases.get(BARRIER.name, {}).get("p50_ns")
    if machine.read_bytes_per_ns is None or barrier_ns is None:
        return
    for case in all_cases():
        if case.kernel == "ring" and "error" not in cases.get(case.name, {"error": ""}):
            tile_ns = case.tile_ns(machine)
            floor_ns = ring_floor_ns(
                case.tiles(machine),
                case.rounds,
                case.slots,
                tile_ns=tile_ns,
                held_ns=case.consumer_share * tile_ns,
                barrier_ns=barrier_ns,
            )
            cases[case.name]["floor_us"] = floor_ns / 1e3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", required=True, type=Path, help="folder of microbench.json and microbench.md")
    parser.add_argument("--seconds", type=float, default=90.0, help="no case is begun later than that (default 90)")
    parser.add_argument("--resume", action="store_true", help="measure only what the folder lacks")
    parser.add_argument("--bytes", help="of the stream, e.g. 1GiB (default: the 2.471 GB of llama_1b_shape)")
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.seconds > 0:
            raise InputError("--seconds", chosen.seconds, "a number above 0")
        stream_bytes = parse_bytes(chosen.bytes, "--bytes") if chosen.bytes else None
        results = run(chosen.out.resolve(), chosen.seconds, chosen.resume, stream_bytes)
    except (InputError, ToolError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(markdown(results))
    print(json.dumps(headline(results)))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if gpu_device.lost():
        os._exit(code)  # what a lost device holds cannot be freed
    sys.exit(code)
