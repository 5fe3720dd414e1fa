"""The device side of the benchmark: kernels, buffers, one case at a time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from cases import BINS, CYCLES_A_BIN, STAMP, THREADS, WINDOW_BYTES, Case, KiB, Machine

from xlpk import layout
from xlpk.backends.gpu_device import Device
from xlpk.errors import BackendError, ToolError
from xlpk.toolchain import Build, build_cubin, kernels_folder
from xlpk.units import percentile

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "outputs" / "cache"
SOURCES = ("kernels.cu", "job.h", "primitives.h", "barriers.h", "ring.h")
LAUNCH_LIMIT_S = 10.0  # the host gives up; the kernels do so earlier
WARM_UPS, REPEATS, BARRIER_REPEATS = 2, 20, 3
MOST_TEAMS = 1024


def source_hash() -> str:
    """Of the benchmark's own kernels and of ours that they include."""
    digest = hashlib.sha256()
    for path in (*(HERE / name for name in SOURCES), *sorted(kernels_folder().rglob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(arch: str) -> Build:
    """The cubin of kernels.cu, whose text is part of the cache entry's name.

    ToolError: it does not compile, there is no nvcc and no cached one, or `arch` has no bulk copies.
    """
    if int(arch.removeprefix("sm_").rstrip("a")) < 90:
        raise ToolError(f"{arch} has no bulk copies: the micro-benchmarks need compute capability 9.0 or newer")
    source = os.path.relpath(HERE / SOURCES[0], kernels_folder())
    return build_cubin(source, CACHE, arch=arch, defines={"MICROBENCH_SOURCE": f"0x{source_hash()}"})


class State:
    """Everything that a launch writes, in one allocation, so that one fill clears it."""

    def __init__(self) -> None:
        sizes = {
            "grid": layout.GRID_STATE.dtype.itemsize,
            "mailbox": layout.MAILBOX.dtype.itemsize,
            "counters": (MOST_TEAMS + 1) * 128,
            "flags": 64 * KiB + MOST_TEAMS * 128,
            "vectors": max(2 * 64 * KiB, MOST_TEAMS * 128),
            "histogram": BINS * 8,
            "sum": 8,
            "stamps": MOST_TEAMS * STAMP.itemsize,
        }
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, size in sizes.items():
            self.offsets[name] = self.size
            self.size += (size + 1023) // 1024 * 1024
        self.sizes = sizes

    def view(self, memory: np.ndarray[Any, Any], name: str, dtype: Any) -> np.ndarray[Any, Any]:
        begin = self.offsets[name]
        found: np.ndarray[Any, Any] = memory[begin : begin + self.sizes[name]].view(dtype)
        return found


class Bench:
    """The device with the kernels and the buffers; `measure` runs one case."""

    def __init__(self, device: Device, built: Build, stream_bytes: int, *, standin: bool) -> None:
        self.device, self.standin = device, standin
        cuda = device.cuda
        self.deadline_ns = int(3e9 if standin else 200e6)
        with device.errors("the kernels cannot be loaded"):
            self.module = cuda.module_from_buffer(built.path.read_bytes())
        self.state = State()
        self.memory = device.locked(self.state.size)
        self.state_address = device.allocate(self.state.size, "state")
        self.addresses = {name: self.state_address + offset for name, offset in self.state.offsets.items()}
        self.addresses["deadline_ns"] = self.deadline_ns
        self.addresses["data"] = device.allocate(stream_bytes, "--bytes")
        self.addresses["hot"] = device.allocate(WINDOW_BYTES, "window")
        self.machine = Machine(device.multiprocessors, stream_bytes, rounds_share=0.001 if standin else 1.0)

    def fill(self) -> None:
        """Writes what is read: word i of both buffers is i."""
        device, function = self.device, self.module.get_function("fill")
        for name, size in (("data", self.machine.stream_bytes), ("hot", WINDOW_BYTES)):
            arguments = np.array([self.addresses[name], size // 8], np.uint64).tobytes()
            device.launch(function, 4 * device.multiprocessors, THREADS, arguments, 0)
        device.synchronize(LAUNCH_LIMIT_S)

    def timer_step_ns(self) -> int:
        """Smallest step of the global timer among 1000 changes."""
        steps = 1000
        address = self.device.allocate(steps * 8, "timer")
        arguments = np.array([address, steps], np.uint64).tobytes()
        self.device.launch(self.module.get_function("timer"), 1, THREADS, arguments, 0)
        self.device.synchronize(LAUNCH_LIMIT_S)
        values = np.zeros(steps, np.uint64)
        self.device.read(values, address)
        return int(np.diff(values).min())

    def launch(self, case: Case, *, check: bool = False, sampled: bool = False) -> tuple[float, float]:
        """(us from the first team's begin to the last one's end, us between events around the launch)."""
        device, cuda = self.device, self.device.cuda
        function = self.module.get_function(case.kernel)
        function.set_attribute(cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, case.shared_bytes)
        job = case.job(self.machine, self.addresses, check=check, sampled=sampled)
        begin, end = cuda.Event(), cuda.Event()
        with device.errors(case.name):
            cuda.memset_d8_async(self.state_address, 0, self.state.size, device.stream)
            begin.record(device.stream)
            device.launch(function, case.teams(self.machine), case.threads, job.tobytes(), case.shared_bytes)
            end.record(device.stream)
        device.synchronize(LAUNCH_LIMIT_S)
        with device.errors(case.name):
            device.copy_out(self.memory, self.state_address)
            device.synchronize(LAUNCH_LIMIT_S)
            event_us = end.time_since(begin) * 1e3
        reason = int(self.state.view(self.memory, "grid", layout.GRID_STATE.dtype)["abort"][0])
        if reason:
            raise BackendError(
                f"{case.name}: {layout.AbortReason(reason).name.lower()} within {self.deadline_ns / 1e6:g} ms"
            )
        stamps = self.state.view(self.memory, "stamps", STAMP)[: case.teams(self.machine)]
        return (int(stamps["end_ns"].max()) - int(stamps["begin_ns"].min())) / 1e3, event_us

    def cycles_per_ns(self) -> float:
        """The SM clock during the last launch, team 0."""
        stamp = self.state.view(self.memory, "stamps", STAMP)[0]
        return int(stamp["end_cycles"] - stamp["begin_cycles"]) / max(1, int(stamp["end_ns"] - stamp["begin_ns"]))

    def verify(self, case: Case) -> None:
        """BackendError if the last launch read other words than it should have, or a barrier was none."""
        found = int(self.state.view(self.memory, "sum", np.uint64)[0])
        if not case.tiles(self.machine):
            if found:
                raise BackendError(f"{case.name}: {found} words behind barriers are not those written in front of them")
        elif found != (expected := case.expected_sum(self.machine)):
            raise BackendError(f"{case.name}: the sum of what was read is {found}, not {expected}")

    def measure(self, case: Case) -> dict[str, Any]:
        """A case's record: parameters, raw samples, medians."""
        barriers, teams = case.barriers(self.machine), case.teams(self.machine)
        counting = case.section in ("barrier", "broadcast")
        repeats = 1 if self.standin else BARRIER_REPEATS if counting else REPEATS
        self.launch(case, check=True)
        self.verify(case)
        for _ in range(0 if self.standin or counting else WARM_UPS):
            self.launch(case)
        samples, events, rates = [], [], []
        for _ in range(repeats):
            device_us, event_us = self.launch(case)
            samples.append(device_us)
            events.append(event_us)
            rates.append(self.cycles_per_ns())
        quantiles = {f"{name}_us": percentile(samples, q) for name, q in (("p10", 10), ("median", 50), ("p90", 90))}
        record: dict[str, Any] = {
            "section": case.section,
            "parameters": case.parameters,
            "teams": teams,
            "barriers": barriers,
            "bytes": case.stream_bytes(self.machine),
            "slots": case.slots if case.kernel == "ring" else None,
            "samples_us": samples,
            "event_us": events,
            **quantiles,
            "cycles_per_ns": percentile(rates, 50),
        }
        if record["bytes"]:
            record["gb_per_s"] = record["bytes"] / quantiles["median_us"] / 1e3
        if counting:
            record["mean_ns"] = quantiles["median_us"] * 1e3 / barriers
        if case.section == "barrier":
            self.launch(case, sampled=True)
            record |= distribution(self.state.view(self.memory, "histogram", np.uint64), self.cycles_per_ns())
        return record


def distribution(histogram: np.ndarray[Any, Any], cycles_per_ns: float) -> dict[str, Any]:
    """Quantiles (ns) of barrier periods and the bins that are not empty: {lower end in cycles: count}."""
    counts = histogram.astype(np.int64)
    middle_ns = (np.arange(BINS) + 0.5) * CYCLES_A_BIN / cycles_per_ns
    reached = np.cumsum(counts)
    quantiles = {
        f"p{q}_ns": float(middle_ns[np.searchsorted(reached, reached[-1] * q / 100)]) for q in (10, 50, 90, 99)
    }
    bins = {str(int(i) * CYCLES_A_BIN): int(counts[i]) for i in np.flatnonzero(counts)}
    return {**quantiles, "over_range": int(counts[-1]), "histogram_cycles": bins}
