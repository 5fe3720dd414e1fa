"""`xlpk calibrate RUN...`: the simulator's costs from measured runs, and how well they fit.

A step's duration and its control phase come from the loop's own records; how long the host takes to be heard, and to
hear, comes from both clocks. `--predict RUN...` simulates each of these on the fit, with the answers that it recorded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import record
from xlpk.costs import CostFile, StepCosts, write_costs
from xlpk.errors import InputError
from xlpk.event_log import Log, read_events
from xlpk.fit import Fitted, Measured, fit
from xlpk.report import columns

MIN_STEPS = 100
_SAME = ("processor", "cores", "model", "dtype", "kv dtype", "backend", "orchestration", "threads")


@dataclass(frozen=True)
class Delays:
    """Mean nanoseconds between host and loop, by the clocks' calibration."""

    publish_ns: float
    submit_ns: float  # from the intended arrival: a late send is in it


@dataclass(frozen=True)
class Run:
    """A measured run, as far as a fit asks."""

    folder: Path
    facts: dict[str, str]  # _SAME: what all runs of a fit have alike
    steps: Measured
    delays: Delays


def read_run(folder: Path) -> Run:
    """A finished run folder. InputError naming it and what it lacks."""
    status, config = record.read_json(folder / record.STATUS), record.read_config(folder)
    if status.get("status") != "FINISHED":
        raise InputError("RUN", folder, "the folder of a finished run")
    if status.get("synthetic") or status.get("backend") == "hf":
        raise InputError(
            "RUN", folder, f"a run of our loop that was measured; this one has backend={status['backend']}"
        )
    log = Log(read_events(folder / record.EVENTS))
    if log.steps and "attended_tokens" not in log.steps[0]:
        raise InputError("RUN", folder, "a run whose steps say attended_tokens: measure it again")
    if len(log.steps) < MIN_STEPS:
        raise InputError("RUN", folder, f"at least {MIN_STEPS} steps; it has {len(log.steps)}")
    if config.get("sampling", {}).get("logprobs") is not None:  # the phase `filter` then does other work than filtering
        raise InputError("RUN", folder, "a run without sampling.logprobs")
    build = record.read_json(folder / record.BUILD)
    facts = {
        "processor": build.get("processor"),
        "cores": build.get("cores"),
        "model": status.get("model"),
        "dtype": config.get("model", {}).get("effective_dtype"),
        "kv dtype": config.get("kv", {}).get("effective_dtype"),
        "backend": status.get("backend"),
        "orchestration": status.get("orchestration"),
        "threads": build.get("backend", {}).get("threads"),
    }
    return Run(folder, {name: str(value) for name, value in facts.items()}, _steps(log), _delays(log))


def _steps(log: Log) -> Measured:
    def column(name: str) -> Any:
        return np.array([step[name] for step in log.steps], dtype=np.float64)

    control = np.array([step["phase_ns"].get("control", 0) for step in log.steps], dtype=np.float64)
    took = column("end_ns") - column("begin_ns")
    control = np.minimum(control, took)
    filters = np.array([step["phase_ns"].get("filter", 0) for step in log.steps], dtype=np.float64)
    filters = np.minimum(filters, took - control)
    names = ("n_rows", "n_sample_rows", "context_tokens", "attended_tokens", "n_moves")
    counts = {name: column(name) for name in names}
    # All requests of a run are sampled alike, so a step that has the phase has it for all of its sampled rows.
    counts["n_filter_rows"] = np.where(filters > 0, counts["n_sample_rows"], 0.0)
    return Measured(**counts, forward_ns=took - filters - control, filter_ns=filters, control_ns=control)


def _delays(log: Log) -> Delays:
    offset_ns = int(log.clock["offset_ns"]) if log.clock is not None else 0
    seen = [
        token["host_ns"] + offset_ns - token["device_ns"]
        for tokens in log.tokens.values()
        for token in ((tokens[0], tokens[-1]) if len(tokens) > 1 else tokens)
    ]
    publish_ns = max(0.0, float(np.mean(seen))) if seen else 0.0
    return Delays(publish_ns, _submit_ns(log, offset_ns))


def _submit_ns(log: Log, offset_ns: int) -> float:
    """How late the host sends, in the mean, and how long a loop that is idle takes to act on what was sent.

    While a step runs the loop looks at the ring when it ends: that wait is the simulator's own.
    """
    late: list[int] = []
    idle_ns: list[int] = []  # from the send until an idle loop admitted
    busy_ns: list[int] = []
    begins = [step["begin_ns"] for step in log.steps]
    for request_id, admitted in log.admitted.items():
        if request_id not in log.submits or request_id not in log.arrivals:
            continue
        sent_ns = log.submits[request_id]["host_ns"]
        late.append(sent_ns - log.arrivals[request_id]["host_ns"])
        took_ns = admitted["device_ns"] - offset_ns - sent_ns
        at = bisect_left(begins, admitted["device_ns"])
        idle = at == 0 or log.steps[at - 1]["end_ns"] < admitted["device_ns"]
        (idle_ns if idle else busy_ns).append(took_ns)
    if not late:
        return 0.0
    return max(0.0, float(np.mean(late)) + (float(np.mean(idle_ns)) if idle_ns else float(min(busy_ns))))


