"""What is shown while a sweep runs, from point folders that a test writes."""

from __future__ import annotations

import csv
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from test_run import FAKE, SHORT

from xlpk import progress, record, sweep_folder
from xlpk.errors import InputError
from xlpk.progress import Watch, clock


def write(sweep: Path, number: int, status: str, session: int = 1, **values: Any) -> Path:
    folder = sweep / str(number)
    folder.mkdir(exist_ok=True)
    record.write_json(folder / record.METRICS, {"throughput/tokens_per_s": 100.0 + number})
    facts = {"session": session, "overrides": [f"spec.block={number}"], "name": f"spec.block={number}", **values}
    record.write_status(folder, status, None if status == "RUNNING" else 0, **facts)
    return folder


def test_a_line_a_point_and_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    watch = Watch(tmp_path, 4, apart=True, session=1, silent=True)
    write(tmp_path, 0, "FINISHED")
    write(tmp_path, 1, "RUNNING")
    now_s += 10.0
    watch.step()
    assert capsys.readouterr().out == "[1/4] 0: spec.block=0: FINISHED, 100.0 tokens/s (ETA 0:30)\n"
    watch.step()
    assert capsys.readouterr().out == ""  # nothing new
    write(tmp_path, 1, "FAILED", error="scripted", traceback="Traceback: scripted")
    watch.step()
    shown = capsys.readouterr()
    assert shown.out == "[2/4] 1: spec.block=1: FAILED (ETA 0:10)\n"
    assert shown.err == "xlpk: spec.block=1: scripted (folder: 1)\nTraceback: scripted\n"
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["FINISHED", "FAILED"]


def test_points_of_an_earlier_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They count when the resumed sweep has passed them, and tell nothing of its pace."""
    folder = write(tmp_path, 0, "FINISHED")
    write(tmp_path, 1, "FAILED")
    watch = Watch(tmp_path, 3, apart=True, session=2, silent=False)
    assert watch.eta_s(watch.step()) is None
    record.write_json(
        folder / record.STATUS, {**record.read_json(folder / record.STATUS), "session": 2, "skipped": True}
    )
    assert watch.eta_s(watch.step()) is None
    assert capsys.readouterr().out == "[1/3] 0: spec.block=0: finished before, skipped\n"


def test_sweep_csv_is_not_rewritten_all_the_time(tmp_path: Path) -> None:
    """At most a twentieth of the time goes into it; the end writes it whatever it costs."""
    watch = Watch(tmp_path, 2, apart=False, session=1, silent=False)
    write(tmp_path, 0, "FINISHED")
    watch.step()
    watch.csv_s = (watch.csv_s[0], 1000.0)  # as if it had taken that long
    write(tmp_path, 1, "FINISHED")
    watch.step()
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 2
    watch.stop()
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 3


def test_a_thread_looks_where_points_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK_S", 0.01)
    watch = Watch(tmp_path, 1, apart=True, session=1, silent=False)
    watch.start()
    write(tmp_path, 0, "FINISHED")
    deadline_s = time.monotonic() + 120
    while not watch.told and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert watch.told == {tmp_path / "0"}
    watch.stop()


@pytest.mark.heavy
def test_the_table_on_a_terminal(tmp_path: Path) -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    command = [sys.executable, str(FAKE), "-m", *SHORT, "spec.block=1,0,2"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=side, stderr=side) as process:
        os.close(side)
        shown = b""
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not piece:
                break
            shown += piece
    assert process.returncode == 2
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    pictures = text.split("point         ")
    last = next(picture for picture in reversed(pictures) if "3/3 points, 1 failed" in picture)
    assert re.search(r"1: spec\.block=0\s+REFUSED", last)
    assert re.search(r"2: spec\.block=2\s+FINISHED\s+[0-9.]+", last)
    assert "RUNNING" in text
    assert "[1/3]" not in text  # lines are for files


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.4, 61, 3600, 36610)] == ["0:00", "0:59", "1:01", "1:00:00", "10:10:10"]


def test_a_dead_process_is_found(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    write(tmp_path, 0, "RUNNING", pid=int(gone.stdout))
    write(tmp_path, 1, "RUNNING", pid=os.getpid())
    write(tmp_path, 2, "RUNNING", pid=int(gone.stdout), host="elsewhere")
    os.utime(write(tmp_path, 3, "RUNNING", pid=1, host="elsewhere") / record.STATUS, (0, 0))
    sweep_folder.bury(tmp_path)
    found = [record.read_json(point / record.STATUS) for point in sweep_folder.points_of(tmp_path)]
    assert [one["status"] for one in found] == ["FAILED", "RUNNING", "RUNNING", "FAILED"]
    assert found[0]["error"] == "its process died without a word"


def test_a_sweep_that_runs_is_not_started_again(tmp_path: Path) -> None:
    held = sweep_folder.hold(tmp_path)
    with pytest.raises(InputError, match="no other process is running now"):
        sweep_folder.hold(tmp_path)
    held.close()
    sweep_folder.hold(tmp_path).close()


def test_the_key_of_a_config() -> None:
    """What a point measures, and not where its results go or how it is started."""
    config = {
        "spec": {"block": 4},
        "tracking": {"name": "none"},
        "run": {"repetition": 1, "outputs": "a", "sweep": None},
    }
    same = {
        "run": {"outputs": "b", "resume": True, "repetition": 1},
        "spec": {"block": 4},
        "tracking": {"name": "mlflow"},
    }
    assert sweep_folder.config_key(config) == sweep_folder.config_key(same)
    for other in (
        {**config, "spec": {"block": 5}},
        {**config, "run": {"repetition": 2}},
        {**config, "run": {"repetition": 1, "warmup_steps": 4}},
    ):
        assert sweep_folder.config_key(other) != sweep_folder.config_key(config)


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/etc", "a b", "x/", ".hidden", "a\n"])
def test_names_that_are_no_sweeps(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"run\.sweep="):
        sweep_folder.named(tmp_path, name)


def test_names_of_sweeps(tmp_path: Path) -> None:
    for name in ("grid", "2026-11-24/12-00-00-ab12", "a.b_c+d"):
        assert sweep_folder.named(tmp_path, name) == tmp_path / "sweeps" / name
