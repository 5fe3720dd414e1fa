"""xlpk calibrate: costs that were planted in logs come back, mixed runs are refused, bad input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import load_model
from run_settings import run_settings

from xlpk import calibrate, cli, engine, event_writer, record
from xlpk.costs import KNOTS, CostFile, StepCosts, read_costs, write_costs
from xlpk.errors import InputError
from xlpk.fit import Measured, curve, fit, nnls, ramps
from xlpk.kv import KV, KVPlan
from xlpk.settings import SimulatedBackend
from xlpk.speculation import Ngram
from xlpk.workload import Request

MODEL = load_model("stub")
PLAN = KVPlan.make(KV(budget="4000pages"), MODEL.config, "bf16", 4096)
PLANTED = StepCosts(
    fixed_ns=30_000.0,
    row_ns=(0.0, *(4000.0 * (knot - 1) for knot in KNOTS[1:])),
    sample_ns=(6000.0,) * 2 + tuple(6000.0 + 1500.0 * (knot - 2) for knot in KNOTS[2:]),
    attended_ns=40.0,
    control_ns=1200.0,
    control_row_ns=11.0,
    publish_ns=90_000.0,
    submit_ns=50_000.0,
)
COUNTS = ("n_rows", "n_sample_rows", "context_tokens", "attended_tokens", "n_moves")


def counts(steps: Measured) -> list[tuple[int, ...]]:
    """What StepCosts.step_ns takes, of each step."""
    return list(zip(*(getattr(steps, name).astype(int).tolist() for name in COUNTS), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run folder as a measured run leaves it, its steps taking what PLANTED says; changes: of its facts."""
    root = tmp_path_factory.mktemp("runs")
    write_costs(root / "planted.yaml", CostFile(PLANTED, MODEL.name, "persistent", {}))
    backend = SimulatedBackend(costs=str(root / "planted.yaml"), acceptance_rate=0.5)
    chosen = run_settings(backend, Ngram(block=4), warmup_steps=4)
    rng = np.random.default_rng(3)
    at = np.cumsum(rng.exponential(1 / 300, 60))
    wanted = [
        Request(i, tuple(rng.integers(1, 200, rng.integers(20, 120)).tolist()), 24, arrival_s=float(at[i]))
        for i in range(60)
    ]
    (root / "log").mkdir()
    with event_writer.EventLog(root / "log" / record.EVENTS) as log:
        engine.serve(chosen, MODEL, PLAN, wanted, engine.make_backend, log, engine.Outcome())
    text = (root / "log" / record.EVENTS).read_text()

    def make(name: str, edit: Callable[[str], str] = str, **changes: Any) -> Path:
        folder = root / name
        folder.mkdir()
        (folder / record.EVENTS).write_text(edit(text))
        status = {"status": "FINISHED", "model": "stub", "backend": "cpu", "orchestration": "persistent", **changes}
        record.write_json(folder / record.STATUS, status)
        build = {"processor": changes.get("processor", "a CPU"), "cores": 2, "backend": {"threads": "1"}}
        record.write_json(folder / record.BUILD, build)
        record.write_config(folder, {"model": {"effective_dtype": "bf16"}, "kv": {"effective_dtype": "bf16"}})
        return folder

    return make


def test_planted_costs_come_back(run: Callable[..., Path]) -> None:
    folder = run("planted")
    file, fitted = calibrate.calibrate([folder])
    steps = counts(calibrate.read_run(folder).steps)
    assert len({step[0] for step in steps}) > 20
    for step in steps:
        assert file.costs.step_ns(*step) == pytest.approx(PLANTED.step_ns(*step), rel=0.01)
    assert file.costs.control_ns == pytest.approx(1200, rel=0.02)
    assert file.costs.control_row_ns == pytest.approx(11, rel=0.05)
    assert file.costs.publish_ns == pytest.approx(90_000, rel=0.01)
    assert file.costs.submit_ns == pytest.approx(50_000, rel=0.01)
    assert fitted.r2 > 0.999
    assert fitted.p95_error < 0.01
    assert "move_ns" in fitted.unidentified
    assert "attended_ns" not in fitted.unidentified
    assert (file.model, file.orchestration) == ("stub", "persistent")


def test_late_sends_are_a_part_of_the_way_to_the_loop(run: Callable[..., Path]) -> None:
    """The host sent 20 us later than it should have, and was admitted at the same time: the same 50 us in all."""

    def late(text: str) -> str:
        records = [json.loads(line) for line in text.splitlines()]
        for entry in records:
            entry["host_ns"] = entry.get("host_ns", 0) + (20_000 if entry["event"] == "submit" else 0)
        return "".join(json.dumps(entry) + "\n" for entry in records)

    assert calibrate.read_run(run("late", late)).delays.submit_ns == pytest.approx(50_000, rel=0.01)


