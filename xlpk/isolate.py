"""A point of a sweep in a process of its own: one that hangs, crashes or loses its device costs itself only.

A context that has met an error that stays, or a kernel that never ends, would take the other points of a sweep along.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

STOP_S = 15.0  # for a process that was asked to end


def run_isolated(cfg: DictConfig, folder: Path, facts: dict[str, Any], deadline_s: float) -> int:
    """Runs the point -> its exit code; the folder's status has the rest. After `deadline_s` it is ended, or killed."""
    import multiprocessing

    from xlpk import record

    process = multiprocessing.get_context("spawn").Process(target=_child, args=(cfg, folder, facts))
    process.start()
    why = f"no end after run.deadline_s={deadline_s:g}"
    try:
        process.join(deadline_s)
    except KeyboardInterrupt:
        process.join(STOP_S)  # the terminal told it too
        _end(process)
        raise
    late = process.is_alive()
    _end(process)
    code = process.exitcode or 0
    if not late and code >= 0:
        return code
    if not late:
        why = f"the process died by {signal.Signals(-code).name}"
    if late or record.read_json(folder / record.STATUS).get("status", "RUNNING") == "RUNNING":
        record.write_status(folder, "FAILED", 4, **{**facts, "error": why})
    print(f"xlpk: {why} ({folder.name})", file=sys.stderr, flush=True)
    return 4


def leave_if_lost(code: int) -> None:
    """Ends the process if it holds a device that it cannot free: the interpreter's end would wait for its kernel."""
    device = sys.modules.get("xlpk.backends.gpu_device")
    if device is not None and device.lost():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(process: Any) -> None:
    for ask in (process.terminate, process.kill):
        if not process.is_alive():
            return
        ask()
        process.join(STOP_S)


def _child(cfg: DictConfig, folder: Path, facts: dict[str, Any]) -> None:
    from xlpk import run

    run.child_point(cfg, folder, facts)
