"""Sweeps from the command line: repetitions, resuming, what fails, what MLflow gets and when."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_run import FAKE, SHORT, call

from xlpk import cli, record, sweep_folder, tracking
from xlpk.settings import MlflowTracking


def statuses(sweep: Path) -> list[dict[str, Any]]:
    return [record.read_json(point / record.STATUS) for point in sweep_folder.points_of(sweep)]


def only_sweep(cwd: Path) -> Path:
    (folder,) = (cwd / "outputs" / "sweeps").glob("*/*")
    return folder


def test_repeats_are_interleaved(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", *SHORT, "experiment=block_sweep", "spec.block=1,2", "run.repeat=2")
    assert done.returncode == 0, done.stderr
    found = statuses(only_sweep(tmp_path))
    assert [(one["overrides"][-1], one["overrides"].count("spec.block=1"), one["repetition"]) for one in found] == [
        ("run.repeat=2", 1, 0),
        ("run.repeat=2", 0, 0),
        ("run.repeat=2", 1, 1),
        ("run.repeat=2", 0, 1),
    ]
    assert found[0]["overrides"] == found[2]["overrides"] != found[1]["overrides"] == found[3]["overrides"]
    assert [one["started_unix_s"] for one in found] == sorted(one["started_unix_s"] for one in found)
    assert [one["name"] for one in found][1:3] == ["spec.block=2 #0", "spec.block=1 #1"]
    rows = list(csv.DictReader((only_sweep(tmp_path) / "sweep.csv").open()))
    assert [(row["repetition"], row["spec.block"]) for row in rows] == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    table = done.stdout.split("\n\n")[1].splitlines()
    speeds = [float(row["throughput/tokens_per_s"]) for row in rows]
    assert [line.split()[:3] for line in table[1:]] == [  # medians of two
        ["spec.block=1", "2", f"{(speeds[0] + speeds[2]) / 2:.1f}"],
        ["spec.block=2", "2", f"{(speeds[1] + speeds[3]) / 2:.1f}"],
    ]


@pytest.mark.heavy
def test_a_single_run_repeated_is_a_sweep(tmp_path: Path) -> None:
    done = call(tmp_path, *SHORT, "run.repeat=3")
    assert done.returncode == 0, done.stderr
    assert [place.name for place in (tmp_path / "outputs").iterdir()] == ["sweeps"]
    found = statuses(only_sweep(tmp_path))
    assert [one["repetition"] for one in found] == [0, 1, 2]
    assert len({tuple(one["overrides"]) for one in found}) == 1


def test_resuming(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "sweeps" / "grid"
    grid = ("-m", *SHORT, "run.sweep=grid", "mode=serial_decode,speculative_decode")
    assert call(tmp_path, "--interrupt", "12", *grid).returncode == 130
    assert [one["status"] for one in statuses(sweep)] == ["FAILED"]
    done = call(tmp_path, *grid)  # a second sweep in the same place is a mistake
    assert done.returncode == 2
    assert "run.sweep=grid: a new sweep, or run.resume=true" in done.stderr
    done = call(tmp_path, *grid, "run.resume=true")
    assert done.returncode == 0, done.stderr
    first = statuses(sweep)
    assert [one["status"] for one in first] == ["FINISHED"] * 2
    assert not any("error" in one for one in first)

    # A wider grid: what is finished is known by its config, whatever its number is now.
    grid = ("-m", *SHORT, "run.sweep=grid", "mode=serial_decode,forced_rejection,speculative_decode")
    done = call(tmp_path, *grid, "run.resume=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, skipped") == 2
    second = statuses(sweep)
    assert [one["mode"] for one in second] == ["serial_decode", "speculative_decode", "forced_rejection"]
    assert [one["ended_unix_s"] for one in second[:2]] == [one["ended_unix_s"] for one in first]
    assert len(done.stdout.split("\n\n")[1].splitlines()) == 4  # the table shows them all


@pytest.mark.heavy
def test_the_last_sweep_of_the_same_words_is_resumed(tmp_path: Path) -> None:
    assert call(tmp_path, "-m", *SHORT, "spec.block=0,2").returncode == 2
    done = call(tmp_path, "-m", "spec.block=0,2", *SHORT, "run.resume=true")
    assert done.returncode == 2
    assert "run.resume: outputs/sweeps/" in done.stderr
    assert "1 finished points of 2" in done.stderr
    assert len(statuses(only_sweep(tmp_path))) == 2
    name = f"run.sweep={only_sweep(tmp_path).relative_to(tmp_path / 'outputs' / 'sweeps')}"
    done = call(tmp_path, "-m", "spec.block=0,2", *SHORT, name, "run.resume=true", "sampling.seed=7")
    assert "skipped" not in done.stdout  # another config under the same words is another point
    assert len(statuses(only_sweep(tmp_path))) == 4
    done = call(tmp_path, "-m", *SHORT, "spec.block=1,3", "run.resume=true")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "run.resume=true: a sweep of these overrides" in done.stderr


def test_each_failure_is_told_at_once_and_listed_at_the_end(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(FAKE.parent)!r}); import fake_run, fake_backend\n"
        "poll = fake_backend.FakeBackend.poll\n"
        "def broken(self):\n"
        "    if getattr(self.spec, 'block', 0) == 2 and self.step > 5: raise ZeroDivisionError('scripted bug')\n"
        "    return poll(self)\n"
        "fake_backend.FakeBackend.poll = broken\n"
        f"sys.argv = ['x', '-m', *{SHORT!r}, 'spec.block=2,0,4']\n"
        "raise SystemExit(fake_run.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # of the first failure
    assert [one["status"] for one in statuses(only_sweep(tmp_path))] == ["FAILED", "REFUSED", "FINISHED"]
    lines = done.stderr.splitlines()
    assert lines[0].startswith("xlpk: ZeroDivisionError: scripted bug")
    assert lines[1].startswith("Traceback")
    assert lines[-1].startswith("xlpk: spec.block=0: 1 to 16")
    failures = done.stdout.split("\n\n")[2].splitlines()
    assert failures[0] == "0: spec.block=2: FAILED: ZeroDivisionError: scripted bug"
    assert failures[1].startswith("1: spec.block=0: REFUSED: spec.block=0: 1 to 16")
    assert "scripted bug" in statuses(only_sweep(tmp_path))[0]["traceback"]


def test_nothing_of_mlflow_within_a_measurement(tmp_path: Path) -> None:
    """In a sweep of three points every call of a client lies outside of each event log's first and last line."""
    code = f"""
import json, sys, threading, time, types
sys.path.insert(0, {str(FAKE.parent)!r})
import fake_run, fake_backend
from xlpk import tracking
calls, running = [], []
class Client:
    def __init__(self, tracking_uri): pass
    def __getattr__(self, name):
        def call(*args, **values):
            calls.append((name, time.monotonic_ns()))
            if name == "search_runs": return []
            info = types.SimpleNamespace(run_id="r", lifecycle_stage="active")
            return types.SimpleNamespace(experiment_id="1", info=info)
        return call
def install():
    calls.append(("import", time.monotonic_ns()))
    module = types.ModuleType("mlflow.tracking"); module.MlflowClient = Client
    entities = types.ModuleType("mlflow.entities")
    entities.Metric = entities.Param = lambda *values: values
    sys.modules.update({{"mlflow": types.ModuleType("mlflow"), "mlflow.tracking": module, "mlflow.entities": entities}})
tracking._import_mlflow = install
poll = fake_backend.FakeBackend.poll
def watched(self):
    running.extend(thread.name for thread in threading.enumerate() if thread.name == "mlflow")
    return poll(self)
fake_backend.FakeBackend.poll = watched
typed = ["sampling.max_new_tokens=12", "spec.block=1,2,4", "tracking.uri=http://nowhere", "run.report=false"]
sys.argv = ["x", "-m", *typed]
code = fake_run.main()
print(json.dumps([code, calls, running]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    exit_code, calls, running = json.loads(done.stdout.splitlines()[-1])
    assert (exit_code, running) == (0, [])
    assert [name for name, _ in calls].count("create_run") == 4  # three points and their parent
    assert [name for name, _ in calls].count("set_terminated") == 4
    windows = []
    for point in sweep_folder.points_of(only_sweep(tmp_path)):
        log = [json.loads(line) for line in (point / record.EVENTS).read_text().splitlines()]
        assert (log[0]["event"], log[-1]["event"]) == ("header", "end")
        windows.append((log[0]["host_ns"], log[-1]["host_ns"]))
    assert len(windows) == 3
    assert not [name for name, at_ns in calls for begin_ns, end_ns in windows if begin_ns <= at_ns <= end_ns]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep of three points, one of which failed, and its store."""
    cwd = tmp_path_factory.mktemp("logged")
    overrides = ["sampling.max_new_tokens=12", "mode=serial_decode,forced_rejection", "run.repeat=2"]
    done = call(cwd, "-m", *overrides, "run.report=false")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return cwd


