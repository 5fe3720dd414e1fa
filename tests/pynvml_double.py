"""A double of nvidia-ml-py: device GPU-* draws 250 W at 1980 MHz and 41 C, and counts its energy by the host's clock.

Written into a folder as pynvml.py, or put into sys.modules.
"""

from __future__ import annotations

import time

NVML_CLOCK_SM = 1
NVML_TEMPERATURE_GPU = 0
WATTS = 250.0
counts_energy = True
sessions = 0  # nvmlInit less nvmlShutdown


class NVMLError(Exception):
    """As the library's."""


def nvmlInit() -> None:
    global sessions
    sessions += 1


def nvmlShutdown() -> None:
    global sessions
    sessions -= 1


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
    if not uuid.startswith("GPU-"):
        raise NVMLError("Not Found")
    return uuid


def nvmlDeviceGetPowerUsage(handle: str) -> int:
    return int(WATTS * 1e3)


def nvmlDeviceGetClockInfo(handle: str, clock: int) -> int:
    return {NVML_CLOCK_SM: 1980}[clock]


def nvmlDeviceGetTemperature(handle: str, sensor: int) -> int:
    return {NVML_TEMPERATURE_GPU: 41}[sensor]


def nvmlDeviceGetTotalEnergyConsumption(handle: str) -> int:
    if not counts_energy:
        raise NVMLError("Not Supported")
    return int(time.monotonic() * WATTS * 1e3)
