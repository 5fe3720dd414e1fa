"""`xlpk ui`: what it refuses, which port it takes, and (heavy) a real server that comes up and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from xlpk import cli, ui
from xlpk.errors import InputError


@contextlib.contextmanager
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def make_store(path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table experiments (experiment_id integer)")
        connection.commit()
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["ui", *arguments]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    (line,) = seen.err.splitlines()
    return line


def test_stores_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    absent = refused(capsys, "--outputs", str(tmp_path))
    assert f"sqlite:///{tmp_path}/mlflow.db" in absent
    assert "python -m xlpk.run" in absent
    junk = tmp_path / "junk.db"
    junk.write_text("no database")
    assert "has none of its tables" in refused(capsys, "--store", str(junk))
    assert "has none of its tables" in refused(capsys, "--store", str(tmp_path))
    assert "a database" in refused(capsys, "--store", "file:///tmp/mlruns")
    assert sorted(tmp_path.iterdir()) == [junk]


def test_a_store_is_a_file_or_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "mlflow.db")
    expected = f"sqlite:///{store}"
    assert ui.checked_store(str(store)) == ui.checked_store(expected) == expected
    monkeypatch.chdir(tmp_path)
    assert ui.checked_store("mlflow.db") == ui.checked_store("sqlite:///mlflow.db") == expected
    assert ui.checked_store("postgresql+psycopg2://user@host/runs").startswith("postgresql+")


@pytest.mark.parametrize("typed", [["uy"], ["ui", "--prot", "1"], ["ui", "--port", "x"], []])
def test_a_command_line_is_refused_in_one_line(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(typed)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xlpk")
    assert "--help" in line


def test_it_opens_on_the_newest_runs(tmp_path: Path) -> None:
    store = make_store(tmp_path / "mlflow.db")
    assert ui.landing(f"sqlite:///{store}") == ""  # no table of runs
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("create table runs (experiment_id integer, start_time integer)")
        connection.executemany("insert into runs values (?, ?)", [(1, 30), (7, 50), (2, 40)])
        connection.commit()
    assert ui.landing(f"sqlite:///{store}") == "/#/experiments/7/runs"
    assert ui.landing("postgresql://host/runs") == ""


def test_a_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", "--store", "http://host:5000"]) == 0
    assert "open http://host:5000" in capsys.readouterr().out


def test_a_password_is_not_shown() -> None:
    assert ui.without_password("postgresql://me:secret@host/runs") == "postgresql://me:***@host/runs"
    assert ui.without_password("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(make_store(tmp_path / "mlflow.db"))
    with busy_port() as taken:
        assert "no program listens on" in refused(capsys, "--store", store, "--port", str(taken))
        monkeypatch.setattr(ui, "DEFAULT_PORT", taken)
        found = ui.free_port("127.0.0.1", None)
        assert taken < found < taken + ui.TRIED_PORTS
        monkeypatch.setattr(ui, "TRIED_PORTS", 1)
        with pytest.raises(InputError, match="all busy"):
            ui.free_port("127.0.0.1", None)
    assert "1 to 65535" in refused(capsys, "--store", store, "--port", "65536")
    assert "an address" in refused(capsys, "--store", store, "--host", "no.such.host.invalid")
    assert "an address of this machine" in refused(capsys, "--store", store, "--host", "192.0.2.1")


def state_of(pid: int) -> tuple[str, int]:
    """(state, parent); a process that is gone is a zombie of nobody."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "Z", 0
    return state, int(parent)


def descendants(pid: int) -> list[int]:
    parents = {int(place.name): state_of(int(place.name))[1] for place in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_server_comes_and_goes(tmp_path: Path, number: signal.Signals) -> None:
    from mlflow.tracking import MlflowClient

    store = tmp_path / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{store}").create_experiment("seen", artifact_location=tmp_path.as_uri())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    process = subprocess.Popen(
        [sys.executable, "-m", "xlpk.cli", "ui", "--outputs", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "MLflow UI: http://127.0.0.1:" in line, process.communicate()
    url = line.split()[2]
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/experiments/search",
        b'{"max_results": 10}',
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        assert b'"seen"' in answer.read()
    processes = descendants(process.pid)
    assert 1 <= len(processes) <= 2
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, "")
    assert err.splitlines() == [f"starting MLflow on sqlite:///{store}"]
    give_up = time.monotonic() + 60
    while {state_of(pid)[0] for pid in processes} != {"Z"}:
        assert time.monotonic() < give_up, "a process of the server is left"
        time.sleep(0.01)
    assert [place.name for place in tmp_path.iterdir()] == ["mlflow.db"]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


@pytest.mark.heavy
def test_a_server_that_does_not_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "mlflow.db")  # one table, and none of MLflow's versions
    assert cli.main(["ui", "--store", str(store)]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the MLflow server did not start (exit code " in line
