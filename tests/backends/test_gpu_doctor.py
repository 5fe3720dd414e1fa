"""`xlpk doctor` on machines of all kinds."""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import kinds
import pytest
from drive import CACHE

from xlpk.doctor import _sensors, toolkit

pytestmark = pytest.mark.heavy


def doctor(folder: Path, env: dict[str, str], code: int) -> dict[str, dict[str, str]]:
    """Findings by name."""
    (folder / "outputs").mkdir()
    (folder / "outputs" / "cache").symlink_to(CACHE)
    command = [sys.executable, "-m", "xlpk.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_without_a_gpu(tmp_path: Path) -> None:
    if kinds.real_driver():
        pytest.skip("there is one")
    found = doctor(tmp_path, {**os.environ, "LD_LIBRARY_PATH": ""}, 0)
    assert found["C++ compiler"]["state"] == "ok"
    assert found["NVIDIA driver"]["state"] == "absent"
    assert found["NVIDIA driver"]["advice"]


def test_with_a_gpu(tmp_path: Path) -> None:
    with kinds.on("persistent"):
        found = doctor(tmp_path, kinds.environment(), 0)
    assert "multiprocessors" in found["device 0: compute capability"]["value"]
    for name in ("memory", "bandwidth", "link", "occupancy", "census", "mapped memory", "timer", "persistent loop"):
        assert found[f"device 0: {name}"]["state"] == "ok", found
    assert found["device 0: kernel time limit"]["value"] == "none" or found["device 0: kernel time limit"]["advice"]
    assert found["CUDA toolkit"]["state"] == "ok"
    if not kinds.real_driver():
        assert "stand-in" in found["device 0"]["value"]


@pytest.mark.parametrize(
    ("setting", "name", "words"),
    [
        (("CUDA_MODULE_LOADING", "LAZY"), "device 0: module loading", "lazy"),
        (("XLPK_STANDIN_FAULT", "missing_team"), "device 0: persistent loop", "census_timeout"),
        (("XLPK_STANDIN_FAULT", "launch:1"), "device 0: persistent loop", "launch failed"),
    ],
)
def test_what_does_not_work_is_named(tmp_path: Path, setting: tuple[str, str], name: str, words: str) -> None:
    with kinds.on("persistent"):
        if kinds.real_driver():
            pytest.skip("the faults are the stand-in's")
        found = doctor(tmp_path, kinds.environment() | dict([setting]), 1)
    assert found[name]["state"] == "broken"
    assert words in found[name]["value"]
    assert found[name]["advice"]


@pytest.mark.parametrize(
    ("release", "newest", "state"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", (13, 0), "ok"),
        ("Cuda compilation tools, release 13.3, V13.3.1", (13, 0), "ok"),
        ("Cuda compilation tools, release 12.4, V12.4.131", (13, 0), "ok"),
        ("Cuda compilation tools, release 13.0, V13.0.88", (12, 8), "broken"),
        ("a line of another form", (12, 8), "ok"),
    ],
)
def test_a_toolkit_that_is_newer_than_the_driver(release: str, newest: tuple[int, int], state: str) -> None:
    finding = toolkit(release, newest)
    assert finding.state == state
    if state == "broken":
        assert "release 13.0" in finding.value
        assert "CUDA 12.x" in finding.value
        assert "driver for CUDA 13" in finding.advice
        assert "CUDA 12 toolkit" in finding.advice


def test_sensors_are_asked_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts devices in the order of the bus, CUDA in an order of its own."""

    class Nvml(types.ModuleType):
        NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

        def nvmlInit(self) -> None: ...
        def nvmlShutdown(self) -> None: ...

        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
            return uuid

        def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
            return {"GPU-a": 1980}[handle]

        def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
            return {"GPU-a": 312_400}[handle]

        def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
            return {"GPU-a": 41}[handle]

    module = Nvml("pynvml")
    module.__spec__ = importlib.machinery.ModuleSpec("pynvml", None)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    finding = _sensors("GPU-a", "device 0")
    assert (finding.state, finding.value) == ("ok", "1980 MHz, 312 W, 41 C")
