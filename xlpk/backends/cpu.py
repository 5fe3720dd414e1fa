"""The CPU backend: the kernels as a shared library whose threads play the teams.

`persistent`: the threads run the resident loop; the host only submits and drains rings. `launched`: the host runs
control and launches the phases of a step one by one, as it would on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import BackendReport, Event
from xlpk.backends.library import CpuLibrary, usable_cores
from xlpk.backends.memory import WEIGHT_TYPES, HostMemory, host_memory, unheld_pages
from xlpk.backends.submitter import Submitter
from xlpk.errors import BackendError, InputError
from xlpk.kv import KVPlan
from xlpk.model import Model
from xlpk.units import format_bytes

__all__ = ["CpuBackend", "CpuLibrary", "usable_cores"]


class CpuBackend(Submitter):
    """Implements xlpk.backend.Backend."""

    name = "cpu"

    def __init__(
        self,
        *,
        threads: int = 0,
        orchestration: str = "persistent",
        spin_deadline_s: float = 20.0,
        lease_s: float = 0.0,
        debug_logits: bool = False,
        **options: Any,
    ) -> None:
        """`threads`: teams; 0: one a core. `lease_s`: the loop leaves and is entered again after this long; 0: never.
        `debug_logits`: keep the logits of slot 0 by position (see `logits`). `options`: as of Submitter."""
        self._session: int | None = None
        super().__init__(**options)
        if orchestration not in ("persistent", "launched"):
            raise InputError("backend.orchestration", orchestration, "one of persistent, launched")
        self.orchestration = orchestration
        self.threads = threads or usable_cores()
        # A loop's own thread would cost a core that computes; the host's thread has nothing else to do meanwhile.
        self._planner_team = self.planner == "team" and orchestration == "persistent"
        self._beside = orchestration == "launched" and self.planner != "inline"
        self._spin_deadline_s, self._lease_s = spin_deadline_s, lease_s
        self._debug_logits = debug_logits
        self._memory: HostMemory | None = None

    def open(self, model: Model, plan: KVPlan) -> None:
        dll = self.library.dll
        teams = self.threads + self._planner_team
        try:
            memory = host_memory(
                model,
                plan,
                self.limits,
                self.spec,
                self.acceptance,
                teams=teams,
                warps=max(1, dll.xl_threads_per_team() // 2),
                spin_deadline_s=self._spin_deadline_s,
                lease_s=self._lease_s,
                logits=self._debug_logits,
            )
        except MemoryError:
            size = format_bytes(plan.total_bytes)
            raise InputError("kv.budget", size, "what this machine can allocate beside the model's buffers") from None
        memory.params["planner"] = self._planner_team
        self._memory = memory
        self._attach(model, plan, memory.params, memory.dims, memory["mailbox"])
        self._phases = layout.phase_sequence(model.config.num_hidden_layers)
        session = dll.xl_open(
            memory.params.ctypes.data,
            memory.dims.ctypes.data,
            int(WEIGHT_TYPES[model.weights.dtype]),
            int(WEIGHT_TYPES[plan.dtype]),
            teams,
            int(self.orchestration == "persistent"),
        )
        if not session:
            refusal = dll.xl_refusal()
            raise BackendError(refusal.decode() if refusal else "the threads of the loop could not be started")
        self._session = session
        build = self.library.build
        self._report = BackendReport(
            launches=1 if self.orchestration == "persistent" else 0,
            clock_error_ns=self.library.clock_error_ns(),
            details={
                "device": "cpu",
                "threads": str(teams * dll.xl_threads_per_team()),
                "orchestration": self.orchestration,
                "planner": "team" if self._planner_team else "host" if self._beside else "inline",
                "compiler": build.compiler,
                "flags": build.flags,
                "library": build.path.name,
                "build_seconds": f"{build.seconds:.2f}",
                "build_cached": str(build.cached).lower(),
            },
        )

    def clock_ns(self) -> int:
        """The device clock."""
        return int(self.library.dll.xl_clock_ns())

    def _take_cancellations(self) -> None:
        if self.orchestration == "launched":
            self._run_step()  # whole: control plans a step, which must run before the next one

    def poll(self) -> list[Event]:
        if self.orchestration == "launched" and not self._aborted():
            self._run_step()
        events = self._drain()
        if not events:  # what the loop published before it died comes first
            self._raise_if_aborted()
        return events

    def _run_step(self) -> None:
        dll, session, report = self.library.dll, self._session, self._report
        if dll.xl_control(self._params, self._dims) == 0:
            return
        assert self._memory is not None
        step = self._memory["step"][0]
        left_out = {phase for phase, field in layout.OPTIONAL.items() if not step[field]}
        for phase, layer in self._phases:
            if phase not in left_out:
                dll.xl_launch(session, phase, layer)
                report.launches += 1
        if self._beside:
            dll.xl_prepare(self._params, self._dims)
        dll.xl_synchronize(session)
        report.syncs += 1

    def logits(self, count: int) -> np.ndarray[Any, Any]:
        """Logits [count, vocab_size] float32 by position, of the last request in slot 0; needs debug_logits."""
        assert self._memory is not None
        return self._memory["logits"][:count].copy()

    def free_pages(self) -> int:
        """Pages that no request holds; exact once the loop is closed or idle."""
        assert self._memory is not None
        return unheld_pages(self._memory["state"])

    def __del__(self) -> None:
        self.close()  # threads must not outlive the buffers that they use

    def close(self) -> BackendReport:
        if self._session is not None:
            self.library.dll.xl_close(self._session)
            self._session = None
            self._report.syncs += 1
            assert self._memory is not None
            resident = self.orchestration == "persistent"
            self._take_last(self._memory["spans"], self._memory["span_counts"], resident=resident)
            if resident:
                self._report.launches = max(1, int(self._memory["state"]["n_launches"][0]))
        return self._report
