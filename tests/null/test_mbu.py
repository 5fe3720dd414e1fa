"""Bandwidth as a share of a machine's peak: only where somebody said which machine it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kinds import CACHE
from test_metrics import LOG

from xlpk import metrics, point, run


def of(log: list[dict[str, Any]]) -> dict[str, float | int | None]:
    return {key: value for key, value in metrics.compute(log).items() if "mbu" in key}


def test_shares_of_a_peak_by_hand() -> None:
    """4 steps read 6 MB in 3 ms each: 2 GB/s of 8. Together they last 20 ms: 24 MB / 20 ms is 1.2 GB/s of 8."""
    assert of(LOG) == {}
    named = [{**LOG[0], "peak": {"hardware": "toy", "memory_gb_per_s": 8.0}}, *LOG[1:]]
    assert of(named) == {"phase/qkv_mbu": pytest.approx(0.25), "loop/mbu": pytest.approx(0.15)}


@pytest.mark.parametrize(
    ("overrides", "chosen", "named"),
    [
        ([], "cpu", False),
        (["hardware=cpu"], "cpu", True),
        (["+hardware=cpu"], "cpu", True),
        (["hardware.memory_gb_per_s=50"], "cpu", True),
        (["hardware.sync_us=3"], "cpu", False),
        (["workload.file=hardware"], "cpu", False),
        (["hardwares=1"], "cpu", False),
        ([], "h200", True),  # an experiment's
    ],
)
def test_a_machine_counts_once_it_is_named(overrides: list[str], chosen: str, named: bool) -> None:
    assert point._names_hardware(overrides, chosen) is named


@pytest.mark.heavy
@pytest.mark.parametrize("backend", ["cpu", "simulated"])
def test_a_run_that_is_told_its_machine_says_what_it_reaches(tmp_path: Path, backend: str) -> None:
    (tmp_path / "cache").symlink_to(CACHE)
    found = []
    for name, words in (("default", []), ("named", ["hardware.memory_gb_per_s=100"])):
        words = [*words, f"backend={backend}", "tracking=none", f"run.outputs={tmp_path}"]
        assert run.main([*words, f"hydra.run.dir={tmp_path / name}"]) == 0
        values = json.loads((tmp_path / name / "metrics.json").read_text())
        found.append({key for key in values if "mbu" in key})
    assert found[0] == set()
    if backend == "simulated":  # it is as good as the costs say
        assert found[1] == set()
        return
    assert {"loop/mbu", "phase/qkv_mbu", "phase/attend_mbu", "phase/lm_head_mbu"} <= found[1]
    for phase in ("qkv", "down"):
        assert values[f"phase/{phase}_mbu"] == pytest.approx(values[f"phase/{phase}_gb_per_s"] / 100)
    read = sum(values[key] for key in values if key.startswith("phase/") and key.endswith("_bytes"))
    took_ns = values["loop/steps"] * values["loop/step_ms.mean"] * 1e6
    assert values["loop/mbu"] == pytest.approx(read / took_ns / 100)
