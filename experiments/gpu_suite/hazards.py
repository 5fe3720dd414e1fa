"""What really happens on a device in the hazards of residency; one JSON object.

Stop latency, the way of a word to the loop and back, submission to the first action of the scheduler, with all samples;
SIGSTOP and kill -9 of the host; beside the resident loop, a module that is loaded lazily, and device memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xlpk import layout
from xlpk.backend import Admitted
from xlpk.backends import driver, gpu_device
from xlpk.backends.persistent import PersistentBackend
from xlpk.errors import BackendError, InputError, ToolError
from xlpk.isolate import leave_if_lost
from xlpk.kv import KV, KVPlan
from xlpk.model import load_model
from xlpk.workload import Request

CACHE = Path(__file__).resolve().parents[2] / "outputs" / "cache"
BESIDE_S = 15.0  # for a child that does what may wait for the loop, its own start among it


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


def stop_latencies_ms() -> list[float]:
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
    return out


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


def round_trips() -> tuple[list[float], list[float], float]:
    """Microseconds: a word to the loop and back; submission to admission; the error of the latter's clock."""
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
    return pings, waits, error_ns / 1e3


def serve_for_ever() -> None:
    backend = open_backend(heartbeat_s=0.5, watch=False)
    print("ready", flush=True)
    number = 0
    while True:
        run_to_end(backend, Request(number, (1, 2, 3), 50, ignore_eos=True))
        number += 1


@contextlib.contextmanager
def resident() -> Iterator[PersistentBackend]:
    """A loop that leaves at the end, when it is told to. So does the process then: what frees could wait for it."""
    backend = open_backend(lease_s=0.0, idle_s=0.0, watch=False)
    code = 1
    try:
        yield backend
        if backend.library.dll.xl_left(backend._params):
            raise BackendError("the loop had left before")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        backend.library.dll.xl_stop(backend._params)
        backend.device.wait(5.0)
        os._exit(code)


def timed(step: str, call: Callable[[], Any]) -> Any:
    """Prints how long it took once it has returned."""
    begin = time.perf_counter()
    result = call()
    print(json.dumps([step, time.perf_counter() - begin]), flush=True)
    return result


def load_a_module() -> None:
    """Loaded, its kernel asked for and launched on another stream: where the driver may bring it to the device."""
    gpu_device.import_driver()
    if driver.loads_eagerly():
        raise BackendError("CUDA_MODULE_LOADING=LAZY was not heard: modules are loaded eagerly")
    with resident() as backend:
        module = timed("load", lambda: backend.device.cuda.module_from_buffer(backend._module.cubin))
        retile = timed("get the function", lambda: module.get_function("xl_retile"))
        nothing = struct.pack("=QQqiii", 0, 0, 0, 0, 1, 1)  # no unit to move
        block = layout.GPU_THREADS, 1, 1
        timed("launch", lambda: retile._launch_kernel((1, 1), block, nothing, 0, backend.device.copies))


def allocate_and_free() -> None:
    """Without the guard that refuses it."""
    with resident() as backend:
        backend._guard.close()
        memory = timed("allocate", lambda: backend.device.cuda.mem_alloc(64 << 20))
        timed("free", memory.free)


def beside_the_loop(flag: str, what: str, *steps: str, **settings: str) -> dict[str, Any]:
    """Seconds until each step of a child returned; None: it had not when the child was killed, or failed."""
    process = subprocess.Popen(
        [sys.executable, __file__, flag],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )
    try:
        out, err = process.communicate(timeout=BESIDE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    returned = dict(map(json.loads, out.splitlines()))
    found: dict[str, Any] = {f"{what}: {step}, s": returned.get(step) for step in steps}
    if process.returncode not in (0, -signal.SIGKILL):
        found[f"{what}: error"] = (err.splitlines() or [f"exit code {process.returncode}"])[-1]
    return found


def child() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__, SERVE], stdout=subprocess.PIPE, text=True)
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
    stops_ms = stop_latencies_ms()
    pings_us, waits_us, error_us = round_trips()
    samples = {
        "stop_latency_ms": stops_ms,
        "mapped_round_trip_us": pings_us,
        "submission_to_admission_us": waits_us,
    }
    found: dict[str, Any] = {f"{name}.p50": p50(values) for name, values in samples.items()}
    found["clock_error_us"] = round(error_us, 3)
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
    steps = "load", "get the function", "launch"
    found |= beside_the_loop(LOAD, "a lazily loaded module beside the loop", *steps, CUDA_MODULE_LOADING="LAZY")
    found |= beside_the_loop(ALLOCATE, "device memory beside the loop", "allocate", "free")
    found["another session after them, s"] = can_open_within_s(20)
    print(json.dumps({**found, "samples": samples}))


SERVE, LOAD, ALLOCATE = "--serve-for-ever", "--load-a-module", "--allocate-and-free"
CHILDREN = {SERVE: serve_for_ever, LOAD: load_a_module, ALLOCATE: allocate_and_free}


if __name__ == "__main__":
    code = 1
    try:
        CHILDREN.get(sys.argv[-1], main)()
        code = 0
    except (BackendError, InputError, ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    leave_if_lost(code)
    sys.exit(code)
