"""The end of a process: its exit code, its exit handlers and its output, and the collector's rest."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from xlpk.process import collector_at_rest

PROGRAM = """
import atexit, sys, threading, time, types
from xlpk.process import leave
if HEAVY:
    sys.modules["mlflow"] = types.ModuleType("mlflow")
class Slow:
    def __del__(self):
        print("taken apart")
sys.modules["held"] = Slow()
atexit.register(print, "exit handler")
if THREAD:
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
sys.stdout.write("no newline")
leave(3)
"""


def run(heavy: bool, thread: bool) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.replace("HEAVY", str(heavy)).replace("THREAD", str(thread))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


def test_leaving_skips_only_the_memory() -> None:
    done = run(heavy=True, thread=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "no newlineexit handler\n", "")


def test_leaving_light_is_the_ordinary_end() -> None:
    done = run(heavy=False, thread=False)
    assert (done.returncode, done.stdout) == (3, "no newlineexit handler\ntaken apart\n")


def test_leaving_waits_for_threads() -> None:
    done = run(heavy=True, thread=True)
    assert done.returncode == 3
    assert done.stdout.startswith("no newlinethread\nexit handler\n")


def test_leaving_with_an_output_that_is_full() -> None:
    program = PROGRAM.replace("HEAVY", "True").replace("THREAD", "False")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert "No space left" in done.stderr


def test_collector_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "newly_imported.py").write_text("KEPT = [[] for _ in range(1000)]\n")
    gc.unfreeze()
    try:
        with collector_at_rest():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0  # nothing was imported
        with collector_at_rest():
            import newly_imported  # noqa: F401
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000
        gc.disable()
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
