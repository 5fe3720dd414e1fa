"""`backend=persistent`: one kernel holds the loop and stays on the device; the host submits, drains, renews leases.

A launch leaves when its lease ends, when it is idle, or when the host's heartbeat stops, with all state on the device.
The host finds that in `poll` and launches again if there is work: what was submitted while the kernel was leaving is
seen then.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import Event
from xlpk.backends.gpu import STOP_S, GpuBackend
from xlpk.backends.gpu_memory import GpuMemory, Session, SharedRegion, resident_memory
from xlpk.backends.memory import unheld_pages
from xlpk.backends.upload import DeviceWeights
from xlpk.backends.watchdog import FLIGHT_FILE, Watchdog, where
from xlpk.errors import BackendError, HangError

PLANNER_TEAMS = 64  # from so many on, one that only plans is 1.6 % of them at most
KERNEL = "xl_persistent_megakernel"
QUERY_S = 0.005  # between looks at the stream, which tell a kernel that died
PING_NS = 20_000_000  # for one answer: a launch that was leaving does not answer, the next one does
PINGS_S = 2.5  # for any answer


class PersistentBackend(GpuBackend):
    """Implements xlpk.backend.Backend."""

    name = "persistent"
    orchestration = "persistent"
    source = f"{KERNEL}.cu"

    def __init__(
        self,
        *,
        lease_s: float = 1.0,
        idle_s: float = 0.5,
        heartbeat_s: float = 1.0,
        watch: bool = True,
        flight: bool = True,
        **options: Any,
    ) -> None:
        """`lease_s`, `idle_s`, `heartbeat_s`: after how long a launch leaves by itself, without work, without a sign of
        life of the host; 0: never. `watch`: start a watchdog. `flight`: teams write the flight recorder. `options`: as
        of GpuBackend."""
        super().__init__(**options)
        self._lease_s, self._idle_s, self._heartbeat_s = lease_s, idle_s, heartbeat_s
        self._region: SharedRegion | None = None
        self._watchdog: Watchdog | None = None
        self._hung = False
        self.watch, self._flight = watch, flight
        self._heartbeat: int | None = None
        self._guard = contextlib.ExitStack()

    def _times(self) -> dict[str, float]:
        return {"lease": self._lease_s, "idle": self._idle_s, "heartbeat": self._heartbeat_s}

    def _allocate(self, session: Session, weights: DeviceWeights) -> GpuMemory:
        memory, self._region = resident_memory(self.device, session, weights)
        if not self._flight:
            memory.params["flight"] = 0
        own_team = self.planner == "team" or (self.planner == "auto" and self.teams >= PLANNER_TEAMS)
        memory.params["planner"] = own_team
        self._report.details["planner"] = "team" if own_team else "inline"
        return memory

    def _start(self) -> None:
        from xlpk.backends import driver

        assert self._memory is not None
        device, memory = self.device, self._memory
        self._kernel = self._function(KERNEL)
        self._parameters = self._arguments()
        with device.errors("the occupancy could not be asked"):
            resources = driver.function_resources(
                self._module.cubin, KERNEL, threads=layout.GPU_THREADS, dynamic_shared_bytes=memory.shared_bytes
            )
        blocks = resources.blocks_per_multiprocessor
        self._report.details["blocks_per_multiprocessor"] = str(blocks)
        if blocks * device.multiprocessors < self.teams:
            raise BackendError(
                f"{self.teams} teams cannot run at once: {blocks} of {layout.GPU_THREADS} threads and "
                f"{memory.shared_bytes} bytes of shared memory fit each of {device.multiprocessors} multiprocessors"
            )
        if self._heartbeat_s > 0:
            interval_ns = int(self._heartbeat_s * 1e8)
            self._heartbeat = self.library.dll.xl_heartbeat(self._params, interval_ns)
        assert self._region is not None
        if self.watch:
            self._watchdog = Watchdog(self._region.fd, memory.offsets, self.teams, self.folder)
        self._guard.enter_context(device.resident())
        self._launch()
        self._take_census()

    def _launch(self) -> None:
        assert self._memory is not None
        with self.device.errors("the persistent kernel could not be launched"):
            self.device.launch(
                self._kernel, self.teams, layout.GPU_THREADS, self._parameters, self._memory.shared_bytes
            )
        self._mailbox["launches"] = self._report.launches
        self._queried_s = time.monotonic()

    def _take_census(self) -> None:
        """Waits until all teams run: the first round of control. The device has its own, shorter deadline."""
        begin_s = time.monotonic()
        give_up = begin_s + self._spin_deadline_s + STOP_S
        while not int(self._mailbox["progress"][0]):
            self._raise_if_aborted()
            self._raise_if_hanging()
            self._look_at_stream()
            if time.monotonic() > give_up:
                self._hung = True
                raise HangError("HANG: the persistent kernel did not start: is another program on the device?")
            time.sleep(0.0002)
        self._report.details["census_seconds"] = f"{time.monotonic() - begin_s:.4f}"
        self._look_at_watchdog()

    def _look_at_watchdog(self) -> None:
        """Raises if it is gone: nobody would see the loop hang."""
        if self._watchdog is not None and (code := self._watchdog.ended()) is not None:
            raise BackendError(f"the watchdog process has ended (exit code {code}); what it said is on standard error")

    def clock_ns(self) -> int:
        """The device clock, asked of the idle loop. BackendError: it is busy, or does not see the host's words."""
        give_up = time.monotonic() + PINGS_S
        while time.monotonic() < give_up:
            self._keep_resident(always=True)
            before_ns = time.monotonic_ns()
            now_ns = int(self.library.dll.xl_ping(self._params, PING_NS))
            if now_ns:
                error_ns = (time.monotonic_ns() - before_ns) // 2
                self._report.clock_error_ns = min(error_ns, self._report.clock_error_ns or error_ns)
                return now_ns
            self._raise_if_aborted()
            self._raise_if_hanging()
        raise BackendError("the loop does not tell the time: it is busy, or it does not see the host's words")

    def submit(self, request: Any) -> bool:
        done = super().submit(request)
        if self._is_owner():
            self._keep_resident()
        return done

    def _take_cancellations(self) -> None:
        self._keep_resident()

    def poll(self) -> list[Event]:
        events = self._drain()
        if not events:  # what the loop published before it died comes first
            self._raise_if_aborted()
            self._raise_if_hanging()
            self._keep_resident()
        return events

    def _raise_if_hanging(self) -> None:
        if self._mailbox["hang"][0]:
            self._hung = True
            assert self._memory is not None
            seen = f"see {self.folder / FLIGHT_FILE}" if self.folder else "no run folder"
            raise HangError(f"HANG: nothing moved on the device; {where(self._memory['flight'])} ({seen})")

    def _keep_resident(self, *, always: bool = False) -> None:
        """Launches again if the last launch has left and there is work."""
        if self.library.dll.xl_left(self._params) < self._report.launches:
            self._look_at_stream()
        elif always or self._pending():
            self._launch()

    def _pending(self) -> bool:
        box = self._mailbox[0]
        return bool(
            box["running"] or box["submit_tail"] != box["submit_head"] or box["cancel_tail"] != box["cancel_head"]
        )

    def _look_at_stream(self) -> None:
        """Raises what killed the kernel, if it is dead."""
        now = time.monotonic()
        if now - self._queried_s < QUERY_S:
            return
        self._queried_s = now
        self._look_at_watchdog()
        with self.device.errors("the persistent kernel died"):
            done = self.device.stream.is_done()
        if done and not self._aborted() and self.library.dll.xl_left(self._params) < self._report.launches:
            raise BackendError("the persistent kernel ended without a reason")

    def _stop(self) -> bool:
        assert self._memory is not None
        self.library.dll.xl_stop(self._params)
        try:
            ended = self.device.wait(0.1 if self._hung else STOP_S + self._spin_deadline_s)
        finally:
            self._guard.close()
            if self._watchdog is not None:
                self._watchdog.close()
                self._watchdog = None
            if self._heartbeat is not None:
                self.library.dll.xl_heartbeat_end(self._heartbeat)
                self._heartbeat = None
        self._report.syncs += 1
        if not ended:
            if not self._hung:
                self._complaint = HangError("HANG: the loop did not leave when it was told to")
            return False
        state = np.zeros(1, layout.LOOP_STATE.dtype)
        self.device.read(state, self._memory.device["state"])
        self._free_pages = unheld_pages(state)
        self._take_last(self._read_back("spans"), self._read_back("span_counts"), resident=True)
        return True

    def close(self) -> Any:
        report = super().close()
        if self._region is not None:
            self._region.close()
            self._region = None
        return report
