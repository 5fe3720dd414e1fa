"""A process that holds a device which it cannot free leaves with its exit code, and without the interpreter's end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LOSE = """
import atexit
from xlpk.backends import gpu_device
atexit.register(print, "the interpreter's end")
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("lost", [True, False])
def test_a_session_of_pytest(tmp_path: Path, lost: bool) -> None:
    (tmp_path / "conftest.py").write_text("from lost_device import pytest_sessionfinish, pytest_unconfigure\n")
    lose = "gpu_device._LOST.append(1)" if lost else ""
    (tmp_path / "test_it.py").write_text(f"{LOSE}{lose}\ndef test_well(): pass\ndef test_ill(): assert 0\n")
    done = python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert ("the interpreter's end" in done.stdout) is not lost


@pytest.mark.parametrize("lost", [True, False])
def test_a_command_line(tmp_path: Path, lost: bool) -> None:
    script = f"""{LOSE}
from xlpk import cli, doctor
from xlpk.errors import BackendError
def main(*_, **__):
    if {lost}: gpu_device._LOST.append(1)
    raise BackendError("the loop did not leave")
doctor.main = main
raise SystemExit(cli.main(["doctor"]))
"""
    done = python(tmp_path, "-c", script)
    assert done.returncode == 4
    assert done.stderr == "xlpk: the loop did not leave\n"
    assert ("the interpreter's end" in done.stdout) is not lost
