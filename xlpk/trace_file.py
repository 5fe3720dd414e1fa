"""What `run.trace=on` leaves in a run folder: decisions.npy, spans.npy, and trace.json.gz of them and the event log.

The arrays are what was recorded, of layout.TRACE_ENTRY and trace.SPAN; `xlpk trace FOLDER` makes the timeline again. It
is JSON, since chrome://tracing takes nothing else, and compressed, since both viewers take that and it is a tenth the
size.
"""

from __future__ import annotations

import gzip
import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.errors import InputError
from xlpk.event_log import read_events
from xlpk.settings import MAX_TRACE_SPANS
from xlpk.trace import SPAN, chrome_events, simulated_spans

TRACE, DECISIONS, SPANS = "trace.json.gz", "decisions.npy", "spans.npy"
VIEWER = "https://ui.perfetto.dev"
_EVENTS = "events.jsonl"  # as xlpk/record.py calls it
_LEVEL = 4  # of gzip: half the time of the usual 6, a tenth more bytes


def save(folder: Path, backend: Any) -> dict[str, int]:
    """Writes what a closed backend recorded; how much that is and how much was lost, for the event log."""
    decisions = backend.decisions()
    spans, lost_spans = backend.spans() if hasattr(backend, "spans") else (np.zeros(0, SPAN), 0)
    np.save(folder / DECISIONS, decisions)
    np.save(folder / SPANS, spans)
    return {
        "decisions": len(decisions),
        "lost_decisions": backend.lost_decisions,
        "spans": len(spans),
        "lost_spans": lost_spans,
    }


def write(folder: Path) -> list[str]:
    """Makes trace.json.gz of a run folder; what it lacks, a line each. InputError: the folder has no trace."""
    if not (folder / DECISIONS).exists():
        raise InputError("RUN_DIR", folder, f"the folder of a run with run.trace=on, which leaves {DECISIONS} in it")
    decisions = _load(folder / DECISIONS, layout.TRACE_ENTRY.dtype)
    spans = _load(folder / SPANS, SPAN)
    records = read_events(folder / _EVENTS)
    about = next((record for record in records if record["event"] == "trace"), {})
    header = records[0] if records and records[0]["event"] == "header" else {}
    if header.get("backend") == "simulated":
        spans = simulated_spans(records, decisions)
    clock = next((record for record in records if record["event"] == "clock"), {})
    told: dict[str, Any] = {
        key: header[key] for key in ("xlpk", "model", "mode", "backend", "orchestration") if key in header
    }
    told |= {f"clock_{key}": clock[key] for key in ("offset_ns", "error_ns") if key in clock}
    told |= {key: about[key] for key in ("lost_decisions", "lost_spans") if key in about}
    beside = folder / (TRACE + ".part")
    with gzip.open(beside, "wt", compresslevel=_LEVEL, encoding="utf-8") as file:
        file.write(f'{{"displayTimeUnit":"ns","otherData":{json.dumps(told)},"traceEvents":[\n')
        events = chrome_events(records, decisions, spans)
        first = next(events, None)
        file.writelines(chain([first or ""], (f",\n{event}" for event in events)))
        file.write("\n]}\n")
    beside.replace(folder / TRACE)
    return _warnings(about)


def _load(path: Path, dtype: np.dtype[np.void]) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(str(path), type(error).__name__, "an array that numpy can load") from None
    if array.dtype != dtype or array.ndim != 1:
        raise InputError(str(path), f"{array.ndim} dimensions of {array.dtype}", f"one dimension of {dtype}")
    return array  # type: ignore[no-any-return]


def _warnings(about: dict[str, Any]) -> list[str]:
    out = []
    if lost := about.get("lost_spans"):
        whole = about["spans"] + lost
        enough = 2 << whole.bit_length()  # a team has an equal share, and of that a power of two
        more = f"; run.trace_spans={enough} keeps them all" if enough <= MAX_TRACE_SPANS else ""
        out.append(f"the trace has the last {about['spans']} of {whole} phase spans{more}")
    if lost := about.get("lost_decisions"):
        out.append(f"the trace lacks {lost} decisions: the host did not poll often enough")
    return out
