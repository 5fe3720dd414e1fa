"""mode=mega_kernel_sim: one workload on the simulated loop once for each orchestration, and what sets them apart.

The run itself is the first one, `persistent`; its log and metrics stand where every run has them. The others leave
`events.NAME.jsonl` beside it, and every figure that is compared stands in metrics.json under its orchestration's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from xlpk import waterfall
from xlpk.hardware import ORCHESTRATIONS
from xlpk.kv import KVPlan
from xlpk.metrics import Metrics
from xlpk.model import Model
from xlpk.settings import Settings, SimulatedBackend
from xlpk.workload import Request

MODE = "mega_kernel_sim"
FIGURE = "waterfall.png"
_GROUPS = ("latency/", "throughput/", "host/", "loop/", "waterfall/")
_ROWS = (
    ("TTFT, mean, ms", "latency/ttft_ms.mean", "{:.3f}"),
    ("TTFT, p50, ms", "latency/ttft_ms.p50", "{:.3f}"),
    ("TTFT, p90, ms", "latency/ttft_ms.p90", "{:.3f}"),
    ("ITL, mean, ms", "latency/itl_ms.mean", "{:.4f}"),
    ("ITL, p50, ms", "latency/itl_ms.p50", "{:.4f}"),
    ("E2E, mean, ms", "latency/e2e_ms.mean", "{:.2f}"),
    ("tokens/s", "throughput/tokens_per_s", "{:,.1f}"),
    ("launches a token", "host/launches.per_output_token", "{:.4f}"),
    ("syncs a token", "host/syncs.per_output_token", "{:.4f}"),
    ("device idle", "loop/device_idle_share", "{:.1%}"),
)


def log_name(orchestration: str) -> str:
    """The event log of an orchestration, in the run's folder."""
    return "events.jsonl" if orchestration == ORCHESTRATIONS[0] else f"events.{orchestration}.jsonl"


LOGS = tuple(log_name(name) for name in ORCHESTRATIONS[1:])


def run_others(settings: Settings, model: Model, plan: KVPlan, requests: list[Request], folder: Path) -> None:
    """Serves the workload under every orchestration but the first, each into its log."""
    from xlpk import engine
    from xlpk.event_writer import EventLog

    assert isinstance(settings.backend, SimulatedBackend)
    for name in ORCHESTRATIONS[1:]:
        backend, run = replace(settings.backend, orchestration=name), replace(settings.run, trace=False)
        other = replace(settings, backend=backend, run=run)
        with EventLog(folder / log_name(name)) as log:
            engine.serve(other, model, plan, requests, engine.make_backend, log, engine.Outcome())


def compared(folder: Path) -> Metrics:
    """What is compared, of every orchestration, as `NAME/group/metric`."""
    from xlpk import metrics

    out: Metrics = {}
    for name in ORCHESTRATIONS:
        path = folder / log_name(name)
        values = metrics.compute(metrics.read_events(path)) if path.exists() else {}
        out |= {f"{name}/{key}": value for key, value in values.items() if key.startswith(_GROUPS)}
    return out


def names_in(values: Mapping[str, object]) -> list[str]:
    """The orchestrations that the metrics of a run compare; none but in this mode."""
    return [name for name in ORCHESTRATIONS if f"{name}/loop/steps" in values]


def bars(values: Metrics) -> list[tuple[str, dict[str, float]]]:
    """(name, milliseconds a token by part) of each orchestration; of another simulated run its own."""
    names = names_in(values)
    if not names:
        own = waterfall.parts(values)
        return [("", own)] if own else []
    return [(name, waterfall.parts(values, f"{name}/")) for name in names]


def tables(values: Metrics) -> list[list[tuple[str, ...]]]:
    """Rows of cells: the figures of each orchestration, then the waterfalls; none for a run that was not simulated."""
    names = names_in(values)
    out: list[list[tuple[str, ...]]] = []
    if names:
        rows: list[tuple[str, ...]] = [("simulated", *names)]
        for title, key, form in _ROWS:
            cells = [_cell(values.get(f"{name}/{key}"), form) for name in names]
            if any(cell != "-" for cell in cells):
                rows.append((title, *cells))
        out.append(rows)
    if drawn := bars(values):
        out.append(_waterfall(drawn))
    return out


def _waterfall(drawn: Sequence[tuple[str, dict[str, float]]]) -> list[tuple[str, ...]]:
    parts = list(dict.fromkeys(part for _, bar in drawn for part in bar))
    rows = [("where a token's time goes, us", *(cell for name, _ in drawn for cell in (name, "")))]
    for part in parts:
        cells = []
        for _, bar in drawn:
            share = bar.get(part, 0.0) / sum(bar.values())
            cells += [f"{1e3 * bar[part]:,.2f}", f"{share:.1%}"] if part in bar else ["-", ""]
        rows.append((part, *cells))
    sums = [cell for _, bar in drawn for cell in (f"{1e3 * sum(bar.values()):,.2f}", "")]
    return [*rows, ("all: E2E / tokens", *sums)]


def _cell(value: float | int | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def write_figure(folder: Path, values: Metrics) -> None:
    """The waterfalls as a picture in the run's folder."""
    from xlpk import plot_style, plots

    plot_style.save(folder / FIGURE, plots.waterfalls, bars(values))
