"""A run folder -> one MLflow run, a sweep's folder -> a parent with a child a point. The only importer of mlflow.

It is called when a run has ended, and everything comes from the folder's files, so `xlpk upload FOLDER` makes the same
runs again. A server that is down, slow or silent costs at most `timeout_s`, in a sweep once; the local files are
complete before this module is called. The parent is made by whichever point ends first, under the sweep's lock, and
its id is kept in the sweep's folder, where every launcher's processes find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xlpk import metrics as metrics_module
from xlpk import record, sweep_folder
from xlpk.errors import InputError, one_line, shown
from xlpk.mlflow_fields import flatten, note_of_sweep, tags_of, tags_of_sweep
from xlpk.process import collector_at_rest
from xlpk.settings import MlflowTracking

HTTP_TIMEOUT_S = 5
REPORT = "report"  # folder within a sweep's
FINISH_S = 20.0  # the most that the end of a sweep waits for the server
LOCK_S = 600.0  # the most that a run waits for the others that write to a store in a file
BATCH, PARAMS = 1000, 100  # metrics and params that MLflow takes in a call
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default blocks four minutes a call on a dead server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(HTTP_TIMEOUT_S),
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a line a run
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
    """Logs the folder; the warning to show if that failed, else None. Never raises, never waits beyond timeout_s.

    The first point of a sweep that fails at it is the last one that tries, and the only one that warns.
    """
    uri = store_uri(tracking, outputs)
    sweep = sweep_folder.sweep_of(folder)
    if sweep is not None and uri in record.read_json(sweep / sweep_folder.DOWN):
        return None
    if sweep is None and uri in _silent:
        return f"MLflow at {uri} failed before in this process; later: {upload_command(folder)}"
    again = sweep is not None and sweep_folder.read(sweep).get("session", 1) > 1
    failure = _within(
        tracking.timeout_s,
        lambda started: _log_run(folder, uri, tracking.experiment, outputs, replace=again, started=started),
    )
    if failure is None:
        return None
    if sweep is None:
        _silent.add(uri)
        return _warning(folder, uri, failure)
    record.write_json(sweep / sweep_folder.DOWN, {uri: one_line(failure)})
    return _warning(sweep, uri, failure)


def finish_sweep(sweep: Path) -> str | None:
    """Ends the parent runs that the sweep's points have made; the warning to show if that failed."""
    for parent in record.read_json(sweep / sweep_folder.MLFLOW).values():
        uri = parent["uri"]
        if uri in record.read_json(sweep / sweep_folder.DOWN):
            continue

        def work(started: threading.Event, parent: dict[str, Any] = parent) -> None:
            started.set()
            _finish_parent(sweep, parent)

        if (failure := _within(FINISH_S, work)) is not None:
            return _warning(sweep, uri, failure)
    return None


def upload(folder: Path, tracking: MlflowTracking, outputs: Path) -> str:
    """Logs the folder in place of an earlier mirror of it -> the id of the MLflow run; raises what MLflow raises.

    Of a sweep: its parent, and the points that the store lacks or has incomplete.
    """
    _import_mlflow()
    uri = store_uri(tracking, outputs)
    if not sweep_folder.is_sweep(folder):
        return _log_run(folder, uri, tracking.experiment, outputs, replace=True)
    (folder / sweep_folder.DOWN).unlink(missing_ok=True)
    sweep_folder.bury(folder)
    client, experiment_id = _open(uri, tracking.experiment, outputs)
    parent_id = _parent(client, experiment_id, uri, tracking.experiment, folder, True)
    complete = _complete_children(client, experiment_id, parent_id)
    for point in sweep_folder.points_of(folder):
        status = record.read_json(point / record.STATUS)
        ended_ms = int(status.get("ended_unix_s", 0) * 1000)
        ended = status.get("status") in ("FINISHED", "FAILED")  # one that runs is logged by its own process
        if ended and (point.name, ended_ms) not in complete:
            _log_run(point, uri, tracking.experiment, outputs, replace=True)
    _finish_parent(folder, {"uri": uri, "run_id": parent_id})
    return parent_id


