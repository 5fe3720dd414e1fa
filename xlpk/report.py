"""Tables for people, from run folders alone: one run, and the comparison of a sweep with its sweep.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from xlpk import record
from xlpk.metrics import Metrics
from xlpk.units import format_bytes

LATENCIES = (
    ("ttft", "time to first token"),
    ("itl", "between tokens"),
    ("tpot", "per output token"),
    ("step_gap", "between publishing steps"),
    ("e2e", "whole request"),
)
COMPARED = (  # heading, key, format
    ("tokens/s", "throughput/tokens_per_s", "{:.1f}"),
    ("ttft p50 ms", "latency/ttft_ms.p50", "{:.2f}"),
    ("device itl p50 ms", "device_latency/itl_ms.p50", "{:.3f}"),  # steps shorter than the host's poll come in bunches
    ("accepted", "spec/acceptance_rate", "{:.1%}"),
    ("tokens/verify", "spec/acceptance_length", "{:.2f}"),
    ("steps", "loop/steps", "{:d}"),
    ("device idle", "loop/device_idle_share", "{:.1%}"),
    ("launches/token", "host/launches.per_output_token", "{:.4f}"),
)
MAX_SHOWN = 1000  # characters of a prompt or a completion
current_sweep: Path | None = None  # set when Hydra starts one, taken by run.main when Hydra has left, failed or not


class SweepCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Remembers the sweep's folder. Not on_multirun_end: Hydra 1.3 skips that one when a job has failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global current_sweep
        current_sweep = Path(str(config.hydra.sweep.dir)).resolve()


def columns(rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """Rows of cells as aligned text; the first column is left-aligned, the others right unless `left`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.ljust(width) if left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cell(metrics: dict[str, Any], key: str, form: str) -> str:
    if key not in metrics:
        return "-"
    value = metrics[key]
    return record.TOO_FEW if value is None else form.format(value)


def run_table(folder: Path) -> str:
    """One run in a screen: what ran, latencies, and what the loop and the host did."""
    metrics, status = record.read_json(folder / record.METRICS), record.read_json(folder / record.STATUS)
    lossless = "lossless" if status.get("lossless") else "lossy"
    out = [
        f"{status.get('mode')} on {status.get('backend')} ({status.get('orchestration')}), "
        f"model {status.get('model')}, "
        f"drafts {status.get('spec')}, acceptance {status.get('acceptance')} ({lossless}): {status.get('status')}"
    ]
    for group, clock, names in (("latency", "host", LATENCIES), ("device_latency", "device", LATENCIES[:2])):
        rows: list[tuple[str, ...]] = [(f"by {clock} clock, ms", "mean", "p50", "95 % interval", "p90", "p99", "n")]
        for name, title in names:
            key = f"{group}/{name}_ms"
            if f"{key}.p50" in metrics:
                interval = f"{metrics[f'{key}.p50_low']:.3f} .. {metrics[f'{key}.p50_high']:.3f}"
                cells = [_cell(metrics, f"{key}.{stat}", "{:.3f}") for stat in ("mean", "p50", "p90", "p99")]
                rows.append((f"{title} ({name})", *cells[:2], interval, *cells[2:], str(metrics[f"{key}.n"])))
        if len(rows) > 1:
            out += ["", columns(rows)]
    out += ["", columns(_facts(metrics), left=True)]
    return "\n".join(out)


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    def number(key: str, form: str) -> str:
        return _cell(metrics, key, form)

    facts = [
        ("requests", f"{number('requests/finished', '{:d}')} of {number('requests/total', '{:d}')} finished"),
        ("output", f"{number('requests/output_tokens', '{:d}')} tokens in {number('throughput/window_s', '{:.3f}')} s"),
        ("throughput", f"{number('throughput/tokens_per_s', '{:.1f}')} tokens/s"),
        (
            "loop",
            f"{number('loop/steps', '{:d}')} steps, {number('loop/tokens_per_step.mean', '{:.2f}')} tokens each, "
            f"{number('loop/step_ms.p50', '{:.3f}')} ms (p50)",
        ),
        (
            "host, whole session",
            f"{number('host/launches', '{:d}')} launches, {number('host/syncs', '{:d}')} syncs, "
            f"{number('host/h2d_copies', '{:d}')} + {number('host/d2h_copies', '{:d}')} copies; "
            f"{number('host/launches.per_output_token', '{:.4f}')} launches a token",
        ),
    ]
    if "spec/proposed" in metrics:
        drafts = f"{number('spec/accepted', '{:d}')} of {number('spec/proposed', '{:d}')} drafts accepted"
        facts.append(
            (
                "speculation",
                f"{drafts} ({number('spec/acceptance_rate', '{:.1%}')}), "
                f"{number('spec/acceptance_length', '{:.2f}')} tokens a verification",
            )
        )
    if "kv/active_bytes.peak" in metrics:
        peak = metrics["kv/active_bytes.peak"] or 0
        facts.append(
            (
                "KV",
                f"{format_bytes(peak)} active at most, {number('kv/usage.peak', '{:.1%}')} of the pages, "
                f"fragmentation {number('kv/fragmentation.mean', '{:.1%}')} (mean)",
            )
        )
    warmup = f"{number('warmup/steps', '{:d}')} steps, {number('warmup/tokens', '{:d}')} tokens"
    facts.append(("warm-up, left out", warmup))
    return facts


