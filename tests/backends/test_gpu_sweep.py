"""A sweep on a device: a process a point, so that a fault of one costs the others nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import kinds
import pytest
from backends.test_modes import xlpk

from xlpk import record

pytestmark = pytest.mark.heavy

SHORT = (
    "workload.requests=2",
    "sampling.max_new_tokens=24",
    "tracking=none",
    "run.warmup_steps=0",
    "run.report=false",
)


def points(folder: Path) -> list[Path]:
    (sweep,) = (folder / "outputs" / "sweeps").glob("*/*")
    return sorted(path for path in sweep.iterdir() if path.is_dir())


def test_the_orchestrations_side_by_side(tmp_path: Path) -> None:
    with kinds.on("persistent"):
        done = xlpk(tmp_path, "-m", "backend=persistent,launched,launched_phase,graph,cpu", *SHORT)
    found = points(tmp_path)
    metrics = [json.loads((point / record.METRICS).read_text()) for point in found]
    assert len(found) == 5
    if not kinds.real_driver():
        assert len({(point / record.TEXT).read_text() for point in found}) == 1
    persistent, launched, naive, graph, _ = metrics
    assert persistent["host/launches"] < graph["host/launches"] < launched["host/launches"]
    assert launched["host/launches"] == naive["host/launches"]
    assert naive["host/syncs"] > 10 * launched["host/syncs"]
    assert "backend=launched_phase" in done.stdout


def test_a_fault_costs_its_point_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team that never starts is fatal to the resident loop alone."""
    monkeypatch.setenv("XLPK_STANDIN_FAULT", "missing_team")
    with kinds.on("persistent"):
        if kinds.real_driver():
            pytest.skip("the fault is the stand-in's")
        done = xlpk(tmp_path, "-m", "backend=persistent,graph", *SHORT, code=4)
    statuses = [record.read_json(point / record.STATUS) for point in points(tmp_path)]
    assert [status["status"] for status in statuses] == ["FAILED", "FINISHED"]
    assert "census_timeout" in statuses[0]["error"]
    assert "census_timeout" in done.stderr


def test_a_deadline_ends_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that never ends is given less time here than the run itself would give it."""
    monkeypatch.setenv("XLPK_STANDIN_FAULT", "stuck")
    with kinds.on("launched"):
        if kinds.real_driver():
            pytest.skip("the fault is the stand-in's")
        done = xlpk(tmp_path, "-m", "backend=launched,cpu", "run.deadline_s=3", *SHORT, code=4)
    first, second = (record.read_json(point / record.STATUS) for point in points(tmp_path))
    assert (first["status"], second["status"]) == ("FAILED", "FINISHED")
    assert first["error"] == "no end after run.deadline_s=3"
    assert "no end after run.deadline_s=3" in done.stderr


def test_points_of_a_parallel_launcher_take_turns_on_the_device(tmp_path: Path) -> None:
    """Two workers, one device: each point has a process of its own, and none runs while another does."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.batch_size=1")
    with kinds.on("persistent"):
        xlpk(tmp_path, "-m", "backend=persistent,launched,graph", *options, *SHORT)
    statuses = [record.read_json(point / record.STATUS) for point in points(tmp_path)]
    assert [status["status"] for status in statuses] == ["FINISHED"] * 3
    assert len({status["pid"] for status in statuses}) == 3
    in_order = sorted(statuses, key=lambda status: status["started_unix_s"])
    for first, second in itertools.pairwise(in_order):
        assert first["ended_unix_s"] <= second["started_unix_s"]
