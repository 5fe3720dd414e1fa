"""`xlpk doctor`: what this machine can run, measured where it can be, and for what does not work, what to do.

Checks go on after a failure as far as they make sense. Exit code 0: everything that is installed works (a machine
without a GPU is well); 1: something that is there does not.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlpk.errors import BackendError, InputError, ToolError
from xlpk.kv import KV, KVPlan
from xlpk.settings import PersistentBackend as Settings
from xlpk.toolchain import find_cxx, find_nvcc, version_line
from xlpk.units import format_bytes
from xlpk.workload import Request

COPY_BYTES = 256 << 20
PINGS = 1000
DEFAULTS = Settings()
WELL, ABSENT, BROKEN = "ok", "absent", "broken"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and, if it is not well, what to do."""

    name: str
    state: str
    value: str
    advice: str = ""


def examine(cache: Path) -> Iterator[Finding]:
    """All findings, in order, as they are made."""
    yield _guarded("C++ compiler", lambda: version_line(find_cxx()), "backend=cpu needs one")
    driver: Any = None
    try:
        from xlpk.backends.gpu_device import import_driver

        driver = import_driver()
    except ToolError as error:
        there = importlib.util.find_spec("pycuda") is not None and Path("/dev/nvidiactl").exists()
        yield Finding(
            "NVIDIA driver", BROKEN if there else ABSENT, str(error), "docs/cuda.md; backend=cpu works without"
        )
        return
    yield from _about_driver(driver)
    for ordinal in range(driver.Device.count()):
        yield from _about_device(driver, ordinal, cache)