def points_of(sweep: Path) -> list[Path]:
    """The folders of a sweep's points, in order."""
    found = [place for place in sweep.iterdir() if (place / record.STATUS).exists()] if sweep.is_dir() else []
    return sorted(found, key=lambda place: (len(place.name), place.name))


def _differing(points: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of each point the overrides that not all points share."""
    split = [dict(text.partition("=")[::2] for text in status.get("overrides", [])) for status in points]
    every = dict.fromkeys(key for one in split for key in one)
    keys = [key for key in every if len({one.get(key) for one in split}) > 1]
    return [{key: one[key] for key in keys if key in one} for one in split]


def sweep_table(folders: Sequence[Path]) -> str:
    """The comparison, a row a point; whether its text equals that of the first point that finished."""
    statuses = [record.read_json(folder / record.STATUS) for folder in folders]
    done = [status.get("status") == "FINISHED" for status in statuses]
    texts = [_text(folder) if finished else None for folder, finished in zip(folders, done, strict=True)]
    first = next((i for i, text in enumerate(texts) if text is not None), None)
    rows = [("point", *(heading for heading, _, _ in COMPARED), "same text")]
    for i, (folder, status, differs) in enumerate(zip(folders, statuses, _differing(statuses), strict=True)):
        metrics = record.read_json(folder / record.METRICS)
        label = " ".join(f"{key}={value}" for key, value in differs.items()) or str(status.get("mode", folder.name))
        if status.get("status") == "FINISHED":
            same = "-" if i == first else "yes" if first is not None and texts[i] == texts[first] else "no"
            rows.append((label, *(_cell(metrics, key, form) for _, key, form in COMPARED), same))
        else:
            rows.append((label, *("-" for _ in COMPARED), str(status.get("status", "?"))))
    return columns(rows)


def _text(folder: Path) -> str | None:
    try:
        return (folder / record.TEXT).read_text(encoding="utf-8")
    except OSError:
        return None


def write_sweep_csv(sweep: Path, folders: Sequence[Path]) -> Path:
    """sweep.csv: a row a point; status, what differs, every metric."""
    statuses = [record.read_json(folder / record.STATUS) for folder in folders]
    metrics = [record.read_json(folder / record.METRICS) for folder in folders]
    differs = _differing(statuses)
    fixed = ["point", "status", "exit_code", "mode"]
    varied = list(dict.fromkeys(key for one in differs for key in one if key not in fixed))
    measured = list(dict.fromkeys(key for one in metrics for key in one))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(fixed + varied + measured)
    for folder, status, differ, values in zip(folders, statuses, differs, metrics, strict=True):
        row = [folder.name, status.get("status"), status.get("exit_code"), status.get("mode")]
        writer.writerow(row + [differ.get(key, "") for key in varied] + [values.get(key, "") for key in measured])
    path = sweep / "sweep.csv"
    record.write_text(path, buffer.getvalue())
    return path


def completion(folder: Path) -> str:
    """The first request of a run in words: its prompt and, marked, what the model added."""
    text = _text(folder) or ""
    head, _, rest = text.partition("=== request 0: prompt\n")[2].partition("\n=== request 0: completion\n")
    added = rest.partition("\n=== request 1: prompt")[0].rstrip()
    shown = head if len(head) <= MAX_SHOWN else "..." + head[-MAX_SHOWN:]
    return f"{shown}>>>{added if len(added) <= MAX_SHOWN else added[:MAX_SHOWN] + '...'}"


def ui_command(uri: str) -> str:
    """What to type to see the store."""
    if uri.startswith(("http:", "https:")):
        return f"open {uri}"
    default = f"sqlite:///{Path.cwd() / 'outputs' / 'mlflow.db'}"
    return f"{record.program()} ui" if uri == default else f"{record.program()} ui --store {uri}"
