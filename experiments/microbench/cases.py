"""What is measured: the cases, the record that a kernel is given, and what each case should read and take at best.

Sizes in bytes, durations in nanoseconds. No device is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from xlpk.errors import BackendError

KiB, MiB = 1 << 10, 1 << 20

STREAM_BYTES = 2_471_000_000  # weights of a token: Llama-3.2-1B shape, bf16
WINDOW_BYTES = 128 * MiB  # the largest window that is read again and again
BARRIERS = 83  # dependent phases of a token of that model
THREADS, LOADER_THREADS = 256, 32
BINS, CYCLES_A_BIN = 4096, 8

# struct Job of job.h, in its order; a test compares the two.
JOB_FIELDS = (
    "data",
    "hot",
    "tiles",
    "tile_bytes",
    "hot_of_16",
    "hot_tiles",
    "contiguous",
    "slots",
    "tile_warps",
    "consumer_cycles",
    "check",
    "rounds",
    "group",
    "flag_bytes",
    "sampled",
    "vector_bytes",
    "writers",
    "deadline_ns",
    "grid",
    "mailbox",
    "counters",
    "flags",
    "vectors",
    "histogram",
    "sum",
    "stamps",
)
JOB = np.dtype([(name, "<u8") for name in JOB_FIELDS])
STAMP = np.dtype([(name, "<u8") for name in ("begin_ns", "end_ns", "begin_cycles", "end_cycles")])


@dataclass(frozen=True)
class Machine:
    """What cases depend on; the last two are measured by the first cases."""

    multiprocessors: int
    stream_bytes: int
    rounds_share: float = 1.0  # of the barriers a case asks for; a CPU plays fewer
    cycles_per_ns: float = 1.0
    read_bytes_per_ns: float | None = None


@dataclass(frozen=True)
class Case:
    """One kernel with its parameters; the section is the kernel's first word."""

    kernel: str
    tile_bytes: int = 64 * KiB
    blocks: int = 1  # teams a multiprocessor
    hot_of_16: int = 0
    window_bytes: int = 16 * MiB
    contiguous: int = 0
    ring_bytes: int = 192 * KiB
    tile_warps: int = 8  # 1: the slots must be a multiple of the warps, see ring.h
    consumer_share: float = 0.0  # time that a tile is held / time that the memory needs for it
    rounds: int = 0
    group: int = 12  # 11 groups of 132 teams
    flag_bytes: int = 128
    vector_bytes: int = 8 * KiB
    writers: int = 0  # 0: all teams

    @property
    def section(self) -> str:
        if self.kernel == "ring" and self.rounds == 0 and self.consumer_share == 0:
            return "read"
        return self.kernel.partition("_")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """What differs from the defaults."""
        default = asdict(Case(self.kernel))
        return {key: value for key, value in asdict(self).items() if value != default[key]}

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in self.parameters.items() if key != "kernel"]
        return " ".join([self.kernel, *words])

    @property
    def threads(self) -> int:
        return THREADS + LOADER_THREADS if self.kernel == "ring" else THREADS

    @property
    def slots(self) -> int:
        return self.ring_bytes // self.tile_bytes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory. With 128 KiB no two teams meet on a multiprocessor."""
        if self.blocks > 1:
            return 0
        return max(128 * KiB, self.slots * self.tile_bytes) if self.kernel == "ring" else 128 * KiB

    def teams(self, machine: Machine) -> int:
        return machine.multiprocessors * self.blocks

    def tiles(self, machine: Machine) -> int:
        """Tiles that a team reads."""
        if self.section in ("barrier", "broadcast"):
            return 0
        return machine.stream_bytes // (self.teams(machine) * self.tile_bytes)

    def stream_bytes(self, machine: Machine) -> int:
        """Bytes that all teams read."""
        return self.tiles(machine) * self.tile_bytes * self.teams(machine)

    def barriers(self, machine: Machine) -> int:
        if self.kernel == "ring" or self.rounds == 0:
            return self.rounds
        return max(8, int(self.rounds * machine.rounds_share))

    def tile_ns(self, machine: Machine) -> float:
        """Time that the memory needs for one tile of every team. Needs the measured bandwidth."""
        if machine.read_bytes_per_ns is None:
            raise BackendError(f"{self.name}: no read case was measured, so the memory's time for a tile is not known")
        return self.tile_bytes * self.teams(machine) / machine.read_bytes_per_ns

    def job(self, machine: Machine, addresses: Mapping[str, int], *, check: bool, sampled: bool) -> Any:
        """The kernel's argument, a JOB record."""
        held_ns = self.consumer_share * self.tile_ns(machine) if self.consumer_share else 0.0
        values = {
            **addresses,
            "tiles": self.tiles(machine),
            "tile_bytes": self.tile_bytes,
            "hot_of_16": self.hot_of_16,
            "hot_tiles": self.window_bytes // self.tile_bytes,
            "contiguous": self.contiguous,
            "slots": self.slots,
            "tile_warps": self.tile_warps,
            # A warp with a tile of its own may hold it for as long as all eight together take eight.
            "consumer_cycles": round(held_ns * machine.cycles_per_ns * 8 / self.tile_warps),
            "check": int(check),
            "rounds": self.barriers(machine),
            "group": self.group,
            "flag_bytes": self.flag_bytes,
            "sampled": int(sampled),
            "vector_bytes": self.vector_bytes,
            "writers": self.writers,
        }
        record = np.zeros((), JOB)
        for name in JOB_FIELDS:
            record[name] = values[name]
        return record

    def expected_sum(self, machine: Machine) -> int:
        """Of the 64-bit words that all teams read, modulo 2**64: word i of both buffers is i."""
        tile, team = np.meshgrid(
            np.arange(self.tiles(machine), dtype=np.uint64), np.arange(self.teams(machine), dtype=np.uint64)
        )
        is_hot = tile % 16 < self.hot_of_16
        turn = tile * np.uint64(self.teams(machine)) + team
        cold = (np.cumsum(~is_hot, axis=1) - 1).astype(np.uint64)  # how many the team read from the stream before
        if self.contiguous:
            index = team * np.uint64(self.tiles(machine)) + cold
        else:
            index = cold * np.uint64(self.teams(machine)) + team
        index = np.where(is_hot, turn % np.uint64(self.window_bytes // self.tile_bytes), index)
        words = self.tile_bytes // 8
        total = words * words * int(index.sum()) + index.size * (words * (words - 1) // 2)
        return total % (1 << 64)


def ring_floor_ns(tiles: int, barriers: int, slots: int, *, tile_ns: float, held_ns: float, barrier_ns: float) -> float:
    """When an ideal ring has passed the last barrier.

    The memory delivers a tile each `tile_ns` as long as there is a free slot; the consumer holds each tile for
    `held_ns` and stands still for `barrier_ns` at the end of each of `barriers` phases.
    """
    released = [0.0] * tiles
    delivered = taken = 0.0
    phases = max(barriers, 1)
    ends = {tiles * phase // phases for phase in range(1, phases + 1)} if barriers else set()
    for i in range(tiles):
        free = released[i - slots] if i >= slots else 0.0
        delivered = max(delivered, free) + tile_ns
        taken = released[i] = max(taken, delivered) + held_ns
        if i + 1 in ends:
            taken += barrier_ns
    return taken


READ = Case("read_readonly16_x8")
BARRIER = Case("barrier_ours", rounds=100_000)
BROADCAST = Case("broadcast_shared", rounds=10_000)
RING = Case("ring", tile_bytes=16 * KiB, rounds=BARRIERS)


def all_cases() -> list[Case]:
    """The four numbers first, so that a run that is cut short has them; then what varies them."""
    bulk = replace(RING, rounds=0)
    ours = [READ, bulk, BARRIER, BROADCAST, replace(BROADCAST, kernel="broadcast_bulk"), RING]
    read = [
        *(Case(f"read_readonly{form}") for form in ("4_x16", "8_x8", "16_x1", "16_x4", "16_x16")),
        Case("read_plain16_x8"),
        Case("read_readonly16_x8", blocks=4),
        *(Case(f"read_async_x{stages}", tile_bytes=16 * KiB) for stages in (2, 4, 8)),
        *(replace(bulk, ring_bytes=size * KiB) for size in (32, 64, 128)),
        replace(bulk, contiguous=1),
        replace(bulk, tile_warps=1, tile_bytes=8 * KiB),
        *(replace(READ, hot_of_16=hot) for hot in (4, 8, 12, 16)),
        *(replace(READ, hot_of_16=16, window_bytes=size * MiB) for size in (4, 32, 64, 128)),
        *(replace(bulk, hot_of_16=hot) for hot in (4, 16)),
    ]
    barrier = [
        *(
            replace(BARRIER, kernel=f"barrier_{form}")
            for form in ("red_acquire", "red_acquire_nap", "red_relaxed", "atom_relaxed")
        ),
        *(replace(BARRIER, kernel="barrier_grouped", group=group) for group in (6, 12, 33)),
        *(
            replace(BARRIER, kernel=f"barrier_flags_{form}", flag_bytes=apart)
            for form in ("all", "root", "tree")
            for apart in (128, 4)
        ),
    ]
    broadcast = [
        replace(BROADCAST, kernel=f"broadcast_{take}", writers=writers, vector_bytes=size * KiB)
        for size in (8, 2, 32)
        for take in ("warps", "shared", "bulk")
        for writers in (0, 1)
    ]
    ring = [
        *(replace(RING, rounds=count, ring_bytes=size * KiB) for size in (192, 64) for count in (1, 166)),
        *(replace(RING, consumer_share=share) for share in (0.5, 0.625, 0.8, 1.0, 1.5, 2.0)),
        *(replace(RING, tile_warps=1, tile_bytes=8 * KiB, consumer_share=share) for share in (0.0, 0.625, 1.0)),
        *(replace(RING, tile_bytes=8 * KiB, consumer_share=share) for share in (0.625, 1.0)),
        *(
            replace(RING, ring_bytes=size * KiB, tile_bytes=tile * KiB)
            for size in (192, 160, 128, 96, 64, 220)
            for tile in (16, 4, 8, 32)
        ),
    ]
    return list({case.name: case for case in [*ours, *read, *barrier, *broadcast, *ring]}.values())
