"""A run folder -> one MLflow run. The only importer of mlflow, and only when a run has ended.

Everything comes from the folder's files, so `xlpk upload RUN_DIR` makes the same run again. A server that is down, slow
or silent costs at most `timeout_s`; the local files are complete before this module is called.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlpk import metrics as metrics_module
from xlpk import record
from xlpk.errors import InputError
from xlpk.settings import MlflowTracking

HTTP_TIMEOUT_S = 5
MAX_PARAM = 500  # characters; MLflow cuts at 6000, and the config is an artifact
BATCH = 1000  # metrics a call; params and tags: 100
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default blocks four minutes a call on a dead server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(HTTP_TIMEOUT_S),
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}

_silent: set[str] = set()  # stores that failed in this process: later points of a sweep do not wait for them again


def store_uri(tracking: MlflowTracking, outputs: Path) -> str:
    """What the user typed, else MLFLOW_TRACKING_URI, else OUTPUTS/mlflow.db, absolute."""
    typed = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if typed:
        return typed
    path = str(outputs.resolve() / "mlflow.db")
    if set(path) & set("?#%"):
        raise InputError("run.outputs", outputs, "a path without ? # %, which the store's address cannot hold")
    return f"sqlite:///{path}"


def mirror(folder: Path, tracking: MlflowTracking, outputs: Path) -> str | None:
    """Logs the folder; the warning to show if that failed, else None. Never raises, never waits beyond timeout_s."""
    uri = store_uri(tracking, outputs)
    if uri in _silent:
        return f"MLflow at {uri} failed before in this sweep; later: {upload_command(folder)}"
    try:
        _import_mlflow()
    except Exception as error:
        return _warning(folder, uri, error)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _log_run(folder, uri, tracking.experiment, outputs)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="mlflow", daemon=True)  # daemon: a silent server cannot hold the exit
    thread.start()
    thread.join(tracking.timeout_s)
    if thread.is_alive():
        failure.append(TimeoutError(f"no answer within tracking.timeout_s={tracking.timeout_s:g}"))
    if not failure:
        return None
    _silent.add(uri)
    return _warning(folder, uri, failure[0])


def upload(folder: Path, tracking: MlflowTracking, outputs: Path) -> str:
    """Logs the folder in place of an earlier mirror of it -> the id of the MLflow run; raises what MLflow raises."""
    _import_mlflow()
    return _log_run(folder, store_uri(tracking, outputs), tracking.experiment, outputs, replace=True)


def upload_command(folder: Path) -> str:
    return f"{record.program()} upload {os.path.relpath(folder)}"


def _warning(folder: Path, uri: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"not logged to MLflow at {uri}: {lines[0][:160]}; local files are complete; later: {upload_command(folder)}"


def _import_mlflow() -> None:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", module=r"mlflow|pydantic|alembic|google")
    import mlflow.tracking  # noqa: F401

    for name in ("mlflow", "alembic", "sqlalchemy", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _log_run(folder: Path, uri: str, experiment: str, outputs: Path, *, replace: bool = False) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    status = record.read_json(folder / record.STATUS)
    events = folder / record.EVENTS
    values: dict[str, Any] = record.read_json(folder / record.METRICS)
    if not values and events.exists():  # the process was killed
        values = dict(metrics_module.compute(metrics_module.read_events(events)))
    local = uri.startswith("sqlite:")
    with _lock(outputs) if local else contextlib.nullcontext():
        if local:
            _create_store(Path(uri.removeprefix("sqlite:///")))
        client = MlflowClient(tracking_uri=uri)
        location = (outputs.resolve() / "artifacts").as_uri() if local else None
        experiment_id = _experiment(client, experiment, location)
    started_ms = int(status.get("started_unix_s", 0) * 1000)
    ended_ms = int(status.get("ended_unix_s", 0) * 1000) or None
    earlier = _runs_of(client, experiment_id, folder) if replace else []
    run = client.create_run(experiment_id, start_time=started_ms, run_name=status.get("name") or folder.name)
    run_id = str(run.info.run_id)
    params = [Param(key, value) for key, value in flatten(record.read_config(folder)).items()]
    tags = [RunTag(key, value) for key, value in tags_of(folder, status).items()]
    for begin in range(0, max(len(params), len(tags)), 100):
        client.log_batch(run_id, params=params[begin : begin + 100], tags=tags[begin : begin + 100])
    at_ms = ended_ms or started_ms
    points = [Metric(key, float(value), at_ms, 0) for key, value in values.items() if value is not None]
    if events.exists():
        points += [
            Metric(key, value, started_ms + ns // 1_000_000, step)
            for key, line in metrics_module.series(metrics_module.read_events(events)).items()
            for step, ns, value in line
        ]
    for begin in range(0, len(points), BATCH):
        client.log_batch(run_id, metrics=points[begin : begin + BATCH])
    for name in record.FILES:
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))
    final = "FINISHED" if status.get("status") == "FINISHED" else "FAILED"
    client.set_terminated(run_id, status=final, end_time=ended_ms)
    for old in earlier:
        client.delete_run(old)
    return run_id


def _runs_of(client: Any, experiment_id: str, folder: Path) -> list[str]:
    """Ids of the runs that were made from this folder before."""
    name = str(folder.resolve()).replace("'", "")
    found = client.search_runs([experiment_id], f"tags.run_folder = '{name}'")
    return [str(run.info.run_id) for run in found]


def _create_store(path: Path) -> None:
    """The schema of a store that is not there yet, made beside its place and renamed: half a migration breaks it."""
    from mlflow.tracking import MlflowClient

    if path.exists():
        return
    beside = path.with_name(path.name + ".part")
    beside.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{beside}").search_experiments(max_results=1)
    beside.replace(path)


def _experiment(client: Any, name: str, location: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except Exception:  # another process was faster, on a server that has no lock of ours
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


@contextlib.contextmanager
def _lock(outputs: Path) -> Iterator[None]:
    """Parallel writers break a fresh sqlite store for good: one process at a time creates or migrates it."""
    outputs.mkdir(parents=True, exist_ok=True)
    with (outputs / ".mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config -> MLflow params: dotted keys, lists as JSON, long values cut."""
    out: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out[f"{prefix}{key}"] = text if len(text) <= MAX_PARAM else text[: MAX_PARAM - 3] + "..."
    return out


def tags_of(folder: Path, status: dict[str, Any]) -> dict[str, str]:
    build = record.read_json(folder / record.BUILD)
    details = build.get("backend", {})
    tags = {
        "backend": status.get("backend"),
        "orchestration": status.get("orchestration"),
        "mode": status.get("mode"),
        "model": status.get("model"),
        "lossless": str(status["lossless"]).lower() if "lossless" in status else None,
        "git_commit": build.get("git_commit"),
        "machine": f"{build['processor']}, {build['cores']} cores, {build['system']}" if build else None,
        "compiler": details.get("compiler"),
        "threads": details.get("threads"),
        "sweep_id": status.get("sweep_id"),
        "run_dir": folder.name,
        "run_folder": str(folder.resolve()).replace("'", ""),
        "overrides": " ".join(status.get("overrides", [])),
        "error": status.get("error"),
        "HANG": status.get("hang"),
    }
    return {key: str(value)[:4000] for key, value in tags.items() if value}
