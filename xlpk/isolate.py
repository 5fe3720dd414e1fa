"""A point of a sweep in a process of its own: one that hangs, crashes or loses its device costs itself only.

A context that has met an error that stays, or a kernel that never ends, would take the other points of a sweep along.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

STOP_S = 15.0  # for a process that was asked to end


def run_isolated(cfg: DictConfig, folder: Path, facts: dict[str, Any], deadline_s: float) -> int:
    """Runs the point -> its exit code; the folder's status has the rest. After `deadline_s` it is ended, or killed."""
    with _turn(cfg):
        return _run_isolated(cfg, folder, facts, deadline_s)


@contextlib.contextmanager
def _turn(cfg: DictConfig) -> Iterator[None]:
    """Points on one device take turns, whatever launcher runs them side by side: each has it to itself."""
    visible = re.sub(r"\W", "_", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    outputs = Path(cfg.run.outputs)
    outputs.mkdir(parents=True, exist_ok=True)
    with (outputs / f".gpu-{socket.gethostname()}-{visible}-{cfg.backend.get('device', 0)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_isolated(cfg: DictConfig, folder: Path, facts: dict[str, Any], deadline_s: float) -> int:
    from xlpk import record

    # Not multiprocessing: within a worker of joblib its own start method is not one that a child knows.
    process = subprocess.Popen([sys.executable, "-m", "xlpk.isolate"], stdin=subprocess.PIPE)
    why, late = f"no end after run.deadline_s={deadline_s:g}", False
    try:
        process.communicate(pickle.dumps((cfg, folder, facts)), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        late = True
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)  # the terminal told it too
        _end(process)
        raise
    _end(process)
    code, status = process.returncode, record.read_json(folder / record.STATUS).get("status", "RUNNING")
    if not late and code >= 0 and status != "RUNNING":
        return code
    if not late:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        why = f"the process died {how}"
    if late or status == "RUNNING":
        record.write_status(folder, "FAILED", 4, **{"name": folder.name, **facts, "error": why})
    print(f"xlpk: {why} ({folder.name})", file=sys.stderr, flush=True)
    return 4


def leave_if_lost(code: int) -> None:
    """Ends the process if it holds a device that it cannot free: the interpreter's end would wait for its kernel."""
    device = sys.modules.get("xlpk.backends.gpu_device")
    if device is not None and device.lost():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(process: subprocess.Popen[bytes]) -> None:
    for ask in (process.terminate, process.kill):
        if process.poll() is not None:
            return
        ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


def _child() -> None:
    from xlpk import point

    point.child_point(*pickle.load(sys.stdin.buffer))


if __name__ == "__main__":
    _child()
