"""Runs of backend=simulated through the engine: their settings, requests, costs and logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from fake_run import load_model
from run_settings import run_settings

from xlpk import engine, event_writer, metrics
from xlpk.costs import KNOTS, CostFile, StepCosts, write_costs
from xlpk.kv import KV, KVPlan
from xlpk.settings import Settings
from xlpk.settings import SimulatedBackend as Choice
from xlpk.speculation import Proposer
from xlpk.workload import Request

MODEL = load_model("stub")
PLAN = KVPlan.make(KV(budget="4000pages", prefix_sharing=False), MODEL.config, "bf16", 65536)
LINEAR = StepCosts(row_ns=tuple(1000.0 * knot for knot in KNOTS))


def settings(choice: Choice, spec: Proposer | None = None, **limits: Any) -> Settings:
    """No warm-up; a prompt is one step. `limits`: of the scheduler."""
    return run_settings(choice, spec, warmup_steps=0, **{"max_step_rows": 256, "prefill_chunk": 256, **limits})


def requests(count: int, prompt_len: int = 32, output_len: int = 8, rate_per_s: float = math.inf) -> list[Request]:
    rng = np.random.default_rng(5)
    gaps = rng.exponential(1 / rate_per_s, count) if math.isfinite(rate_per_s) else np.zeros(count)
    return [
        Request(i, tuple(rng.integers(0, 64, prompt_len).tolist()), output_len, ignore_eos=True, arrival_s=float(at))
        for i, at in enumerate(np.cumsum(gaps))
    ]


def serve(chosen: Settings, wanted: list[Request], folder: Path, plan: KVPlan = PLAN) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    with event_writer.EventLog(folder / "events.jsonl") as log:
        engine.serve(chosen, MODEL, plan, wanted, engine.make_backend, log, engine.Outcome())
    return metrics.read_events(folder / "events.jsonl")


def cost_file(folder: Path, values: StepCosts) -> str:
    """The path for backend.costs of a file with these."""
    write_costs(folder / "costs.yaml", CostFile(values, MODEL.name, "persistent", {}))
    return str(folder / "costs.yaml")