def test_noise_and_stalls_bend_no_curve_and_keep_the_mean(run: Callable[..., Path]) -> None:
    """One step in fifty lasts five times as long, all vary by 5 %: shapes stay, and the sum of all steps is kept."""
    steps = calibrate.read_run(run("noisy")).steps
    rng = np.random.default_rng(8)
    noise = rng.normal(1.0, 0.05, len(steps)) * np.where(rng.random(len(steps)) < 0.02, 5.0, 1.0)
    noisy = replace(steps, forward_ns=steps.forward_ns * noise)
    values = StepCosts(**fit(noisy).values)  # type: ignore[arg-type]
    ratios = [values.step_ns(*step) / PLANTED.step_ns(*step) for step in counts(steps)]
    low, middle, high = np.percentile(ratios, [2, 50, 98])
    assert 0.96 < low / middle < high / middle < 1.04
    assert 1.06 < middle < 1.12  # 2 % of the steps take 4 times more: 1.08
    predicted = sum(values.exact_ns(*step) for step in counts(noisy))
    assert predicted == pytest.approx(float((noisy.forward_ns + noisy.control_ns).sum()), rel=1e-6)


def test_what_did_not_vary_is_named() -> None:
    """Steps of one row each: no curve, context and attention alike, nothing moved."""
    context = np.arange(1.0, 201.0)
    ones, zeros = np.ones(200), np.zeros(200)
    fitted = fit(Measured(ones, ones, context, context, zeros, zeros, 1000 + 3 * context, zeros, 10 * ones))
    unknown = {"fixed_ns", "sample_ns[0]", "context_ns", "attended_ns", "move_ns", "filter_ns"}
    assert unknown <= set(fitted.unidentified)
    one_filtered = fit(Measured(ones, ones, context, context, zeros, ones, 1000 + 3 * context, 50 * ones, 10 * ones))
    assert {name for name in one_filtered.unidentified if "filter" in name} == {"filter_ns[1]"}
    assert StepCosts(**fitted.values).step_ns(1, 1, 100, 100) == pytest.approx(1310, abs=1)  # type: ignore[arg-type]


def test_least_squares_without_negative_coefficients() -> None:
    """Against every subset of columns solved freely: the best whose solution is nonnegative."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = rng.normal(size=(12, 4)), rng.normal(size=12)
        best = float((b**2).sum())
        for mask in range(1, 16):
            free = [i for i in range(4) if mask >> i & 1]
            x = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(((a[:, free] @ x - b) ** 2).sum()))
        found = nnls(a, b)
        assert (found >= 0).all()
        assert float(((a @ found - b) ** 2).sum()) == pytest.approx(best)


def test_ramps_are_the_curves_of_the_formula() -> None:
    increments = [2.0, 3.0, 0.0, 10.0]
    values = curve(increments)
    counts = np.array([0.0, 1, 2, 3, 4, 6, 8, 20])
    from xlpk.costs import at_knots

    assert (ramps(counts, 3, True) @ increments).tolist() == pytest.approx([at_knots(values, int(n)) for n in counts])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"orchestration": "launched"}, "orchestration persistent"),
        ({"model": "other"}, "model stub"),
        ({"processor": "another"}, "processor a CPU"),
        ({"backend": "graph"}, "backend cpu"),
    ],
)
def test_mixed_runs_are_refused_by_name(run: Callable[..., Path], changes: dict[str, str], named: str) -> None:
    key = next(iter(changes))
    first, second = run(f"first {key}"), run(f"second {key}", **changes)
    with pytest.raises(InputError, match=named) as caught:
        calibrate.calibrate([first, second])
    assert str(second) in str(caught.value)
    assert f"it has {changes[key]}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "FAILED"}, "the folder of a finished run"),
        ({"synthetic": True}, "a run of our loop that was measured"),
        ({"backend": "hf"}, "a run of our loop that was measured"),
    ],
)
def test_runs_that_say_nothing_are_refused(run: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate.read_run(run(f"useless {next(iter(changes))} {message[:9]} {changes}"[:60], **changes))


def test_short_and_old_logs_are_refused(run: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="at least 100 steps; it has"):
        calibrate.read_run(run("short", lambda text: "".join(text.splitlines(keepends=True)[:120])))
    with pytest.raises(InputError, match="attended_tokens: measure it again"):
        calibrate.read_run(run("old", lambda text: text.replace("attended_tokens", "attended")))
    searched = run("searched")
    record.write_config(searched, {"sampling": {"logprobs": 5}})
    with pytest.raises(InputError, match=r"a run without sampling\.logprobs"):
        calibrate.read_run(searched)


def test_the_command(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = run("command"), tmp_path / "costs.yaml"
    assert cli.main(["calibrate", str(folder), "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "not identified" in shown
    assert f"backend.costs={out}" in shown
    found = read_costs(out)
    assert found.facts["runs"] == [str(folder)]
    assert found.facts["fit"]["steps"] > 100
    assert cli.main(["calibrate", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["calibrate", str(folder), "-o", str(tmp_path / "no" / "where.yaml")]) == 2
    assert "-o=" in capsys.readouterr().err
