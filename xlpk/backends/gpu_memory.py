"""The table of a session's buffers on a device, and the Params record that points into them.

A loop on the device: one allocation for what it alone touches, and one mapped, page-locked region of the host for
rings, mailbox and flight recorder; the region is a memory file, so that another process can watch it. Control on the
host: its state lies with the host, and a step's descriptor and its results in blocks that are copied whole.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backends.gpu_device import Device
from xlpk.backends.memory import (
    RINGS,
    STARTED,
    Limits,
    aligned_zeros,
    buffer_table,
    dims_record,
    scratch_floats,
    session_values,
    start_values,
)
from xlpk.backends.upload import DeviceWeights
from xlpk.errors import InputError
from xlpk.kv import KVPlan
from xlpk.model import Model, ModelConfig
from xlpk.speculation import Acceptance, Proposer

Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
_ALIGNMENT = 256  # bytes; what one agent writes shares no line with what another does
WARPS = layout.GPU_THREADS // layout.GPU_LANES


class Arena:
    """Where the buffers of a table lie in one region: offsets in bytes, in the table's order."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.offsets: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in shapes.items():
            self.offsets[name] = size
            size += -(-_bytes(shape, dtype) // _ALIGNMENT) * _ALIGNMENT
        self.size = size

    def addresses(self, base: int) -> dict[str, int]:
        """name -> address; 0 for an empty buffer."""
        return {
            name: base + self.offsets[name] if _bytes(shape, dtype) else 0
            for name, (shape, dtype) in self.shapes.items()
        }

    def views(self, region: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """name -> the buffer in a region of bytes."""
        out = {}
        for name, (shape, dtype) in self.shapes.items():
            begin = self.offsets[name]
            out[name] = region[begin : begin + _bytes(shape, dtype)].view(dtype).reshape(shape)
        return out


def _bytes(shape: Iterable[int], dtype: Any) -> int:
    return int(np.prod(tuple(shape), dtype=np.int64)) * int(np.dtype(dtype).itemsize)


def pick(shapes: Shapes, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {name: shapes[name] for name in names}


class SharedRegion:
    """Memory of a file without a name: mapped into the device; a process that watches gets its descriptor."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create("xlpk")
        os.ftruncate(self.fd, self.size)
        self._mapping = mmap.mmap(self.fd, self.size)
        self.bytes: np.ndarray[Any, Any] = np.frombuffer(self._mapping, np.uint8)
        self.device_address = device.map_host(self.bytes)

    def close(self) -> None:
        """The descriptor; the mapping ends with the last array on it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def gpu_scratch_floats(config: ModelConfig, limits: Limits, device: Device) -> int:
    """Floats of dynamic shared memory of a team: for all rows of a step if they fit, else for as many as do."""
    static = layout.GPU_THREADS * 4  # Team.shared_ints
    most = (device.shared_bytes - static) // 4
    least = scratch_floats(config, Limits(1, 1, 1), warps=WARPS)
    if least > most:
        raise InputError(
            "model", f"{least * 4} bytes of shared memory for one row", f"at most {most * 4} on {device.name}"
        )
    return min(scratch_floats(config, limits, warps=WARPS), most)


@dataclass
class GpuMemory:
    """What a session points to. `params`: the device's addresses; `host_params`: the host's, of what it touches."""

    params: np.ndarray[Any, Any]
    host_params: np.ndarray[Any, Any]
    dims: np.ndarray[Any, Any]
    host: dict[str, np.ndarray[Any, Any]]  # buffers that the host touches
    device: dict[str, int]  # addresses of those that the device touches
    shapes: Shapes
    offsets: dict[str, int] = field(default_factory=dict)  # in the shared region, where there is one

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return self.host[name]

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a team."""
        return int(self.params["scratch_floats"]) * 4


@dataclass(frozen=True)
class Session:
    """What a backend opens with; `times`: seconds by name of a `*_ns` field of Params."""

    model: Model
    plan: KVPlan
    limits: Limits
    spec: Proposer
    acceptance: Acceptance
    teams: int
    times: Mapping[str, float]
    logits: bool  # keep them by position

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """The table of buffers, the flight recorder among them."""
        config, limits = self.model.config, self.limits
        table = buffer_table(config, self.plan, limits, warps=WARPS, logits=self.logits, teams=self.teams)
        return table | {"flight": ((self.teams, layout.FLIGHT_ENTRIES), layout.FLIGHT_ENTRY.dtype)}

    def memory(
        self,
        device: Device,
        weights: DeviceWeights,
        shapes: Shapes,
        host: dict[str, np.ndarray[Any, Any]],
        addresses: dict[str, int],
    ) -> GpuMemory:
        """Both records of parameters. `addresses`: of the device's buffers; a buffer that neither side has is null."""
        params = np.zeros((), layout.PARAMS.dtype)
        values: dict[str, int] = {
            **weights.addresses,
            **addresses,
            "scratch_floats": gpu_scratch_floats(self.model.config, self.limits, device),
            **session_values(self.model.config, self.plan, self.limits, self.spec, self.acceptance, shapes),
            **{f"{name}_ns": int(seconds * 1e9) for name, seconds in self.times.items()},
        }
        for name, value in values.items():
            params[name] = value
        host_params = params.copy()
        for name, array in host.items():
            host_params[name] = array.ctypes.data if array.size else 0
        return GpuMemory(params, host_params, dims_record(self.model.config, self.plan), host, addresses, shapes)


def swap_space(device: Device, plan: KVPlan) -> dict[str, int]:
    """Address of the swap space, host memory that is locked and mapped; none if the plan has none."""
    size = plan.swap_pages * plan.page_bytes
    if size == 0:
        return {}
    memory = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    return {"swap": device.map_host(np.frombuffer(memory, np.uint8))}


def resident_memory(device: Device, session: Session, weights: DeviceWeights) -> tuple[GpuMemory, SharedRegion]:
    """For a loop on the device: rings and flight recorder in a region that both reach, all else in device memory."""
    shapes = session.shapes()
    mapped = (*RINGS, "flight")
    apart = (*mapped, "swap")
    outer, inner = Arena(pick(shapes, mapped)), Arena(pick(shapes, (name for name in shapes if name not in apart)))
    region = SharedRegion(device, outer.size)
    addresses = inner.addresses(device.allocate(inner.size, "kv.budget and buffers"))
    first = {name: np.zeros(*shapes[name]) for name in STARTED}
    start_values(first, session.plan)
    with device.errors("the first state of a session could not be copied"):
        for name, array in first.items():
            device.cuda.memcpy_htod_async(addresses[name], array, device.stream)
        device.stream.synchronize()
    addresses |= outer.addresses(region.device_address) | swap_space(device, session.plan)
    memory = session.memory(device, weights, shapes, outer.views(region.bytes), addresses)
    memory.offsets |= outer.offsets
    return memory, region


# What a step sends, and what it brings back; each in one copy.
DESCRIPTOR = ("step", "rows", "sample_rows", "slots", "patches")
READBACK = ("state", "best", "row_logprobs")
_PLANNER = (
    "queue",
    "gone",
    "heap",
    "order",
    "free_slots",
    "page_hashes",
    "tokens",
    "oracle",
    "free_pages",
    "pages",
    "page_tokens",
    "buckets",
    "swap_free",
    "swap_table",
)
_HOST_ONLY = (*RINGS, "grid", "record", *_PLANNER)
_BOTH = ("page_table", "counts", "bias", "moves", "state", "spans", "span_counts")  # the host's own, and the device's


@dataclass
class Mirror:
    """A block of buffers that lies alike in page-locked host memory and on the device."""

    arena: Arena
    bytes: np.ndarray[Any, Any]
    device_address: int

    @property
    def host(self) -> dict[str, np.ndarray[Any, Any]]:
        return self.arena.views(self.bytes)


def mirrored_memory(device: Device, session: Session, weights: DeviceWeights) -> tuple[GpuMemory, Mirror, Mirror]:
    """For control on the host: its state in host memory, what phases read or write in device memory, and two mirrors:
    of the step's descriptor, and of what comes back."""
    shapes = session.shapes()
    del shapes["flight"]
    blocks = {"descriptor": Arena(pick(shapes, DESCRIPTOR)), "readback": Arena(pick(shapes, READBACK))}
    apart = {*DESCRIPTOR, *READBACK, *_HOST_ONLY, "swap"} - {
        "grid",
        "mailbox",
    }  # phases look at none of these two's words
    inner = Arena(pick(shapes, (name for name in shapes if name not in apart)))
    base = device.allocate(inner.size + sum(block.size for block in blocks.values()), "kv.budget and buffers")
    addresses = inner.addresses(base)
    base += inner.size
    mirrors = []
    for block in blocks.values():
        mirrors.append(Mirror(block, device.locked(block.size), base))
        addresses |= block.addresses(base)
        base += block.size
    descriptor, readback = mirrors
    addresses |= swap_space(device, session.plan)
    host = {name: aligned_zeros(*shapes[name]) for name in (*_HOST_ONLY, *_BOTH)}
    host |= descriptor.host | {name: array for name, array in readback.host.items() if name != "state"}
    n_bytes = host["moves"].nbytes
    host["moves"] = device.locked(n_bytes)[:n_bytes].view(layout.MOVE.dtype)
    start_values(host, session.plan)
    return session.memory(device, weights, shapes, host, addresses), descriptor, readback
