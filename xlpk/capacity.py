"""`xlpk capacity`: how many instances serve a workload within its objectives, by the compiled control plane.

The config is that of a run with `backend=simulated`: model, hardware or calibrated costs, KV budget, scheduler,
workload and objectives (`slo`). fleet.py simulates and searches; this is the command: what is typed, table and files.
"""

from __future__ import annotations

import csv
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlpk.errors import InputError, exit_code_of, is_foreseen, one_line
from xlpk.fleet import MAX_FLEET, Point, Question, question, search
from xlpk.terminal import complain, standard_output

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from xlpk.settings import Settings

DEFAULTS = {
    "backend": "simulated",
    "mode": "serial_decode",
    "tracking": "none",
}  # where neither they nor an overlay are typed
_TABLE = (
    ("fleet", "fleet", "{}"),
    ("enough", "enough", "{}"),
    ("goodput_per_s", "goodput/s", "{:.2f}"),
    ("met_share", "good", "{:.1%}"),
    ("ttft_ms_p50", "ttft p50", "{:,.0f}"),
    ("ttft_ms_p99", "ttft p99, ms", "{:,.0f}"),
    ("tpot_ms_p50", "tpot p50", "{:.1f}"),
    ("tpot_ms_p99", "tpot p99, ms", "{:.1f}"),
    ("busy_share", "busy", "{:.0%}"),
    ("hit_rate", "hits", "{:.0%}"),
    ("preemptions", "preempted", "{:,}"),
)


def main(overrides: Sequence[str], fleet: str | None, router: str, good: float = 0.99, affinity_blocks: int = 1) -> int:
    """-> exit code: 1 if no fleet was enough, 2 bad input, 3 no compiler."""
    from xlpk import config, run

    config.register()
    codes: list[int] = []

    def task(cfg: DictConfig) -> None:
        try:
            codes.append(_answer(cfg, list(overrides), fleet, router, good, affinity_blocks))
        except Exception as error:
            if not is_foreseen(error):
                raise
            complain(one_line(error))
            codes.append(exit_code_of(error))

    typed = {text.partition("=")[0].lstrip("+~") for text in overrides}
    defaults = DEFAULTS if "experiment" not in typed else {}
    argv = [f"{name}={value}" for name, value in defaults.items() if name not in typed]
    code = run.compose_and_run([*argv, *overrides, "hydra.run.dir=."], task)  # type: ignore[arg-type]
    return code or next(iter(codes), 0)


def _answer(
    cfg: DictConfig, overrides: list[str], fleet: str | None, router: str, good: float, affinity_blocks: int
) -> int:
    from xlpk import config

    sizes = fleets(fleet)
    settings = config.validate(cfg)
    asked, notes = question(settings, router, good, affinity_blocks)
    for note in notes:
        complain(note)
    outputs = Path(settings.run.outputs).resolve()
    points = []
    for point in search(lambda size: asked.measure(outputs / "cache", size), sizes):
        points.append(point)
        complain(f"fleet of {point.fleet}: {point.met_share:.1%} good, {point.simulated_in_s:.1f} s")
    points.sort(key=lambda one: one.fleet)
    verdict = answer(asked, settings, points)
    folder = outputs / "capacity" / time.strftime("%Y-%m-%d") / f"{time.strftime('%H-%M-%S')}-{secrets.token_hex(2)}"
    smallest = min((point.fleet for point in points if point.enough), default=None)
    facts: dict[str, Any] = {
        "overrides": overrides,
        "router": router,
        "affinity_blocks": affinity_blocks,
        "good": good,
        "slo": asked.slo,
        "smallest": smallest,
        "verdict": verdict,
    }
    write(folder, cfg, points, facts)
    with standard_output():
        print_points(points)
        print(verdict)
        print(f"{folder / 'capacity.csv'}")
        print(json.dumps({"smallest": smallest, **asked.slo, "folder": str(folder)}))
    return 0 if smallest is not None else 1


def fleets(text: str | None) -> list[int] | None:
    """`8`, `1-16`, `1,2,4-6` -> sizes in order; None: as many as it takes. Raises InputError."""
    if text is None:
        return None
    sizes: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError:
            low = high = 0
        if not 1 <= low <= high <= MAX_FLEET:
            raise InputError("--fleet", text, f"sizes from 1 to {MAX_FLEET}, such as 8, 1-16 or 1,2,4-6")
        sizes.update(range(low, high + 1))
    return sorted(sizes)


def print_points(points: Sequence[Point]) -> None:
    """A line a fleet."""
    rows = [[head for _, head, _ in _TABLE]]
    for point in points:
        values = asdict(point) | {"enough": "yes" if point.enough else "no"}
        rows.append([form.format(values[name]) for name, _, form in _TABLE])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def answer(asked: Question, settings: Settings, points: Sequence[Point]) -> str:
    """The verdict in a sentence, with what it rests on."""
    goals = ", ".join(f"{name.removesuffix('_ms')} within {ms:g} ms" for name, ms in asked.slo.items())
    choice: Any = settings.backend
    basis = f"costs of {choice.costs}" if choice.costs else f"uncalibrated costs of hardware={settings.hardware.name}"
    smallest = min((point.fleet for point in points if point.enough), default=None)
    if smallest is None:
        found = f"none of the fleets up to {max(point.fleet for point in points)} is enough"
    else:
        untried = min(point.fleet for point in points) == smallest > 1
        found = (
            f"{smallest} instance{'s' * (smallest > 1)} {'are enough, fewer were not tried' if untried else 'it takes'}"
        )
    return f"{found}: {goals} for {100 * asked.good:g} % of {len(asked.workload):,} requests each (projected: {basis})"


def write(folder: Path, cfg: DictConfig, points: Sequence[Point], facts: dict[str, Any]) -> None:
    """FOLDER/capacity.csv, config.yaml and capacity.json."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True)
    with (folder / "capacity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [item.name for item in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rounded(asdict(point)) for point in points)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (folder / "capacity.json").write_text(json.dumps(facts, indent=1) + "\n")


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}
