"""Run folders as a report reads them, whatever state they are in: finished, failed, refused, damaged, empty.

What a file cannot give is left out and named in `RunData.problems`; nothing here raises for a bad file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

from xlpk import event_log, record, sweep_folder
from xlpk.errors import InputError
from xlpk.event_log import Log, Record

Array = npt.NDArray[np.float64]

MAX_LOG_BYTES = 200 << 20  # of an event log: a million tokens, seven seconds, and ten times that as objects
TOKEN = b'{"event":"token"'  # as the engine writes it
MAX_INT = 1 << 60  # of a field: what fits a device word
_ROWS = ("n_prefill_rows", "n_decode_rows", "n_draft_rows")
_PAGES = ("pages_active", "pages_locked", "pages_draft", "pages_total")
NEEDED = {  # integers without which a record says nothing
    "clock": ("offset_ns",),
    "arrival": ("request_id", "host_ns"),
    "submit": ("request_id", "host_ns"),
    "finished": ("request_id",),
    "token": ("request_id", "step", "host_ns", "output_index", "n_drafts", "n_accepted"),
    "step": ("step", "begin_ns", "end_ns", "n_tokens", *_ROWS, *_PAGES),
}


@dataclass
class Steps:
    """The measured steps, an entry each, by the device's clock from the beginning of the first."""

    end_s: Array
    took_ms: Array
    prefill_rows: Array
    decode_rows: Array
    draft_rows: Array
    active_bytes: Array
    locked_bytes: Array
    draft_bytes: Array
    total_bytes: float


@dataclass
class Timeline:
    """What an event log says about time and drafts. `clock`: whose times these are, `device` or `host`."""

    clock: str
    steps: Steps
    itl_s: Array  # when a token became visible, after the first step began (host clock: after the first arrival)
    itl_ms: Array  # its share of the gap before it
    ttft_ms: Array  # by the host's clock
    drafts: npt.NDArray[np.int64]  # of each verification
    accepted: npt.NDArray[np.int64]
    outputs: list[int]  # tokens of each request
    spec: dict[str, Any]
    acceptance: dict[str, Any]


@dataclass
class RunData:
    """One run folder. `status` is FINISHED, FAILED, REFUSED, RUNNING, or `no status`."""

    folder: Path
    status: str
    facts: dict[str, Any] = field(default_factory=dict)  # status.json
    metrics: dict[str, float | None] = field(default_factory=dict)  # None: withheld
    problems: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.status == "FINISHED"

    @property
    def overrides(self) -> tuple[str, ...]:
        value = self.facts.get("overrides")
        return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()

    @property
    def repetition(self) -> int:
        value = self.facts.get("repetition")
        return value if isinstance(value, int) else 0

    @property
    def config(self) -> dict[str, Any]:
        try:
            return record.read_config(self.folder)
        except (YAMLError, UnicodeDecodeError, ValueError, RecursionError):
            return {}

    @property
    def build(self) -> dict[str, Any]:
        return _json(self.folder / record.BUILD)[0]


def find(arguments: Sequence[Path]) -> list[list[RunData]]:
    """The runs of each argument: of a run folder itself, of a sweep its points in order."""
    out = []
    for argument in arguments:
        if not argument.is_dir():
            raise InputError("RUN_OR_SWEEP", argument, "a folder of a run or of a sweep")
        folders = [argument] if _is_run(argument) else points(argument)
        if not folders:
            raise InputError("RUN_OR_SWEEP", argument, "a folder of a run or of a sweep; it holds neither")
        out.append([read(folder) for folder in folders])
    return out


def points(sweep: Path) -> list[Path]:
    """Folders of a sweep that are points, begun or only made."""
    try:
        found = [place for place in sweep.iterdir() if place.is_dir() and (_is_run(place) or place.name.isdecimal())]
    except OSError:
        return []
    return sorted(found, key=lambda place: (len(place.name), place.name))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in record.FILES)


def read(folder: Path) -> RunData:
    """Status and metrics; the event log only when `timeline` is asked for."""
    facts, problem = _json(folder / record.STATUS)
    status = facts.get("status")
    run = RunData(folder, status if isinstance(status, str) else "no status", facts)
    if problem:
        run.problems.append(problem)
    if run.status == "RUNNING" and not _alive(folder, facts):
        run.status = "FAILED"
        run.problems.append("its process ended without a word")
    values, problem = _json(folder / record.METRICS)
    if problem and run.finished:
        run.problems.append(problem)
    run.metrics = {key: value for key, value in values.items() if value is None or _is_number(value)}
    if run.status == "no status" and not any((folder / name).exists() for name in record.FILES):
        run.problems = ["an empty folder: the point never began"]
    return run


