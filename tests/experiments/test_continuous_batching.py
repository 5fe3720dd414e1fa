"""The committed results of continuous_batching: whole, consistent, and what its page shows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "continuous_batching"


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("continuous_batching_figure", FOLDER / "figure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_point_ran_and_counts_agree(figure: ModuleType) -> None:
    config = OmegaConf.load(ROOT / "conf" / "experiment" / "continuous_batching.yaml")
    swept = config.hydra.sweeper.params
    grid = {
        (int(limit), float(rate))
        for limit in str(swept["scheduler.max_num_seqs"]).split(",")
        for rate in str(swept["workload.rate_per_s"]).split(",")
    }
    rows = figure.read()
    assert set(rows) == grid
    assert (config.slo.ttft_ms, config.slo.tpot_ms) == (figure.TTFT_MS, figure.TPOT_MS)
    for (limit, rate), seeds in rows.items():
        assert len({row["workload.seed"] for row in seeds}) == len(seeds) == 2
        for row in seeds:
            assert row["status"] == "FINISHED"
            assert int(row["requests/finished"]) == config.workload.requests
            share = float(row["requests/slo_met_share"])
            assert int(row["requests/slo_met"]) == round(share * config.workload.requests)
            finished_per_s, good_per_s = (float(row[f"throughput/{name}_per_s"]) for name in ("requests", "goodput"))
            assert good_per_s == pytest.approx(share * finished_per_s)
            assert finished_per_s < 1.1 * rate
            assert float(row["loop/tokens_per_step.mean"]) <= limit
            each = [float(row[f"requests/slo_met_share.{name}"]) for name in ("ttft", "tpot")]
            assert sum(each) - 1 - 1e-9 <= share <= min(each) + 1e-9


def test_goodput_has_a_knee_and_batching_moves_it(figure: ModuleType) -> None:
    rows = figure.read()
    best = {}
    for limit in (1, 64):
        curve = {
            rate: sum(float(row["throughput/goodput_per_s"]) for row in seeds) / len(seeds)
            for (one, rate), seeds in rows.items()
            if one == limit
        }
        best[limit] = max(curve.values())
        assert curve[max(curve)] < 0.5 * best[limit]
    assert best[64] > 1.5 * best[1]


def test_the_page_shows_the_results(figure: ModuleType) -> None:
    assert figure.table(figure.read()) in (FOLDER / "README.md").read_text()
    assert (FOLDER / "results" / "load.png").stat().st_size < 200_000
