"""`backend=launched`: control on the host, one kernel a phase on the device.

A step: the CPU build of the stages decides on the host's state; one copy sends the step's descriptor; the phases
follow, each an asynchronous launch; one copy brings back the sampled tokens; one wait. `sync=phase` waits after each
phase: the naive extreme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from xlpk import layout
from xlpk.backend import Event
from xlpk.backends.gpu import STOP_S, GpuBackend
from xlpk.backends.gpu_device import Call
from xlpk.backends.gpu_memory import DESCRIPTOR, READBACK, GpuMemory, Session, mirrored_memory
from xlpk.backends.memory import unheld_pages
from xlpk.backends.upload import DeviceWeights
from xlpk.errors import BackendError, InputError

_FILTER = layout.PHASE_NAMES.index("filter")
_CONTROL = layout.PHASE_NAMES.index("control")


class Shape(NamedTuple):
    """What of a step changes its launches; rows are read from the descriptor."""

    left_out: frozenset[int]  # optional phases that it does not run
    patched: bool  # the page table or the counts changed


class LaunchedBackend(GpuBackend):
    """Implements xlpk.backend.Backend."""

    name = "launched"
    orchestration = "launched"
    source = "launched.cu"

    def __init__(self, *, sync: str = "step", hang_s: float = 3.0, **options: Any) -> None:
        """`sync`: step | phase. `hang_s`: the longest that a step may take. `options`: as of GpuBackend."""
        super().__init__(**options)
        if sync not in ("step", "phase"):
            raise InputError("backend.sync", sync, "one of step, phase")
        self.sync, self._hang_s = sync, hang_s

    def _allocate(self, session: Session, weights: DeviceWeights) -> GpuMemory:
        memory, self._descriptor, self._readback = mirrored_memory(self.device, session, weights)
        return memory

    def _start(self) -> None:
        memory, library = self._memory, self.library
        assert memory is not None
        self._report.details["planner"] = "inline" if self.planner == "inline" else "host"
        slots, vocab = self.limits.slots, self._model.config.vocab_size
        self._report.clock_error_ns = library.clock_error_ns()
        self._patch = self._function("xl_apply_patches"), self._arguments()
        names = dict.fromkeys(phase for phase, _ in layout.phase_sequence(1))
        functions = {phase: self._function(f"xl_phase_{layout.PHASE_NAMES[phase]}") for phase in names}
        calls = [
            (phase, (functions[phase], self._arguments(layer)))
            for phase, layer in layout.phase_sequence(self._model.config.num_hidden_layers)
        ]
        self._calls = calls
        # What the device has: see xl_collect_patches.
        table = memory["page_table"]
        self._sent_pages = self.device.locked(table.nbytes).view(np.int32).reshape(table.shape)
        self._sent_pages[:] = 0
        self._sent_ids = np.zeros(slots, np.uint64)
        self._counted = np.zeros(slots, np.int32)
        self._fresh, self._tables = np.zeros((2, slots), np.int32)
        self._n_rows = np.zeros(2, np.int32)
        self._row = self.device.locked(2 * vocab * 4).view(np.int32).reshape(2, vocab)
        self._back = self._readback.host
        self._device_state = np.zeros(1, layout.LOOP_STATE.dtype)  # as the last step left it

    def clock_ns(self) -> int:
        """The clock of control, which stamps events: the host's."""
        return int(self.library.dll.xl_clock_ns())

    def _take_cancellations(self) -> None:
        with self.device.errors("a step failed"):
            self._run_step()  # whole: control plans a step, which must run before the next one

    def poll(self) -> list[Event]:
        if not self._aborted():
            with self.device.errors("a step failed"):
                self._run_step()
        events = self._drain()
        if not events:  # what the loop published before it died comes first
            self._raise_if_aborted()
        return events

    def _run_step(self) -> None:
        if self.library.dll.xl_control(self._params, self._dims) == 0:
            return
        shape = self._prepare()
        self._run_shape(shape)
        if self.planner != "inline":
            self.library.dll.xl_prepare(self._params, self._dims)
        self.device.synchronize(self._hang_s)
        self._take_times()

    def _prepare(self) -> Shape:
        """Completes the descriptor; sends whole rows where much is new: page tables, counts and biases."""
        memory = self._memory
        assert memory is not None
        patches = self.library.dll.xl_collect_patches(
            self._params,
            self._dims,
            self._sent_pages.ctypes.data,
            self._sent_ids.ctypes.data,
            self._counted.ctypes.data,
            self._fresh.ctypes.data,
            self._tables.ctypes.data,
            self._n_rows.ctypes.data,
            memory["patches"].size,
        )
        if patches < 0:
            raise BackendError(
                f"a step changed more than {memory['patches'].size} words of the page table and the counts"
            )
        n_fresh, n_tables = self._n_rows.tolist()
        for slot in self._fresh[:n_fresh].tolist():
            self._send_adjustments(slot)
        for slot in self._tables[:n_tables].tolist():
            row = self._sent_pages[slot]
            self.device.copy_in(memory.device["page_table"] + slot * row.nbytes, row)
        step = memory["step"][0]
        if n_moves := int(step["n_moves"]):
            self.device.copy_in(memory.device["moves"], memory["moves"][:n_moves])
        left_out = frozenset(phase for phase, field in layout.OPTIONAL.items() if not step[field])
        return Shape(left_out, bool(step["n_page_patches"] or step["n_count_patches"]))

    def _send_adjustments(self, slot: int) -> None:
        """Once a request: its counts and biases."""
        memory, device = self._memory, self.device
        assert memory is not None
        offset = slot * self._row.shape[1] * 4
        for row, name in enumerate(("counts", "bias")):
            self._row[row] = memory[name][slot].view(np.int32)
            device.copy_in(memory.device[name] + offset, self._row[row])
        device.synchronize(self._hang_s)  # the buffer is used again

    def _run_shape(self, shape: Shape) -> None:
        self._enqueue(shape)

    def _enqueue(self, shape: Shape) -> None:
        """All of a step onto the stream."""
        device = self.device
        descriptor, readback = self._descriptor, self._readback
        device.copy_in(descriptor.device_address, descriptor.bytes)
        if shape.patched:
            self._launch([self._patch])
        calls = [call for phase, call in self._calls if phase not in shape.left_out]
        if self.sync == "step":
            self._launch(calls)
        else:
            for call in calls:
                self._launch([call])
                device.synchronize(self._hang_s)
        logprobs = _FILTER not in shape.left_out
        size = readback.arena.size if logprobs else readback.arena.offsets["row_logprobs"]
        device.copy_out(readback.bytes[:size], readback.device_address)

    def _launch(self, calls: Sequence[Call]) -> None:
        assert self._memory is not None
        self.device.launch_all(calls, self.teams, layout.GPU_THREADS, self._memory.shared_bytes)

    def _take_times(self) -> None:
        """Phases' times of the step, of team 0's clocks: the device adds them up, control scales and publishes them."""
        assert self._memory is not None
        now, before, own = self._back["state"], self._device_state, self._memory["state"]
        own["phase_ticks"][0, :_CONTROL] += (now["phase_ticks"] - before["phase_ticks"])[0, :_CONTROL]
        for name in ("span_ns", "span_ticks"):
            own[name] = now[name] - before[name]
        before[:] = now

    def _stop(self) -> bool:
        memory = self._memory
        assert memory is not None
        self._free_pages = unheld_pages(memory["state"])
        ended = self.device.wait(STOP_S)
        self._report.syncs += 1
        if ended:
            rings, counts = (self._read_back(name) for name in ("spans", "span_counts"))
            rings[0], counts[0] = memory["spans"][0], memory["span_counts"][0]  # control's, which the host ran
            self._take_last(rings, counts, resident=False)
        self._forget_mirrors()
        return ended

    def _forget_mirrors(self) -> None:
        """Drops every view of page-locked memory: the device frees it whoever still looks at it."""
        assert self._memory is not None
        for name in ("_descriptor", "_readback", "_back", "_row", "_sent_pages"):
            self.__dict__.pop(name, None)
        for name in (*DESCRIPTOR, *READBACK, "moves"):
            if name != "state":  # the host's own
                self._memory.host.pop(name, None)
