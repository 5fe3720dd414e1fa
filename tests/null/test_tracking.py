"""MLflow read back through its own client; servers that are dead or silent; the same run again by upload."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xlpk import mlflow_fields, record, tracking
from xlpk.settings import MlflowTracking

FAKE = Path(__file__).parents[1] / "fake_run.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUTS with one run that was not tracked; copied by each test."""
    return _outputs(tmp_path_factory.mktemp("finished"), 0)


def _outputs(cwd: Path, code: int, *arguments: str) -> Path:
    command = [
        sys.executable,
        str(FAKE),
        *arguments,
        "tracking=none",
        "mode=forced_rejection",
        "sampling.max_new_tokens=300",
        "model.max_len=500",
        "spec.block=2",
    ]
    assert subprocess.run(command, cwd=cwd, capture_output=True, check=False).returncode == code
    return cwd / "outputs"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store of today's schema: copying it takes a tenth of the time of making one."""
    folder = tmp_path_factory.mktemp("template")
    tracking._import_mlflow()
    client(folder).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def outputs(finished: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "outputs")
    shutil.copy(template, tmp_path / "outputs" / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking._silent.clear()
    return tmp_path / "outputs"


def run_of(outputs: Path) -> Path:
    (folder,) = (outputs / "runs").glob("*/*")
    return folder


def client(outputs: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{outputs / 'mlflow.db'}")


def logged(outputs: Path) -> list[Any]:
    store = client(outputs)
    experiment = store.get_experiment_by_name("xlpk")
    assert experiment.artifact_location == (outputs / "artifacts").as_uri()
    return list(store.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))


def test_read_back(outputs: Path, tmp_path: Path) -> None:
    folder = run_of(outputs)
    assert tracking.mirror(folder, MlflowTracking(), outputs) is None
    (run,) = logged(outputs)
    status, values = record.read_json(folder / "status.json"), record.read_json(folder / "metrics.json")
    assert run.info.status == "FINISHED"
    assert run.info.start_time == int(status["started_unix_s"] * 1000)
    assert run.info.end_time == int(status["ended_unix_s"] * 1000)
    wanted = {
        "mode.name": "forced_rejection",
        "spec.name": "oracle",
        "spec.block": "2",
        "spec.effective_block": "2",
        "spec.mismatch_stride": "4",
        "spec.num_speculative_tokens": "1",
        "kv.page_size": "16",
        "model.effective_max_len": "500",
        "sampling.effective_temperature": "0.0",
        "workload.effective_requests": "4",
        "tracking.name": "none",
    }
    assert wanted.items() <= run.data.params.items()
    tags = {
        "backend": "cpu",
        "mode": "forced_rejection",
        "lossless": "true",
        "model": "tiny",
        "compiler": "scripted 1.0",
    }
    assert tags.items() <= run.data.tags.items()
    assert "cores" in run.data.tags["machine"]
    for key, value in values.items():
        if value is None:
            assert key not in run.data.metrics
        else:
            assert run.data.metrics[key] == pytest.approx(value)
    history = client(outputs).get_metric_history(run.info.run_id, "kv/active_bytes")
    assert len(history) == min(250, values["loop/steps"])
    assert [point.step for point in history] == sorted(point.step for point in history)
    assert history[-1].step == values["loop/steps"]
    names = {item.path for item in client(outputs).list_artifacts(run.info.run_id)}
    assert names == set(record.FILES)
    assert [place.name for place in tmp_path.iterdir()] == ["outputs"]


def test_upload_makes_the_same_run_again(outputs: Path) -> None:
    folder = run_of(outputs)
    assert tracking.mirror(folder, MlflowTracking(), outputs) is None
    (first,) = logged(outputs)
    command = [sys.executable, "-m", "xlpk.cli", "upload", str(folder)]
    done = subprocess.run(command, cwd=outputs.parent, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{folder}: run ")
    (second,) = logged(outputs)  # in the place of the first
    assert first.info.run_id != second.info.run_id
    assert first.data.params == second.data.params
    assert first.data.tags == second.data.tags
    assert first.data.metrics == second.data.metrics
    for name in ("status", "start_time", "end_time", "run_name"):
        assert getattr(first.info, name) == getattr(second.info, name)
    kept = [client(outputs).list_artifacts(run.info.run_id) for run in (first, second)]
    assert [(a.path, a.file_size) for a in kept[0]] == [(a.path, a.file_size) for a in kept[1]]


def test_a_failed_run_is_failed_in_mlflow(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = _outputs(tmp_path, 4, "--die", "100")
    shutil.copy(template, outputs / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking._silent.clear()
    assert tracking.mirror(run_of(outputs), MlflowTracking(), outputs) is None
    (run,) = logged(outputs)
    assert run.info.status == "FAILED"
    assert "scripted death" in run.data.tags["error"]
    assert "events.jsonl" in {item.path for item in client(outputs).list_artifacts(run.info.run_id)}


def test_precedence_of_stores(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = f"sqlite:///{outputs / 'mlflow.db'}"
    assert tracking.store_uri(MlflowTracking(), Path("outputs")) == default
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example")
    assert tracking.store_uri(MlflowTracking(), Path("outputs")) == "http://example"
    assert tracking.store_uri(MlflowTracking(uri="sqlite:////x.db"), Path("outputs")) == "sqlite:////x.db"


def test_a_dead_server_costs_one_line(outputs: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    warning = tracking.mirror(run_of(outputs), MlflowTracking(uri=uri), outputs)
    assert warning is not None
    assert "\n" not in warning
    assert f"upload outputs/runs/{run_of(outputs).parent.name}/" in warning


def test_a_silent_server_is_left_after_the_limit(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        choice = MlflowTracking(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)
        begin_s = time.monotonic()
        warning = tracking.mirror(run_of(outputs), choice, outputs)
        assert time.monotonic() - begin_s >= 0.5
        assert warning is not None
        assert "tracking.timeout_s=0.5" in warning
        monkeypatch.setattr(tracking, "_within", None)  # the next point of a sweep does not wait
        again = tracking.mirror(run_of(outputs), choice, outputs)
        assert again is not None
        assert "failed before" in again


@pytest.mark.heavy
def test_parallel_writers_on_a_fresh_store(outputs: Path) -> None:
    (outputs / "mlflow.db").unlink()
    code = (  # one import, then processes that open the store at the same time
        "import os, sys; from pathlib import Path\n"
        "from xlpk import tracking; from xlpk.settings import MlflowTracking\n"
        "tracking._import_mlflow(); folder, outputs = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "def write(): return tracking.mirror(folder, MlflowTracking(timeout_s=100), outputs)\n"
        "children = [os.fork() or os._exit(write() is not None) for _ in range(4)]\n"
        "assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4\n"
    )
    subprocess.run([sys.executable, "-c", code, run_of(outputs), outputs], check=True, timeout=300)
    assert len(logged(outputs)) == 4


def test_flatten() -> None:
    nested = {"a": {"b": 1, "c": [1, "x"], "d": None}, "e": "x" * 600, "f": True}
    flat = mlflow_fields.flatten(nested)
    assert flat | {"e": ""} == {"a.b": "1", "a.c": '[1, "x"]', "a.d": "null", "e": "", "f": "true"}
    assert len(flat["e"]) == mlflow_fields.MAX_PARAM