def same(runs: Sequence[Run]) -> None:
    """Raises InputError for a run that differs from the first one in what costs depend on."""
    first = runs[0]
    for run in runs[1:]:
        for name in _SAME:
            if run.facts[name] != first.facts[name]:
                raise InputError(
                    "RUN", run.folder, f"{name} {first.facts[name]}, as of {first.folder}; it has {run.facts[name]}"
                )


def calibrate(folders: Sequence[Path]) -> tuple[CostFile, Fitted]:
    """Measured runs of one machine, model and orchestration -> their costs. Raises InputError."""
    runs = [read_run(folder) for folder in folders]
    same(runs)
    names = list(Measured.__dataclass_fields__)
    steps = Measured(*(np.concatenate([getattr(run.steps, name) for run in runs]) for name in names))
    fitted = fit(steps)
    delays = {name: float(np.mean([getattr(run.delays, name) for run in runs])) for name in ("publish_ns", "submit_ns")}
    costs = StepCosts(**fitted.values, **delays)  # type: ignore[arg-type]
    facts = runs[0].facts
    about = {name: facts[name] for name in _SAME if name not in ("model", "orchestration")}
    quality = {
        "steps": len(steps),
        "held_out": fitted.n_held_out,
        "r2": round(fitted.r2, 4),
        "median_error": round(fitted.median_error, 4),
        "p95_error": round(fitted.p95_error, 4),
        "bias": round(fitted.bias, 4),
        "rows": [int(steps.n_rows.min()), int(steps.n_rows.max())],
        "attended_tokens": [int(steps.attended_tokens.min()), int(steps.attended_tokens.max())],
        "unidentified": list(fitted.unidentified),
    }
    measured = {"measured_on": about, "runs": [str(folder) for folder in folders], "fit": quality}
    return CostFile(costs, facts["model"], facts["orchestration"], measured), fitted


def table(file: CostFile, fitted: Fitted) -> str:
    """What was fitted, for people."""
    costs, quality = file.costs, file.facts["fit"]
    least, most = quality["rows"]
    filtered = (
        "filtered rows",
        ", ".join(f"{1 << i}: {ns / 1e3:.1f}" for i, ns in enumerate(costs.filter_ns[:8])) + " us",
    )
    rows = [
        ("costs of", f"model {file.model}, {file.orchestration}"),
        ("steps", f"{quality['steps']}, of {least} to {most} rows; {quality['held_out']} were held out of a first fit"),
        (
            "of these",
            f"R2 {fitted.r2:.4f}; relative error {fitted.median_error:.1%} (median), {fitted.p95_error:.1%} (p95)",
        ),
        ("their sum", f"predicted {fitted.bias:+.2%} off"),
        ("a step", f"{costs.fixed_ns / 1e3:.2f} us, control {costs.control_ns / 1e3:.2f} us"),
        (
            "rows",
            ", ".join(f"{1 << i}: {ns / 1e3:.1f}" for i, ns in enumerate(costs.row_ns) if 1 << i <= 2 * most) + " us",
        ),
        ("sampled rows", ", ".join(f"{1 << i}: {ns / 1e3:.1f}" for i, ns in enumerate(costs.sample_ns[:8])) + " us"),
        *([filtered] if any(costs.filter_ns) else []),
        ("a token of context", f"{costs.context_ns:.2f} ns, attended {costs.attended_ns:.3f} ns"),
        ("host", f"heard after {costs.submit_ns / 1e3:.1f} us, hears after {costs.publish_ns / 1e3:.1f} us"),
        ("not identified", ", ".join(fitted.unidentified) or "nothing"),
    ]
    return columns(rows, left=True)


def main(runs: Sequence[str], output: str, predict: Sequence[str], outputs: str) -> int:
    """The command: fits, writes, says how well; predicts what it is given."""
    from xlpk import prediction

    file, fitted = calibrate([Path(run) for run in runs])
    path = Path(output)
    try:
        write_costs(path, file)
    except OSError as error:
        raise InputError("-o", output, f"a file that can be written ({error.strerror})") from None
    print(f"{table(file, fitted)}\n\nwrote {path}; use it: backend=simulated backend.costs={path}")
    if not predict:
        return 0
    errors = {run: prediction.predict(Path(run), path, Path(outputs)) for run in predict}
    print(f"\n{prediction.table(errors)}")
    return 0