def _guarded(name: str, look: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(name, WELL, look())
    except (ToolError, BackendError, InputError) as error:
        return Finding(name, BROKEN, str(error), advice)


def _about_driver(cuda: Any) -> Iterator[Finding]:
    from xlpk.backends import driver

    newest = driver.driver_version()
    yield Finding("PyCUDA", WELL, importlib.metadata.version("pycuda"))
    yield Finding("NVIDIA driver", WELL, f"CUDA up to {newest[0]}.{newest[1]}, {cuda.Device.count()} device(s)")
    nvcc = find_nvcc()
    if nvcc:
        yield toolkit(version_line(nvcc), newest)
    else:
        yield Finding("CUDA toolkit", ABSENT, "nvcc is not on PATH", "needed once a model, to compile its kernels")


def toolkit(release: str, newest: tuple[int, int]) -> Finding:
    """`release`: nvcc's line. A driver runs what any toolkit of its own CUDA generation compiled, not a later one's."""
    found = re.search(r"release (\d+)\.(\d+)", release)
    if found is None or int(found[1]) <= newest[0]:
        return Finding("CUDA toolkit", WELL, release)
    return Finding(
        "CUDA toolkit",
        BROKEN,
        f"{release}, but the driver runs CUDA {newest[0]}.x only",
        f"install a driver for CUDA {found[1]}, or put the nvcc of a CUDA {newest[0]} toolkit first on PATH",
    )


def _about_device(cuda: Any, ordinal: int, cache: Path) -> Iterator[Finding]:
    from xlpk.backends import driver
    from xlpk.backends.gpu_device import Device

    where = f"device {ordinal}"
    try:
        device = Device(ordinal)
    except (BackendError, cuda.Error) as error:
        yield Finding(
            where, BROKEN, str(error), "is it in use by another process, or in exclusive mode? see nvidia-smi"
        )
        return
    lost = False
    try:
        major, minor = device.compute_capability
        free, total = cuda.mem_get_info()
        yield Finding(where, WELL, f"{device.name}, {driver.device_uuid(ordinal)}")
        old = (major, minor) < (7, 0)
        yield Finding(
            f"{where}: compute capability",
            BROKEN if old else WELL,
            f"{major}.{minor}, {device.multiprocessors} multiprocessors",
            "7.0 or newer is needed" if old else "",
        )
        yield Finding(f"{where}: memory", WELL, f"{format_bytes(free)} free of {format_bytes(total)}")
        eager = driver.loads_eagerly()
        yield Finding(
            f"{where}: module loading",
            WELL if eager else BROKEN,
            "eager" if eager else "lazy",
            "" if eager else "unset CUDA_MODULE_LOADING: a kernel that loads lazily waits for the resident one",
        )
        limited = cuda.Device(ordinal).get_attribute(cuda.device_attribute.KERNEL_EXEC_TIMEOUT)
        yield Finding(
            f"{where}: kernel time limit",
            WELL,
            "kernels are killed after some seconds: a display runs on it" if limited else "none",
            f"keep backend.lease_ms at {DEFAULTS.lease_ms:g} or below, never 0" if limited else "",
        )
        yield _sensors(driver.device_uuid(ordinal), where)
        yield from _copies(cuda, device, where)
    except (BackendError, cuda.Error) as error:
        lost = True
        yield Finding(where, BROKEN, " ".join(str(error).split()), "see nvidia-smi and the kernel's log (dmesg)")
    finally:
        device.close(lost=lost)
    if not lost:
        yield from _loop(ordinal, where, cache)


def _sensors(uuid: str, where: str) -> Finding:
    """`uuid`: what CUDA and the management library both call the device; they count devices in different orders."""
    name = f"{where}: clocks, power, temperature"
    if importlib.util.find_spec("pynvml") is None:
        return Finding(
            name, ABSENT, "nvidia-ml-py is not installed", "pip install nvidia-ml-py, if you want them logged"
        )
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        power = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        heat = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        pynvml.nvmlShutdown()
    except Exception as error:
        return Finding(name, ABSENT, str(error), "the management library does not answer; runs do not need it")
    return Finding(name, WELL, f"{clock} MHz, {power:.0f} W, {heat} C")


def _copies(cuda: Any, device: Any, where: str) -> Iterator[Finding]:
    """Copy rates: inside the device (read + write counted), and from page-locked host memory."""
    size = min(COPY_BYTES, cuda.mem_get_info()[0] // 4)
    source, target = device.allocate(size, "doctor"), device.allocate(size, "doctor")
    host = device.locked(size)

    def rate(copy: Callable[[], None], nbytes: int) -> float:
        best = math.inf
        for _ in range(5):
            begin, end = cuda.Event(), cuda.Event()
            begin.record(device.stream)
            copy()
            end.record(device.stream)
            end.synchronize()
            best = min(best, end.time_since(begin) * 1e-3)
        return nbytes / max(best, 1e-9) / 1e9

    inside = rate(lambda: cuda.memcpy_dtod_async(target, source, size, device.stream), 2 * size)
    link = rate(lambda: cuda.memcpy_htod_async(target, host, device.stream), size)
    yield Finding(f"{where}: bandwidth", WELL, f"{inside:.1f} GB/s device to device, read + write")
    yield Finding(f"{where}: link", WELL, f"{link:.1f} GB/s from page-locked host memory")


def _loop(ordinal: int, where: str, cache: Path) -> Iterator[Finding]:
    """The shipped model on the resident loop: occupancy, census, a word to the device and back, its clock."""
    from xlpk.backends.persistent import PersistentBackend
    from xlpk.model import load_model

    model = load_model("tiny")
    plan = KVPlan.make(KV(budget="64pages"), model.config, model.weights.dtype, 256)
    backend = PersistentBackend(ordinal=ordinal, cache=cache, max_num_seqs=4)
    name = f"{where}: persistent loop"
    try:
        try:
            backend.open(model, plan)
            details = backend._report.details
            yield Finding(
                f"{where}: occupancy", WELL, f"{details['blocks_per_multiprocessor']} team(s) a multiprocessor"
            )
            yield Finding(f"{where}: census", WELL, f"{backend.teams} teams in {details['census_seconds']} s")
            yield from _pings(backend, where)
            yield Finding(name, WELL, f"{_serve(backend)} tokens of model=tiny")
        finally:
            backend.close()
    except (ToolError, BackendError, InputError) as error:
        yield Finding(name, BROKEN, str(error), "backend=launched may work; report this with the whole output")


def _pings(backend: Any, where: str) -> Iterator[Finding]:
    took: list[int] = []
    clocks: list[int] = []
    give_up = time.monotonic() + 1
    while len(took) < PINGS and time.monotonic() < give_up:
        begin = time.perf_counter_ns()
        clocks.append(backend.clock_ns())
        took.append(time.perf_counter_ns() - begin)
    tick = math.gcd(*(later - clocks[0] for later in clocks[1:]))
    yield Finding(f"{where}: mapped memory", WELL, f"a word and its answer in {np.median(took) / 1e3:.1f} us (p50)")
    yield Finding(f"{where}: timer", WELL, f"ticks of {tick} ns")


def _serve(backend: Any) -> int:
    backend.submit(Request(0, (1, 2, 3), 32, ignore_eos=True))
    seen, give_up = 0, time.monotonic() + 30
    while seen < 32:
        if time.monotonic() > give_up:
            raise BackendError(f"{seen} of 32 tokens in 30 s")
        seen += sum(hasattr(event, "token") for event in backend.poll())
    return seen


def main(cache: Path, *, as_json: bool) -> int:
    """Prints the findings -> exit code."""
    findings = []
    for finding in examine(cache):
        findings.append(finding)
        if not as_json:
            advice = f" -> {finding.advice}" if finding.advice else ""
            print(f"{finding.state:7} {finding.name}: {finding.value}{advice}")
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    return int(any(finding.state == BROKEN for finding in findings))
