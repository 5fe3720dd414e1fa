"""A 2x2 grid through each launcher to a real MLflow server; many writers on one fresh sqlite store."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_standin
from drive import CACHE

from xlpk import record, sweep_folder
from xlpk.launchers import EXTRAS

pytestmark = pytest.mark.heavy

GRID = ("mode=serial_decode,speculative_decode", "sampling.seed=1,2")
SHORT = ("sampling.max_new_tokens=8", "workload.requests=1", "backend.threads=1")
LAUNCHERS = {
    "basic": "",
    "joblib_cores": "joblib",
    "submitit_local": "submitit",
    "ray_cluster": "ray",
    "slurm": "submitit",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow server` on a sqlite store of its own."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        else:
            raise AssertionError((folder / "log").read_text())
        yield address
    finally:
        process.terminate()
        process.wait(120)


def share_builds(cwd: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    (cwd / "outputs").mkdir()
    (cwd / "outputs" / "cache").symlink_to(CACHE)


def sweep(cwd: Path, *arguments: str, path: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "HYDRA", "RAY"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")]))
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    share_builds(cwd)
    command = [sys.executable, "-m", "xlpk.run", "-m", *SHORT, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return list(client(uri).search_runs([found.experiment_id], order_by=["attributes.start_time"]))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_grid_through_each_launcher(tmp_path: Path, server: str, launcher: str) -> None:
    extra = LAUNCHERS[launcher]
    module = next((name for name, one in EXTRAS.items() if one == extra), None)
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"the extra `{extra}` is not installed")
    slurm_standin.install(tmp_path / "bin")
    work = tmp_path / "work"
    work.mkdir()
    options = (f"hydra/launcher={launcher}", f"tracking.uri={server}", f"tracking.experiment={launcher}")
    done = sweep(work, *GRID, *options, path=tmp_path / "bin")
    (folder,) = (work / "outputs" / "sweeps").glob("*/*")
    statuses = [record.read_json(point / record.STATUS) for point in sweep_folder.points_of(folder)]
    assert [one["status"] for one in statuses] == ["FINISHED"] * 4
    pids = {one["pid"] for one in statuses}
    assert len(pids) == 1 if launcher == "basic" else len(pids) > 1 or launcher in ("joblib_cores", "ray_cluster")
    assert done.stdout.splitlines()[0].startswith("[1/4]")
    texts = {(point / record.TEXT).read_text() for point in sweep_folder.points_of(folder)}
    assert len(texts) == 1  # greedy, and lossless
    found = runs(server, launcher)
    (parent,) = (run for run in found if run.data.tags["kind"] == "sweep")
    assert parent.info.status == "FINISHED"
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted((run.data.tags["swept.mode"], run.data.tags["swept.sampling.seed"]) for run in children) == [
        ("serial_decode", "1"),
        ("serial_decode", "2"),
        ("speculative_decode", "1"),
        ("speculative_decode", "2"),
    ]
    assert {run.info.status for run in children} == {"FINISHED"}
    artifacts = {item.path for item in client(server).list_artifacts(parent.info.run_id, "report")}
    assert {"report/report.html", "report/report.md"} <= artifacts


def test_eight_jobs_on_a_fresh_sqlite_store(tmp_path: Path) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        pytest.skip("the extra `joblib` is not installed")
    done = sweep(tmp_path, "sampling.seed=range(8)", "hydra/launcher=joblib", "hydra.launcher.n_jobs=8")
    assert "hydra.launcher.n_jobs=8" in done.stderr  # they share cores, which it says
    assert "not logged" not in done.stderr
    found = runs(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}", "xlpk")
    assert [run.info.status for run in found] == ["FINISHED"] * 9
    assert [run.data.tags["kind"] for run in found].count("sweep") == 1


def test_eight_processes_on_a_fresh_sqlite_store(tmp_path: Path) -> None:
    """Not of one sweep: eight users of one folder."""
    share_builds(tmp_path)
    command = [sys.executable, "-m", "xlpk.run", *SHORT]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "HYDRA"))}
    started = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(8)
    ]
    for process in started:
        _, complaints = process.communicate(timeout=300)
        assert (process.returncode, complaints) == (0, b"")
    found = runs(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}", "xlpk")
    assert [run.info.status for run in found] == ["FINISHED"] * 8
