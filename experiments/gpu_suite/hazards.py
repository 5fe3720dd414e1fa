"""What really happens on a device in the situations that METRICS calls hazards of residency; one JSON object.

Stop latency, the way of a word to the loop and back, submission to the first action of the scheduler, SIGSTOP and
kill -9 of the host.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from xlpk.backend import Admitted
from xlpk.backends.persistent import PersistentBackend
from xlpk.errors import BackendError, InputError, ToolError
from xlpk.isolate import leave_if_lost
from xlpk.kv import KV, KVPlan
from xlpk.model import load_model
from xlpk.workload import Request

CACHE = Path(__file__).resolve().parents[2] / "outputs" / "cache"
CHILD = "--serve-for-ever"


def open_backend(**options: Any) -> PersistentBackend:
    model = load_model("tiny")
    backend = PersistentBackend(cache=CACHE, **options)
    backend.open(model, KVPlan.make(KV(budget="256pages"), model.config, model.weights.dtype, 512))
    return backend


def run_to_end(backend: PersistentBackend, request: Request) -> list[Any]:
    assert backend.submit(request)
    seen: list[Any] = []
    while not any(type(event).__name__ == "Finished" for event in seen):
        seen += backend.poll()
    return seen


def p50(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def stop_latency_ms() -> float:
    """From the stop word to an empty stream, in the middle of work."""
    out = []
    for _ in range(5):
        backend = open_backend(lease_s=0.0)
        backend.submit(Request(0, (1, 2, 3), 400, ignore_eos=True))
        while not backend.poll():
            pass
        begin = time.perf_counter()
        backend.library.dll.xl_stop(backend._params)
        backend.device.wait(5.0)
        out.append((time.perf_counter() - begin) * 1e3)
        backend.close()
    return p50(out)


def clock_offset_ns(backend: PersistentBackend) -> tuple[int, float]:
    """Device clock - host clock, by the middle of the narrowest of 200 brackets, and half its width: the error."""
    brackets = []
    for _ in range(200):
        before_ns = time.monotonic_ns()
        device_ns = backend.clock_ns()
        after_ns = time.monotonic_ns()
        brackets.append((after_ns - before_ns, device_ns - (before_ns + after_ns) // 2))
    width_ns, offset_ns = min(brackets)
    return offset_ns, width_ns / 2


def round_trips() -> dict[str, float]:
    backend = open_backend(idle_s=0.0)
    pings, waits = [], []
    for _ in range(2000):
        begin = time.perf_counter_ns()
        backend.clock_ns()
        pings.append((time.perf_counter_ns() - begin) / 1e3)
    offset_ns, error_ns = clock_offset_ns(backend)
    for number in range(200):
        sent = time.monotonic_ns()
        events = run_to_end(backend, Request(number, (1, 2, 3), 1, ignore_eos=True))
        (admitted,) = (event for event in events if isinstance(event, Admitted))
        waits.append((admitted.device_ns - offset_ns - sent) / 1e3)
    backend.close()
    return {
        "mapped_round_trip_us.p50": p50(pings),
        "submission_to_admission_us.p50": p50(waits),
        "clock_error_us": round(error_ns / 1e3, 3),
    }


def serve_for_ever() -> None:
    backend = open_backend(heartbeat_s=0.5, watch=False)
    print("ready", flush=True)
    number = 0
    while True:
        run_to_end(backend, Request(number, (1, 2, 3), 50, ignore_eos=True))
        number += 1


def child() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__, CHILD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def can_open_within_s(within_s: float) -> float | None:
    """Seconds until another session ran on the device; None: it did not."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < within_s:
        backend = open_backend()
        run_to_end(backend, Request(0, (1, 2, 3), 5, ignore_eos=True))
        backend.close()
        return round(time.perf_counter() - begin, 2)
    return None


def main() -> None:
    found: dict[str, Any] = {"stop_latency_ms.p50": stop_latency_ms(), **round_trips()}
    process = child()
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGSTOP)
    found["another session beside a stopped host, s"] = can_open_within_s(20)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(1.0)
    found["the stopped host goes on"] = process.poll() is None
    process.kill()
    process.wait()
    found["another session after kill -9, s"] = can_open_within_s(20)
    print(json.dumps(found))


if __name__ == "__main__":
    code = 1
    try:
        serve_for_ever() if CHILD in sys.argv else main()
        code = 0
    except (BackendError, InputError, ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    leave_if_lost(code)
    sys.exit(code)
