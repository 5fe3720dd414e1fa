"""How far a simulated run is from the measured one whose answers it was given: predicted / measured - 1, by metric."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from xlpk import record
from xlpk.errors import InputError, ToolError
from xlpk.metrics import Metrics
from xlpk.report import columns

COMPARED = (
    "latency/ttft_ms.mean",
    "latency/e2e_ms.mean",
    "latency/tpot_ms.mean",
    "latency/itl_ms.mean",
    "latency/ttft_ms.p50",
    "latency/e2e_ms.p50",
    "latency/tpot_ms.p50",
    "device_latency/ttft_ms.mean",
    "device_latency/e2e_ms.mean",
    "device_latency/tpot_ms.mean",
    "throughput/tokens_per_s",
    "loop/steps",
    "loop/step_ms.mean",
    "loop/rows.mean",
    "kv/hit_rate",
    "kv/preemptions",
    "kv/evictions",
    "spec/acceptance_rate",
    "spec/acceptance_length",
)
_TAKEN = ("kv", "model", "workload", "sampling", "scheduler", "spec", "acceptance", "slo")  # of a run's config
TARGETS = {  # relative error at most, of the means that experiments/sim_fidelity is judged by
    "latency/tpot_ms.mean": 0.05,
    "latency/ttft_ms.mean": 0.10,
    "latency/e2e_ms.mean": 0.10,
    "kv/hit_rate": 0.01,
    "spec/acceptance_length": 0.01,
}


def errors(simulated: Metrics, measured: Mapping[str, float | int | None]) -> dict[str, float]:
    """`prediction_error/METRIC`: signed and relative; 0 where both are 0, absent where only the measured one is."""
    out = {}
    for key in COMPARED:
        predicted, actual = simulated.get(key), measured.get(key)
        if predicted is None or actual is None:
            continue
        if actual:
            out[f"prediction_error/{key}"] = predicted / actual - 1
        elif not predicted:
            out[f"prediction_error/{key}"] = 0.0
    return out


def against(folder: Path, simulated: Metrics) -> dict[str, float]:
    """The errors of a simulated run against the run in `folder`."""
    return errors(simulated, record.read_json(folder / record.METRICS))


def predict(folder: Path, costs: Path, outputs: Path) -> dict[str, float]:
    """Simulates a measured run's own config on `costs`, with its answers -> the errors.

    Leaves a run folder under `outputs`, as any run does.
    """
    from xlpk import point, run  # point registers the schema

    status, config = record.read_json(folder / record.STATUS), record.read_config(folder)
    if status.get("status") != "FINISHED" or status.get("synthetic"):
        raise InputError("--predict", folder, "the folder of a finished run that was measured")

    def simulate(cfg: DictConfig) -> int:
        for group in _TAKEN:
            known = [key for key in config.get(group, {}) if key in cfg[group] and key != "name"]
            OmegaConf.update(cfg, group, {key: config[group][key] for key in known})
        cfg.run.warmup_steps = config["run"]["warmup_steps"]
        with contextlib.redirect_stdout(io.StringIO()):
            return point.point(cfg)

    chosen = ("mode", "model", "workload", "spec", "acceptance")
    fixed = {
        "backend": "simulated",
        "backend.orchestration": status["orchestration"],
        "backend.lease_ms": 0,
        "tracking": "none",
        "run.outputs": outputs,
    }
    before = set((outputs / "runs").glob("*/*"))
    argv = [f"{group}={config[group]['name']}" for group in chosen] + [f"{key}={value}" for key, value in fixed.items()]
    code = run.compose_and_run([*argv, f"backend.costs='{costs}'", f"backend.outcomes='{folder}'"], simulate)
    code = code or (point.codes[-1] if point.codes else 0)
    made = set((outputs / "runs").glob("*/*")) - before
    if code or len(made) != 1:
        raise ToolError(f"{folder}: its simulation left with exit code {code}")
    values = record.read_json(made.pop() / record.METRICS)
    return {key: value for key, value in values.items() if key.startswith("prediction_error/")}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Every cell of (run, metric), worst against its target first; what has no target comes last."""
    cells = [
        (run, key.removeprefix("prediction_error/"), value) for run, own in found.items() for key, value in own.items()
    ]

    def badness(cell: tuple[str, str, float]) -> tuple[bool, float]:
        _, key, value = cell
        return key not in TARGETS, -abs(value) / TARGETS.get(key, 1.0)

    rows = [("predicted / measured - 1", "error", "to reach", "", "run")]
    for run, key, value in sorted(cells, key=badness):
        target = TARGETS.get(key)
        reached = "" if target is None else "yes" if abs(value) <= target else "NO"
        rows.append((key, f"{value:+.2%}", "" if target is None else f"{target:.0%}", reached, run))
    return columns(rows)
