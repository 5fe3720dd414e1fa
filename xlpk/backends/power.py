"""Power, SM clock and temperature of a GPU while a session runs, by NVIDIA's management library, in a thread.

The thread asks ten times a second and touches neither the context nor the stream. Without nvidia-ml-py, or where the
library refuses, there is no sample: a run never fails for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from typing import Any

INTERVAL_S = 0.1
Sample = dict[str, float]


class PowerMeter:
    """Samples from `start` to `stop`: each with host_ns, power_w, sm_clock_mhz, temperature_c, and, where the device
    counts its energy, energy_j since the driver was loaded."""

    def __init__(self, uuid: str) -> None:
        """`uuid`: of the device, as CUDA and the management library both call it."""
        self.samples: list[Sample] = []
        self._uuid = uuid
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Before the loop runs: what takes long, import and initialisation, is not done beside it."""
        if importlib.util.find_spec("pynvml") is None:
            return
        with contextlib.suppress(Exception):  # the library's errors have no common base before it is imported
            import pynvml

            pynvml.nvmlInit()
            self._thread = threading.Thread(target=self._run, args=(pynvml,), name="xlpk power", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Idempotent. A call of the library that does not return is left alone: the thread is a daemon."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(1.0)
            self._thread = None

    def _run(self, nvml: Any) -> None:
        with contextlib.suppress(Exception):
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
                self.samples.append(_sample(nvml, handle))
                while not self._over.wait(INTERVAL_S):
                    self.samples.append(_sample(nvml, handle))
                self.samples.append(_sample(nvml, handle))
            finally:
                nvml.nvmlShutdown()


def _sample(nvml: Any, handle: Any) -> Sample:
    out = {
        "host_ns": time.monotonic_ns(),
        "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    }
    with contextlib.suppress(nvml.NVMLError):
        out["energy_j"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    return out