def _alive(folder: Path, facts: dict[str, Any]) -> bool:
    pid = facts.get("pid")
    return not isinstance(pid, int) or not 0 < pid < 1 << 31 or sweep_folder.is_alive(folder, facts)


def _json(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a file, and what is wrong with it."""
    try:
        os.stat(path)
    except OSError:
        return {}, f"no {path.name}"
    try:
        value = record.read_json(path)
    except (ValueError, RecursionError):
        value = {}
    return value, None if value else f"{path.name} cannot be read"


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) < MAX_INT if isinstance(value, float) else abs(value) < MAX_INT


def timeline(run: RunData, tokens: bool = True) -> Timeline | None:
    """From the event log; None, with the reason among the run's problems, where it holds no measured step.

    Without `tokens`, in a fifth of the time, it has the steps alone.
    """
    path = run.folder / record.EVENTS
    try:
        size = path.stat().st_size
        if size > MAX_LOG_BYTES:
            run.problems.append(f"{path.name} has {size >> 20} MiB, more than the {MAX_LOG_BYTES >> 20} of a plot")
            return None
        with path.open("rb") as file:
            lines = (line for line in file if tokens or not line.startswith(TOKEN))
            records, n_bad = _sound(map(event_log.parse, lines))
    except OSError:
        run.problems.append(f"no {path.name}")
        return None
    if n_bad:
        run.problems.append(f"{path.name}: {n_bad} damaged records left out")
    log = Log(records)
    if not log.steps:
        run.problems.append(f"{path.name} holds no measured step")
        return None
    return _timeline(log)


def _sound(records: Iterable[Record | None]) -> tuple[list[Record], int]:
    """The records that hold what their kind needs, and the number of the others."""
    kept: list[Record] = []
    n_bad = 0
    for one in records:
        if one is None or not isinstance(kind := one.get("event"), str):
            n_bad += 1
        elif all(_is_word(one.get(name)) for name in NEEDED.get(kind, ())):
            kept.append(one)
        else:
            n_bad += 1
    return kept, n_bad


def _is_word(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_INT


def _timeline(log: Log) -> Timeline:
    def column(name: str) -> Array:
        return np.array([step[name] for step in steps], dtype=np.float64)

    steps = sorted(log.steps, key=lambda step: int(step["end_ns"]))
    begin_ns = min(step["begin_ns"] for step in steps)
    kv = log.header.get("kv")
    held = kv.get("page_bytes") if isinstance(kv, dict) else None
    page_bytes = held if isinstance(held, int) and _is_word(held) else 0
    by_device = log.clock is not None and all(
        _is_word(token.get("device_ns")) for tokens in log.tokens.values() for token in tokens
    )
    if by_device:
        samples = event_log.latencies(log, "device_ns", 0)["itl"]
    else:
        samples = event_log.latencies(log, "host_ns", 0)["itl"]
        begin_ns = min((arrival["host_ns"] for arrival in log.arrivals.values()), default=0)
    samples.sort()
    ttft = event_log.latencies(log, "host_ns", 0)["ttft"]
    verified = log.verifications()
    return Timeline(
        clock="device" if by_device else "host",
        steps=Steps(
            end_s=(column("end_ns") - min(step["begin_ns"] for step in steps)) / 1e9,
            took_ms=(column("end_ns") - column("begin_ns")) / 1e6,
            prefill_rows=column("n_prefill_rows"),
            decode_rows=column("n_decode_rows"),
            draft_rows=column("n_draft_rows"),
            active_bytes=column("pages_active") * page_bytes,
            locked_bytes=column("pages_locked") * page_bytes,
            draft_bytes=column("pages_draft") * page_bytes,
            total_bytes=float(steps[0]["pages_total"] * page_bytes),
        ),
        itl_s=np.array([at_ns - begin_ns for at_ns, _ in samples], dtype=np.float64) / 1e9,
        itl_ms=np.array([value_ns for _, value_ns in samples], dtype=np.float64) / 1e6,
        ttft_ms=np.array([value_ns for _, value_ns in ttft], dtype=np.float64) / 1e6,
        drafts=np.array([drafts for drafts, _ in verified], dtype=np.int64),
        accepted=np.array([accepted for _, accepted in verified], dtype=np.int64),
        outputs=[len(tokens) for tokens in log.tokens.values()],
        spec=_dict(log.header.get("spec")),
        acceptance=_dict(log.header.get("acceptance")),
    )


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
