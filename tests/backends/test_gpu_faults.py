"""What a device does to a run: each fault ends it soon, with one line that says why, exit code 4 and a FAILED run.

Through the stand-in driver, which makes the faults; a GPU does them when it likes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kinds
import pytest
from backends.test_faults import QUIET, failed, running
from backends.test_modes import only_run, xlpk

from xlpk import record
from xlpk.backends.watchdog import FLIGHT_FILE

pytestmark = pytest.mark.heavy

LONG = ("workload=synthetic", "workload.requests=40", "workload.output_len=400", "workload.prompt_len=8")
ON_GPU = pytest.mark.parametrize("kind", kinds.GPU, indirect=True)
RESIDENT = pytest.mark.parametrize("kind", ["persistent"], indirect=True)


@pytest.fixture(autouse=True)
def needs_the_standin() -> None:
    if kinds.real_driver():
        pytest.skip("these faults are the stand-in's")


def run_with(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str, *arguments: str, code: int = 4) -> str:
    """The line that the run says when this goes wrong; warm builds, so that the time is the fault's."""
    monkeypatch.setenv("XLPK_STANDIN_FAULT", fault)
    done = xlpk(folder, *QUIET, *arguments, code=code)
    (line,) = done.stderr.splitlines()
    assert line.startswith("xlpk: ")
    return line


@ON_GPU
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("launch:1", "CUDA_ERROR_LAUNCH_FAILED (719)"),
        ("sticky:1", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
    ],
)
def test_an_error_that_sticks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str, words: str
) -> None:
    line = run_with(monkeypatch, tmp_path, fault)
    assert words in line
    assert "the context is lost" in line
    status = failed(only_run(tmp_path), 4)
    assert words in str(status["error"])


@ON_GPU
def test_a_launch_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    line = run_with(monkeypatch, tmp_path, "launch_refused:1", *LONG)
    assert "launch out of resources" in line
    failed(only_run(tmp_path), 4)


@ON_GPU
def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("XLPK_STANDIN_MEMORY", "6000000")
    line = run_with(monkeypatch, tmp_path, "", code=2)
    assert "kv.budget" in line
    assert "of 5.7 MiB" in line


@RESIDENT
def test_a_team_that_never_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The census of the teams that did start gives up."""
    assert "census_timeout" in run_with(monkeypatch, tmp_path, "missing_team")
    failed(only_run(tmp_path), 4)


@RESIDENT
def test_a_kernel_that_never_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert "HANG: the persistent kernel did not start" in run_with(monkeypatch, tmp_path, "stuck")
    assert "HANG" in str(failed(only_run(tmp_path), 4)["hang"])


@RESIDENT
def test_a_loop_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The watchdog sees it, leaves the flight recorder in the run's folder, and the run ends by itself."""
    line = run_with(monkeypatch, tmp_path, "freeze:600", *LONG, "workload.requests=400")
    assert "HANG: nothing moved on the device" in line
    run = only_run(tmp_path)
    assert "HANG" in str(failed(run, 4)["hang"])
    flight = json.loads((run / FLIGHT_FILE).read_text())
    assert len(flight["teams"]) == 4
    for team in flight["teams"]:
        clocks = [clock for clock, *_ in team["entries"]]
        assert len(clocks) > 100
        assert clocks == sorted(clocks)
    phases = {phase for _, _, phase, _ in flight["teams"][0]["entries"]}
    assert {"embed", "qkv", "attend", "output", "gate_up", "down", "lm_head", "control"} <= phases


@RESIDENT
def test_a_run_that_does_not_answer_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The loop hangs and the run is stopped by a signal: the watchdog ends it, and writes why."""
    monkeypatch.setenv("XLPK_STANDIN_FAULT", "freeze:2000")
    with running(tmp_path, *QUIET) as process:
        process.send_signal(signal.SIGSTOP)
        assert process.wait(timeout=300) == -signal.SIGKILL
    give_up = time.monotonic() + 120
    run = only_run(tmp_path)
    while record.read_json(run / record.STATUS)["status"] == "RUNNING":
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert "HANG" in str(record.read_json(run / record.STATUS)["hang"])
    assert (run / FLIGHT_FILE).exists()


@RESIDENT
def test_a_killed_run_leaves_no_process(tmp_path: Path, kind: str) -> None:
    with running(tmp_path, *QUIET) as process:
        watchers = children_of(process.pid)
        assert watchers, "there is a watchdog"
        process.kill()
        process.wait()
        give_up = time.monotonic() + 120
        while any(map(alive, watchers)):
            assert time.monotonic() < give_up
            time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("backend", kinds.GPU)
def test_without_a_driver(tmp_path: Path, backend: str) -> None:
    """One line, exit code 3."""
    command = [sys.executable, "-m", "xlpk.run", f"backend={backend}", *QUIET]
    env = {**os.environ, "LD_LIBRARY_PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert "backend=cpu" in line