def _within(limit_s: float, work: Callable[[threading.Event], object]) -> BaseException | None:
    """What `work` raised, or that it took longer than `limit_s` from the moment that it set its event."""
    failure: list[BaseException] = []
    started = threading.Event()

    def guarded() -> None:
        try:
            _import_mlflow()
            work(started)
        except BaseException as error:
            failure.append(error)
        finally:
            started.set()

    thread = threading.Thread(
        target=guarded, name="mlflow", daemon=True
    )  # daemon: a silent server cannot hold the exit
    thread.start()
    started.wait(LOCK_S)
    thread.join(limit_s)
    if thread.is_alive():
        return TimeoutError(f"no answer within tracking.timeout_s={limit_s:g}")
    return failure[0] if failure else None


def upload_command(folder: Path) -> str:
    return f"{record.program()} upload {os.path.relpath(folder)}"


def _warning(folder: Path, uri: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"not logged to MLflow at {uri}: {lines[0][:160]}; local files are complete; later: {upload_command(folder)}"


def _import_mlflow() -> None:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", module=r"mlflow|pydantic|alembic|google")
    with collector_at_rest():
        import mlflow.tracking  # noqa: F401

    for name in ("mlflow", "alembic", "sqlalchemy", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _log_run(
    folder: Path,
    uri: str,
    experiment: str,
    outputs: Path,
    *,
    replace: bool = False,
    started: threading.Event | None = None,
) -> str:
    """One folder as one run, written under the store's lock if the store is a file: writers to sqlite take turns."""
    with _lock(outputs) if _is_file(uri) else contextlib.nullcontext():
        if started is not None:
            started.set()
        client, experiment_id = _open(uri, experiment, outputs)
        sweep = sweep_folder.sweep_of(folder)
        parent_id = None if sweep is None else _parent(client, experiment_id, uri, experiment, sweep, replace)
        earlier = _runs_of(client, experiment_id, folder) if replace else []
        run_id = _write_run(client, experiment_id, folder, parent_id)
        for old in earlier:
            client.delete_run(old)
    return run_id


def _write_run(client: Any, experiment_id: str, folder: Path, parent_id: str | None) -> str:
    from mlflow.entities import Metric, Param

    status = record.read_json(folder / record.STATUS)
    events = folder / record.EVENTS
    values: dict[str, Any] = record.read_json(folder / record.METRICS)
    log = metrics_module.read_events(events) if events.exists() else []
    if not values and log:  # the process was killed
        values = dict(metrics_module.compute(log))
    started_ms = int(status.get("started_unix_s", 0) * 1000)
    ended_ms = int(status.get("ended_unix_s", 0) * 1000) or None
    tags = tags_of(folder, status)
    if parent_id is not None:
        tags["mlflow.parentRunId"] = parent_id
    run = client.create_run(experiment_id, start_time=started_ms, run_name=status.get("name") or folder.name, tags=tags)
    run_id = str(run.info.run_id)
    params = [Param(key, value) for key, value in flatten(record.read_config(folder)).items()]
    at_ms = ended_ms or started_ms
    points = [Metric(key, float(value), at_ms, 0) for key, value in values.items() if value is not None]
    if log:
        points += [
            Metric(key, value, started_ms + ns // 1_000_000, step)
            for key, line in metrics_module.series(log).items()
            for step, ns, value in line
        ]
    for begin in range(0, len(params), PARAMS):
        client.log_batch(run_id, params=params[begin : begin + PARAMS])
    for begin in range(0, len(points), BATCH):
        client.log_batch(run_id, metrics=points[begin : begin + BATCH])
    for name in (*record.FILES, *record.MORE_FILES):
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))
    final = "FINISHED" if status.get("status") == "FINISHED" else "FAILED"
    client.set_terminated(run_id, status=final, end_time=ended_ms)
    return run_id


def _open(uri: str, experiment: str, outputs: Path) -> tuple[Any, str]:
    """The client and the experiment's id; made where they are missing."""
    from mlflow.tracking import MlflowClient

    if _is_file(uri):
        with collector_at_rest():  # the store is a big import too
            _create_store(Path(uri.removeprefix("sqlite:///")))
            client = MlflowClient(tracking_uri=uri)
            return client, _experiment(client, experiment, (outputs.resolve() / "artifacts").as_uri())
    client = MlflowClient(tracking_uri=uri)
    return client, _experiment(client, experiment, None)


def _parent(client: Any, experiment_id: str, uri: str, experiment: str, sweep: Path, again: bool) -> str:
    """The sweep's run in this store and experiment, made by whoever asks first; `again`: it may have been deleted."""
    key = f"{uri} {experiment}"
    with sweep_folder.locked(sweep):
        known = record.read_json(sweep / sweep_folder.MLFLOW)
        if key in known and not (again and not _exists(client, known[key]["run_id"])):
            return str(known[key]["run_id"])
        about = sweep_folder.read(sweep)
        run = client.create_run(
            experiment_id,
            start_time=int(about.get("started_unix_s", 0) * 1000),
            run_name=shown("sweep " + " ".join(about.get("overrides", [])), 200),
            tags=tags_of_sweep(sweep, about),
        )
        parent = {"uri": uri, "experiment_id": experiment_id, "run_id": str(run.info.run_id)}
        record.write_json(sweep / sweep_folder.MLFLOW, {**known, key: parent})
        return str(run.info.run_id)


def _exists(client: Any, run_id: str) -> bool:
    """Whether a run is there and nobody deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _complete_children(client: Any, experiment_id: str, parent_id: str) -> set[tuple[str, int]]:
    """(point, end in ms) of the children that were written to their end."""
    found: set[tuple[str, int]] = set()
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'", max_results=1000, page_token=token
        )
        for run in page:
            if run.info.status in ("FINISHED", "FAILED"):
                found.add((run.data.tags.get("point", ""), int(run.info.end_time or 0)))
        token = page.token
        if not token:
            return found


def _finish_parent(sweep: Path, parent: dict[str, Any]) -> None:
    """Counts, the table and the status: FINISHED if every point of the grid is."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=parent["uri"])
    states = [record.read_json(point / record.STATUS).get("status") for point in sweep_folder.points_of(sweep)]
    finished, total = states.count("FINISHED"), sweep_folder.read(sweep).get("points") or len(states)
    now_ms = int(time.time() * 1000)
    counts = {"sweep/points": total, "sweep/finished": finished, "sweep/failed": len(states) - finished}
    client.log_batch(parent["run_id"], metrics=[Metric(key, float(n), now_ms, 0) for key, n in counts.items()])
    client.set_tag(parent["run_id"], "mlflow.note.content", note_of_sweep(sweep))
    for name in (sweep_folder.SWEEP, sweep_folder.CSV, sweep_folder.HYDRA):
        if (sweep / name).exists():
            client.log_artifact(parent["run_id"], str(sweep / name))
    if (sweep / REPORT).is_dir():
        client.log_artifacts(parent["run_id"], str(sweep / REPORT), REPORT)
    final = "FINISHED" if states and finished == len(states) >= total else "FAILED"
    client.set_terminated(parent["run_id"], status=final, end_time=now_ms)


def _runs_of(client: Any, experiment_id: str, folder: Path) -> list[str]:
    """Ids of the runs that were made from this folder before."""
    name = str(folder.resolve()).replace("'", "")
    found = client.search_runs([experiment_id], f"tags.run_folder = '{name}'")
    return [str(run.info.run_id) for run in found]


def _is_file(uri: str) -> bool:
    return uri.startswith("sqlite:")


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
