"""The comparison of a sweep's points, from their folders alone: the table and sweep.csv."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlpk import record, sweep_folder
from xlpk.report import columns, text_of

COMPARED = (  # heading, key, format
    ("tokens/s", "throughput/tokens_per_s", "{:.1f}"),
    ("ttft p50 ms", "latency/ttft_ms.p50", "{:.2f}"),
    ("device itl p50 ms", "device_latency/itl_ms.p50", "{:.3f}"),  # steps shorter than the host's poll come in bunches
    ("accepted", "spec/acceptance_rate", "{:.1%}"),
    ("tokens/verify", "spec/acceptance_length", "{:.2f}"),
    ("steps", "loop/steps", "{:.0f}"),
    ("device idle", "loop/device_idle_share", "{:.1%}"),
    ("launches/token", "host/launches.per_output_token", "{:.4f}"),
)
MEASURED = (  # shown where a run measured it
    ("goodput/s", "throughput/goodput_per_s", "{:.1f}"),
    ("within SLO", "requests/slo_met_share", "{:.1%}"),
    ("perplexity", "quality/perplexity", "{:.4f}"),
    ("KL nats", "quality/kl_nats.mean", "{:.1e}"),
    ("same top-1", "quality/top1_agreement", "{:.2%}"),
)


@dataclass
class Point:
    """What the files of one point say."""

    folder: Path
    status: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return str(self.status.get("status", "?"))

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(map(str, self.status.get("overrides", [])))

    @property
    def repetition(self) -> int:
        return int(self.status.get("repetition", 0))

    @property
    def name(self) -> str:
        return str(self.status.get("name") or self.folder.name)


class Points:
    """The points of a sweep, read again only where a status file has changed."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self._known: dict[Path, tuple[int, Point]] = {}

    def read(self) -> list[Point]:
        points = []
        for folder in sweep_folder.points_of(self.sweep):
            try:
                written_ns = os.stat(folder / record.STATUS).st_mtime_ns
            except OSError:
                continue
            known = self._known.get(folder)
            if known is None or known[0] != written_ns:
                known = (written_ns, read_point(folder))
                self._known[folder] = known
            points.append(known[1])
        return points

    def known(self) -> list[Point]:
        """As the last look found them."""
        return [point for _, point in self._known.values()]


def read_point(folder: Path) -> Point:
    status = record.read_json(folder / record.STATUS)
    ended = status.get("status") in sweep_folder.ENDED
    return Point(folder, status, record.read_json(folder / record.METRICS) if ended else {})


def differing(points: Sequence[Point]) -> list[dict[str, str]]:
    """Of each point the overrides that not all points share."""
    split = [dict(text.partition("=")[::2] for text in point.overrides) for point in points]
    every = dict.fromkeys(key for one in split for key in one)
    keys = [key for key in every if len({one.get(key) for one in split}) > 1]
    return [{key: one[key] for key in keys if key in one} for one in split]


def sweep_table(points: Sequence[Point]) -> str:
    """The comparison, a row a configuration: medians over its repetitions; whether its text is that of the first row.

    Below it each point that did not finish, with its reason.
    """
    repeated = any(point.repetition for point in points)
    rows: list[tuple[str, ...]] = []
    compared = [*COMPARED, *(one for one in MEASURED if any(one[1] in point.metrics for point in points))]
    heading = ["point", *(["runs"] if repeated else []), *(title for title, _, _ in compared), "same text"]
    configurations: dict[tuple[str, ...], list[Point]] = {}
    labels: dict[tuple[str, ...], str] = {}
    for point, differs in zip(points, differing(points), strict=True):
        configurations.setdefault(point.overrides, []).append(point)
        labels[point.overrides] = " ".join(f"{key}={value}" for key, value in differs.items())
    first: str | None = None
    for key, members in configurations.items():
        done = [point for point in members if point.state == "FINISHED"]
        label = labels[key] or str(members[0].status.get("mode", members[0].folder.name))
        runs = [f"{len(done)} of {len(members)}" if len(done) < len(members) else str(len(done))] if repeated else []
        if not done:
            rows.append((label, *runs, *("-" for _ in compared), members[-1].state))
            continue
        texts = {text_of(point.folder) for point in done}
        is_first = first is None
        first = next(iter(texts)) if is_first else first
        same = "-" if is_first and len(texts) == 1 else "yes" if texts == {first} else "no"
        rows.append((label, *runs, *(_median(done, metric, form) for _, metric, form in compared), same))
    lines = [columns([tuple(heading), *rows])]
    unfinished = [point for point in points if point.state != "FINISHED"]
    if unfinished:
        lines.append("")
    lines += [f"{point.folder.name}: {point.name}: {_reason(point)}" for point in unfinished]
    simulated = sum(bool(point.status.get("synthetic")) for point in points)
    if simulated:
        lines += ["", f"SYNTHETIC: {simulated} of {len(points)} points are simulations; nothing was computed in them"]
    return "\n".join(lines)


def _reason(point: Point) -> str:
    error = point.status.get("error")
    return f"{point.state}: {error}" if error else point.state


def _median(points: Sequence[Point], key: str, form: str) -> str:
    found = [point.metrics[key] for point in points if key in point.metrics]
    if not found:
        return "-"
    values = [value for value in found if value is not None]
    return form.format(statistics.median(values)) if values else record.TOO_FEW


def write_sweep_csv(sweep: Path, points: Sequence[Point]) -> Path:
    """sweep.csv: a row a point; status, what differs, every metric."""
    differs = differing(points)
    fixed = ["point", "repetition", "status", "exit_code", "mode"]
    varied = list(dict.fromkeys(key for one in differs for key in one if key not in fixed))
    measured = list(dict.fromkeys(key for point in points for key in point.metrics))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(fixed + varied + measured)
    for point, differ in zip(points, differs, strict=True):
        row = [point.folder.name, point.repetition, *(point.status.get(key) for key in fixed[2:])]
        varying = [differ.get(key, "") for key in varied]
        writer.writerow(row + varying + [point.metrics.get(key, "") for key in measured])
    path = sweep / sweep_folder.CSV
    record.write_text(path, buffer.getvalue())
    return path