def runs(cwd: Path) -> tuple[Any, Any, list[Any]]:
    """The client, the only parent and its children in order."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'outputs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("xlpk")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    (parent,) = (run for run in found if run.data.tags["kind"] == "sweep")
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    return client, parent, children


def test_parent_and_children(logged: Path) -> None:
    client, parent, children = runs(logged)
    sweep = only_sweep(logged)
    about = sweep_folder.read(sweep)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "sweep sampling.max_new_tokens=12 mode=serial_decode,forced_rejection run.repeat=2"
    assert parent.data.metrics == {"sweep/points": 4, "sweep/finished": 4, "sweep/failed": 0}
    wanted = {"sweep_id": about["id"], "sweep_uid": about["uid"], "swept": "mode", "points": "4", "repeat": "2"}
    assert wanted.items() <= parent.data.tags.items()
    assert "mode=forced_rejection" in parent.data.tags["mlflow.note.content"]
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "sweep.csv",
        "sweep.json",
        "multirun.yaml",
    }
    assert [(run.info.status, run.info.run_name) for run in children] == [
        ("FINISHED", "mode=serial_decode #0"),
        ("FINISHED", "mode=forced_rejection #0"),
        ("FINISHED", "mode=serial_decode #1"),
        ("FINISHED", "mode=forced_rejection #1"),
    ]
    last = children[3].data.tags
    tags = {
        "kind": "point",
        "sweep_id": about["id"],
        "point": "3",
        "repetition": "1",
        "mode": "forced_rejection",
        "backend": "cpu",
        "model": "tiny",
        "swept.mode": "forced_rejection",
    }
    assert tags.items() <= last.items()


def test_upload_repairs_a_sweep(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after kill -9: a child that was being written, one that is missing, a parent without an end."""
    monkeypatch.chdir(logged)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client, parent, children = runs(logged)
    client.update_run(children[1].info.run_id, status="RUNNING")
    client.delete_run(children[2].info.run_id)
    client.update_run(parent.info.run_id, status="RUNNING")
    assert tracking.upload(only_sweep(logged), MlflowTracking(), logged / "outputs") == parent.info.run_id
    _, again, repaired = runs(logged)
    assert again.info.status == "FINISHED"
    assert [run.info.run_name for run in repaired] == [run.info.run_name for run in children]
    assert [run.data.metrics for run in repaired] == [run.data.metrics for run in children]
    kept = [old.info.run_id == new.info.run_id for old, new in zip(children, repaired, strict=True)]
    assert kept == [True, False, False, True]
    client.delete_run(parent.info.run_id)  # somebody cleared the list in the UI
    for run in repaired:
        client.delete_run(run.info.run_id)
    assert cli.main(["upload", str(only_sweep(logged))]) == 0
    assert runs(logged)[1].info.run_id != parent.info.run_id
    assert [run.info.run_name for run in runs(logged)[2]] == [run.info.run_name for run in children]


@pytest.mark.heavy
def test_a_dead_server_is_complained_of_once(tmp_path: Path) -> None:
    overrides = ["sampling.max_new_tokens=8", "spec.block=1,2,4", "tracking.uri=http://127.0.0.1:9", "run.report=false"]
    done = call(tmp_path, "-m", *overrides)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    upload = f"upload {only_sweep(tmp_path).relative_to(tmp_path)}"
    assert line.startswith("xlpk: not logged to MLflow at http://127.0.0.1:9")
    assert line.endswith(upload)
    assert "MLflow has not got all of it: " in done.stdout
    assert done.stdout.count(upload) == 1
    assert [one["status"] for one in statuses(only_sweep(tmp_path))] == ["FINISHED"] * 3
