"""`xlpk doctor` on machines of all kinds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kinds
import pytest
from drive import CACHE

pytestmark = pytest.mark.heavy


def doctor(folder: Path, env: dict[str, str], code: int) -> dict[str, dict[str, str]]:
    """Findings by name."""
    (folder / "outputs").mkdir()
    (folder / "outputs" / "cache").symlink_to(CACHE)
    command = [sys.executable, "-m", "xlpk.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False, env=env)
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
