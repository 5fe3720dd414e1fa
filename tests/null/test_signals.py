"""Ctrl-C at the moments that no run covers: while modules are imported, while the interpreter ends, in an upload."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xlpk import cli, record, tracking

HERE = Path(__file__).parents[1]
RUN = f"""
import atexit, os, signal, sys
sys.path.insert(0, {str(HERE)!r})
def interrupt(*_): os.kill(os.getpid(), signal.SIGINT)
WHEN
import fake_run
sys.argv = ["x", "tracking=none", "sampling.max_new_tokens=4", "workload.requests=1"]
raise SystemExit(fake_run.main())
"""
IN_AN_IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "xlpk.config": interrupt()
sys.meta_path.insert(0, Finder())
"""
AT_THE_END = """
class Last:  # dies with the modules, when Python has given SIGINT back to the system
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT): kill(pid, number)
last = Last()
atexit.register(interrupt)  # registered first, so it runs last
"""


def run(cwd: Path, when: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN.replace("WHEN", when)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_in_an_import(tmp_path: Path) -> None:
    done = run(tmp_path, IN_AN_IMPORT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "xlpk: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_while_the_interpreter_ends(tmp_path: Path) -> None:
    """The run is complete by then, and its exit code stays."""
    done = run(tmp_path, AT_THE_END)
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "outputs" / "runs").glob("*/*")
    assert record.read_json(folder / record.STATUS)["status"] == "FINISHED"


def test_in_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "upload", interrupted)
    (tmp_path / record.STATUS).write_text("{}")
    assert cli.main(["upload", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "xlpk: interrupted\n"
