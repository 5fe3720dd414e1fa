"""Experiments: one folder a config and the other way round; committed results agree with what their pages say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from xlpk.speculation import Oracle
from xlpk.workload.shared_prefix import SharedPrefix

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
TRAINING = {"tiny_model"}  # makes the model that ships; no run of the loop
ON_A_GPU = {"gpu_suite", "microbench"}  # programs of their own; their results are by device


def rows(experiment: str) -> list[dict[str, str]]:
    with (ROOT / "experiments" / experiment / "results" / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_folder_for_each_config() -> None:
    assert {path.parent.name for path in (ROOT / "experiments").glob("*/README.md")} == {*CONFIGS, *TRAINING, *ON_A_GPU}


@pytest.mark.parametrize("experiment", CONFIGS)
def test_a_page_asks_predicts_and_judges(experiment: str) -> None:
    page = (ROOT / "experiments" / experiment / "README.md").read_text()
    for word in ("Question", "Prediction", "Command", "Verdict"):
        assert f"**{word}.**" in page
    assert f"experiment={experiment}" in page
    assert list((ROOT / "experiments" / experiment / "results").iterdir())


def test_forced_rejections_are_the_closed_form() -> None:
    found = rows("forced_rejection_grid")
    assert len(found) == 9
    for row in found:
        spec = Oracle(block=int(row["spec.block"]), mismatch_stride=int(row["spec.mismatch_stride"]))
        requests = int(row["requests/finished"])
        n_output = int(row["requests/output_tokens"]) // requests
        expected = tuple(requests * count for count in spec.expected(n_output))
        assert tuple(int(row[f"spec/{name}"]) for name in ("verifications", "proposed", "accepted")) == expected


def test_prefixes_are_found_as_the_formula_says_and_slru_keeps_most() -> None:
    config = yaml.safe_load((ROOT / "conf" / "experiment" / "prefix_sharing.yaml").read_text())["workload"]
    shape = {key: config[key] for key in ("requests", "prefixes", "prefix_len", "suffix_len")}
    found = {(row["kv.budget"], row["kv.eviction"]): float(row["kv/hit_rate"]) for row in rows("prefix_sharing")}
    ample = {policy: rate for (budget, policy), rate in found.items() if budget == "2048pages"}
    assert set(ample.values()) == {SharedPrefix(**shape).expected_hit_rate(16)}
    for budget in ("80pages", "40pages"):
        assert found[budget, "fifo"] < found[budget, "lru"] < found[budget, "slru"] < ample["lru"]


def test_pressure_preempts_and_swap_computes_nothing_again() -> None:
    for row in rows("kv_pressure_grid"):
        tight, swaps = float(row["kv.pressure"]) < 1, row["kv.preemption"] == "swap"
        assert (int(row["kv/preemptions"]) > 0) == tight
        assert (int(row["kv/moved_bytes"]) > 0) == (tight and swaps)
        assert (int(row["kv/recomputed_tokens"]) > 0) == (tight and not swaps)


def test_the_tiny_model_is_within_its_size_and_beats_a_compressor() -> None:
    from xlpk.model import TINY, load_model, read_config

    assert load_model("tiny").config.parameters <= 3_000_000
    assert read_config(TINY / "draft").parameters <= 500_000
    sizes = json.loads((ROOT / "experiments" / "tiny_model" / "results" / "eval.json").read_text())
    bits = sizes["bits_per_byte"]
    assert bits["target"]["heldout"] < bits["compressors"]["xz_9e"]["after_training"]
