"""What top-k, top-p and min-p cost a simulated run: by hand, by hardware, and fitted from logs it was planted in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_runs import MODEL, cost_file, requests, serve, settings

from xlpk import calibrate, metrics, record
from xlpk.backends.simulated import cost_notes
from xlpk.costs import KNOTS, CostFile, StepCosts, priced, read_costs, write_costs
from xlpk.event_log import Log
from xlpk.hardware import ORCHESTRATIONS, Hardware, calibrated, hardware_costs
from xlpk.kv import KV, KVPlan
from xlpk.model import SHAPES
from xlpk.settings import SimulatedBackend as Choice
from xlpk.workload import Request, Sampling

CURVE = tuple(3000.0 + 700.0 * (knot - 1) for knot in KNOTS)
COSTS = StepCosts(
    fixed_ns=20_000.0, row_ns=tuple(1000.0 * knot for knot in KNOTS), filter_ns=CURVE, control_ns=900.0, publish_ns=50.0
)


def filtered(wanted: list[Request], **sampling: Any) -> list[Request]:
    return [replace(one, temperature=1.0, **sampling) for one in wanted]


def test_a_step_by_hand() -> None:
    # 20000 + 3000 + (3000 + 700 x 1.0) + 900, of 3 rows of which 2 are filtered
    assert COSTS.step_ns(3, 3, 0, 0, 0, 2) == 20_000 + 3000 + 3700 + 900
    assert COSTS.step_ns(3, 3) == 20_000 + 3000 + 900
    assert priced(COSTS, {"n_rows": 3, "n_filter_rows": 2}) == COSTS.step_ns(3, 0, 0, 0, 0, 2)


@pytest.mark.parametrize(("orchestration", "gap_us"), [("persistent", 2.0), ("launched", 3.0), ("graph", 1.0)])
def test_rows_are_dealt_to_teams_and_the_phase_has_its_barrier(orchestration: str, gap_us: float) -> None:
    """A row is read seven times at 25 GB/s by its team; 128 teams take 128 rows at once; the rest waits for them."""
    machine = Hardware(teams=128, team_gb_per_s=25.0, barrier_us=2.0, kernel_gap_us=3.0, graph_gap_us=1.0)
    model = SHAPES["llama_1b_shape"]
    plan = KVPlan.make(KV(budget="1GiB"), model, "bf16", 4096)
    found = hardware_costs(model, "bf16", plan, machine, orchestration)
    row_us = 7 * 4 * 128_256 / 25e9 * 1e6
    for rows, rounds in ((1, 1), (64, 1), (128, 1), (256, 2), (512, 4)):
        step = {"n_rows": rows, "n_sample_rows": rows}
        more_ns = priced(found.costs, {**step, "n_filter_rows": rows}) - priced(found.costs, step)
        assert more_ns == pytest.approx(1e3 * (gap_us + rounds * row_us), rel=1e-6)
        assert priced(found.parts["filter"], {"n_filter_rows": rows}) == pytest.approx(1e3 * rounds * row_us)


@pytest.mark.parametrize(
    ("sampling", "pays"),
    [({"top_k": 5}, True), ({"top_p": 0.9}, True), ({"min_p": 0.1}, True), ({}, False), ({"top_p": 1.0}, False)],
)
def test_a_run_pays_for_each_sampled_row(tmp_path: Path, sampling: dict[str, Any], pays: bool) -> None:
    path = cost_file(tmp_path, COSTS)
    wanted = filtered(requests(3, prompt_len=20, output_len=6), **sampling)
    log = Log(serve(settings(Choice(costs=path), prefill_chunk=8), wanted, tmp_path / "run"))
    sampled = [step["n_sample_rows"] for step in log.steps]
    assert 0 in sampled
    assert max(sampled) == 3
    for step in log.steps:
        n = step["n_sample_rows"] if pays else 0
        assert step["n_filter_rows"] == n
        expected = 20_900 + 1000 * step["n_rows"] + (3000 + 700 * (n - 1) if n else 0)
        assert step["end_ns"] - step["begin_ns"] == expected


def test_greedy_runs_filter_nothing(tmp_path: Path) -> None:
    wanted = [replace(one, top_k=5) for one in requests(3)]
    log = Log(serve(settings(Choice()), wanted, tmp_path))
    assert {step["n_filter_rows"] for step in log.steps} == {0}
    assert {step["phase_ns"]["filter"] for step in log.steps} == {0}


@pytest.mark.parametrize("name", ORCHESTRATIONS)
def test_the_waterfall_and_the_phases_show_it(tmp_path: Path, name: str) -> None:
    chosen = settings(Choice(orchestration=name))
    plain, dropping = (
        metrics.compute(serve(chosen, filtered(requests(8, output_len=30), **more), tmp_path / str(len(more))))
        for more in ({}, {"top_k": 3})
    )
    assert plain["waterfall/filter_ms"] == plain["phase/filter_ms.mean"] == 0
    row_ms = 7 * 4 * MODEL.config.vocab_size / (Hardware().team_gb_per_s * 1e6)
    part = dropping["waterfall/filter_ms"]
    assert part is not None
    assert part > row_ms  # a token waits for the rows of others too
    parts = [value or 0 for key, value in dropping.items() if key.startswith("waterfall/")]
    assert sum(parts) == pytest.approx(2 * (dropping["waterfall/token_ms"] or 0))
    assert (dropping["phase/filter_share"] or 0) > 0
    assert (dropping["loop/step_ms.mean"] or 0) > (plain["loop/step_ms.mean"] or 0) + row_ms


def test_launches_of_the_phase_are_counted(tmp_path: Path) -> None:
    chosen = settings(Choice(orchestration="launched"))
    found = []
    for more in ({}, {"top_k": 3}):
        log = Log(serve(chosen, filtered(requests(4), **more), tmp_path / str(len(more))))
        assert log.counters is not None
        found.append(log.counters["launches"] - sum(step["n_sample_rows"] > 0 for step in log.steps) * len(more))
    assert found[0] == found[1]


def test_planted_costs_come_back_from_a_log(tmp_path: Path) -> None:
    """Steps that filter and steps that do not, noise on all; the record has the phase's time and no count of rows."""
    rng = np.random.default_rng(9)
    path = cost_file(tmp_path, COSTS)
    wanted = filtered(requests(40, prompt_len=40, output_len=30, rate_per_s=9000), top_p=0.9)
    chosen = settings(Choice(costs=path), prefill_chunk=16, max_num_seqs=12)
    (tmp_path / "run").mkdir()
    serve(chosen, wanted, tmp_path / "log")
    lines = []
    for line in (tmp_path / "log" / record.EVENTS).read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "step":
            n = entry.pop("n_filter_rows")
            took = round((3000 + 700 * (n - 1)) * rng.normal(1, 0.02)) if n else 0
            entry["phase_ns"] = {**entry["phase_ns"], "filter": took}
        lines.append(json.dumps(entry))
    (tmp_path / "run" / record.EVENTS).write_text("\n".join(lines) + "\n")
    facts = {"status": "FINISHED", "model": "stub", "backend": "cpu", "orchestration": "persistent"}
    record.write_json(tmp_path / "run" / record.STATUS, facts)
    record.write_json(tmp_path / "run" / record.BUILD, {"cores": 2})
    record.write_config(tmp_path / "run", {})

    steps = calibrate.read_run(tmp_path / "run").steps
    assert 0 < (steps.n_filter_rows == 0).sum() < len(steps)
    assert steps.n_filter_rows.max() > 8
    file, fitted = calibrate.calibrate([tmp_path / "run"])
    assert "filter_ns" not in fitted.unidentified
    for i in range(4):
        assert file.costs.filter_ns[i] == pytest.approx(CURVE[i], rel=0.03)
    assert file.costs.row_ns[3] + file.costs.sample_ns[3] + file.costs.fixed_ns == pytest.approx(28_000, rel=0.02)
    assert "filtered rows" in calibrate.table(file, fitted)


def test_files_without_the_curve_cost_nothing_there(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.yaml", CostFile(COSTS, "tiny", "persistent", {}))
    text = (tmp_path / "costs.yaml").read_text()
    begin, end = text.index("  filter_ns:"), text.index("  context_ns:")
    (tmp_path / "costs.yaml").write_text(text[:begin] + text[end:])
    assert read_costs(tmp_path / "costs.yaml").costs == replace(COSTS, filter_ns=(0.0,) * 12)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    (note,) = cost_notes(Choice(costs=str(tmp_path / "costs.yaml")), sampling)
    assert "filtering costs nothing" in note
    assert cost_notes(Choice(costs=cost_file(tmp_path, COSTS)), sampling) == []
    assert cost_notes(Choice(costs=str(tmp_path / "costs.yaml")), Sampling(top_p=0.9)) == []
    assert "filter" not in calibrated(replace(COSTS, filter_ns=(0.0,) * 12)).parts
    assert math.isclose(sum(priced(part, {"n_filter_rows": 4}) for part in calibrated(COSTS).parts.values()), 26_000)
