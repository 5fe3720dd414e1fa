"""What the three GPU backends have in common: the device, the cubins, the weights, and a way out for each of them.

`open` may fail or be interrupted anywhere; `close` frees what there is, in the reverse order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import BackendReport
from xlpk.backends.gpu_device import Device
from xlpk.backends.gpu_memory import GpuMemory, Session
from xlpk.backends.memory import dims_record
from xlpk.backends.power import PowerMeter, Sample
from xlpk.backends.submitter import Submitter
from xlpk.backends.upload import DeviceWeights, upload
from xlpk.errors import BackendError, InputError
from xlpk.kv import KVPlan
from xlpk.model import Model
from xlpk.settings import WEIGHT_LAYOUTS
from xlpk.toolchain import dims_defines

STOP_S = 1.0  # for the loop to leave when it is told to, beyond its own longest wait

Progress = Callable[[int, int], None]


class GpuBackend(Submitter):
    """Base of persistent, launched and graph. `source`: the file in kernels/ that holds its kernels."""

    source = ""
    _held = ("_module", "_kernel", "_patch", "_calls")  # attributes that hold objects of the context

    def __init__(
        self,
        *,
        ordinal: int = 0,
        teams: int = 0,
        spin_deadline_s: float = 2.0,
        debug_logits: bool = False,
        weight_layout: str = "rows",
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """`ordinal`: of the device. `teams`: 0: one a multiprocessor. `spin_deadline_s`: the longest wait at a barrier.
        `debug_logits`: keep the logits of slot 0 by position. `weight_layout`: rows | tiles. `progress`: of the upload.
        `options`: as of Submitter."""
        self._device: Device | None = None
        self._started = False
        super().__init__(**options)
        self._ordinal, self._teams, self._spin_deadline_s = ordinal, teams, spin_deadline_s
        if weight_layout not in WEIGHT_LAYOUTS:
            raise InputError("backend.weight_layout", weight_layout, f"one of {', '.join(WEIGHT_LAYOUTS)}")
        self._debug_logits, self._progress, self.weight_layout = debug_logits, progress, weight_layout
        self.folder: Path | None = None  # of the run: where a flight recorder is left
        self._memory: GpuMemory | None = None
        self._free_pages = 0
        self._power: PowerMeter | None = None
        self._complaint: BackendError | None = None  # what `close` has to say that nobody has said before

    @property
    def device(self) -> Device:
        assert self._device is not None, "the backend is not open"
        return self._device

    def open(self, model: Model, plan: KVPlan) -> None:
        self._device = device = Device(self._ordinal)
        from xlpk.backends import driver, gpu_module  # cannot be imported without a driver

        device.counts = self._report = BackendReport()
        self.teams = self._teams or device.multiprocessors
        defines = dims_defines(dims_record(model.config, plan), model.weights.dtype, plan.dtype, self.weight_layout)
        with device.errors("the kernels could not be loaded"):
            module = gpu_module.CachedSourceModule(self.source, self._cache, arch=device.arch, defines=defines)
        self._module = module
        retile = module.get_function("xl_retile") if self.weight_layout == "tiles" else None
        weights = upload(device, model, plan, self._progress, retile)
        times = {"spin_deadline": self._spin_deadline_s, "census": self._spin_deadline_s, **self._times()}
        session = Session(model, plan, self.limits, self.spec, self.acceptance, self.teams, times, self._debug_logits)
        self._memory = memory = self._allocate(session, weights)
        self._attach(model, plan, memory.host_params, memory.dims, memory["mailbox"])
        self._report.details |= {
            "device": device.name,
            "compute_capability": ".".join(map(str, device.compute_capability)),
            "teams": str(self.teams),
            "threads_per_team": str(layout.GPU_THREADS),
            "shared_bytes": str(memory.shared_bytes),
            "orchestration": self.orchestration,
            "compiler": module.build.compiler,
            "flags": module.build.flags,
            "library": module.build.path.name,
            "build_seconds": f"{module.build.seconds:.2f}",
            "build_cached": str(module.build.cached).lower(),
            "weight_layout": self.weight_layout,
            "upload_bytes": str(weights.nbytes),
            "upload_seconds": f"{weights.seconds:.3f}",
        }
        self._power = PowerMeter(driver.device_uuid(self._ordinal))
        self._power.start()
        self._started = True
        self._start()

    def _times(self) -> dict[str, float]:
        """Further seconds of Params, by name."""
        return {}

    def _allocate(self, session: Session, weights: DeviceWeights) -> GpuMemory:
        raise NotImplementedError

    def _start(self) -> None:
        """The session is complete: gets the kernels ready or starts the loop."""
        raise NotImplementedError

    def _function(self, name: str) -> Any:
        """A kernel that may use the session's shared memory."""
        assert self._memory is not None
        with self.device.errors(f"{name} could not be made ready"):
            function = self._module.get_function(name)
            function.set_attribute(
                self.device.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, self._memory.shared_bytes
            )
        return function

    def _arguments(self, *values: int) -> bytes:
        """A kernel's parameters: Params, then 32-bit integers."""
        assert self._memory is not None
        return self._memory.params.tobytes() + struct.pack(f"{len(values)}i", *values)

    def logits(self, count: int) -> np.ndarray[Any, Any]:
        """Logits [count, vocab_size] float32 by position, of the last request in slot 0; needs debug_logits."""
        assert self._memory is not None
        out = np.zeros((count, self._model.config.vocab_size), np.float32)
        self.device.read(out, self._memory.device["logits"])
        return out

    def _read_back(self, name: str) -> np.ndarray[Any, Any]:
        """The device's copy of a buffer."""
        assert self._memory is not None
        out = np.zeros(*self._memory.shapes[name])
        if out.size:
            self.device.read(out, self._memory.device[name])
        return out

    def power_samples(self) -> list[Sample]:
        """What the power meter saw of the session, in order; complete once it is closed."""
        return list(self._power.samples) if self._power is not None else []

    def free_pages(self) -> int:
        """Pages that no request held when the session ended."""
        return self._free_pages

    def _stop(self) -> bool:
        """Ends what runs on the device; whether it did end, so that everything can be freed."""
        raise NotImplementedError

    def close(self) -> BackendReport:
        if self._device is None:
            return self._report
        if self._power is not None:
            self._power.stop()
        stopped = False
        try:
            stopped = not self._started or self._stop()
        except (BackendError, self._device.cuda.Error):
            stopped = False
        finally:
            device, self._device = self._device, None
            lost = not stopped or device.sick() is not None
            held = {name: self.__dict__.pop(name, None) for name in self._held}
            keep, held = (held if lost else None), {}
            device.close(lost=lost, keep=keep)
        if self._complaint is not None:
            complaint, self._complaint = self._complaint, None
            raise complaint
        return self._report

    def __del__(self) -> None:
        self.close()  # frees in order; PyCUDA's own destructors would wait for a kernel that still runs
