"""The folder of a sweep: sweep.json says what was asked for, each folder beside it is a point.

SWEEP/sweep.json        uid, id, overrides, swept keys, number of points, where it was started
SWEEP/mlflow.json       the parent run, once a process has made it
SWEEP/mlflow_down.json  why MLflow was given up: no later point waits for it
SWEEP/sweep.csv         a row a point
SWEEP/0, SWEEP/1, ...   run folders (record.py)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from xlpk import record
from xlpk.errors import InputError

SWEEP, MLFLOW, DOWN, CSV, HYDRA = "sweep.json", "mlflow.json", "mlflow_down.json", "sweep.csv", "multirun.yaml"
FILES = (SWEEP, MLFLOW, DOWN, CSV, HYDRA)
LOCKS = (".lock", ".running")
REPETITION = "run.repetition"
# Keys of a command line that say how a sweep is carried out, not what a point measures.
ASIDE = (REPETITION, "run.resume", "run.sweep", "run.json", "run.report")
NOT_MEASURED = ("json", "outputs", "resume", "sweep", "repeat", "report", "deadline_s")  # of the group `run`
MAX_REPEAT = 10_000
QUIET_S = 900.0  # longer than a large model takes to load
ENDED = ("FINISHED", "FAILED", "REFUSED")
NAME = re.compile(r"[A-Za-z0-9_][\w.:+-]*(/[A-Za-z0-9_][\w.:+-]*)*")


def points_of(sweep: Path) -> list[Path]:
    """The folders of a sweep's points, in order."""
    found = [place for place in sweep.iterdir() if (place / record.STATUS).exists()] if sweep.is_dir() else []
    return sorted(found, key=lambda place: (len(place.name), place.name))


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP).exists()


def sweep_of(point: Path) -> Path | None:
    """The sweep that a run folder is a point of."""
    return point.parent if is_sweep(point.parent) else None


def read(sweep: Path) -> dict[str, Any]:
    return record.read_json(sweep / SWEEP)


def asked(overrides: Sequence[str]) -> list[str]:
    """Overrides without the keys that say how a sweep is carried out."""
    return [text for text in overrides if text.partition("=")[0].lstrip("+~") not in ASIDE]


def config_key(resolved: dict[str, Any]) -> str:
    """A digest of what a point measures: equal for a finished point and its repetition in a resumed sweep."""
    kept = {group: value for group, value in resolved.items() if group not in ("tracking", "hydra")}
    kept["run"] = {key: value for key, value in resolved.get("run", {}).items() if key not in NOT_MEASURED}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_repeat(repeat: int) -> None:
    if not 1 <= repeat <= MAX_REPEAT:
        raise InputError("run.repeat", repeat, f"1 to {MAX_REPEAT}")


def named(outputs: Path, name: str) -> Path:
    """The folder of `run.sweep=NAME`."""
    if not NAME.fullmatch(name):
        raise InputError("run.sweep", name, "a name of letters, digits and _ . : + -, or DATE/TIME-ID of a sweep")
    return outputs.resolve() / "sweeps" / name


def newest_like(outputs: Path, overrides: Sequence[str]) -> Path:
    """The last sweep that was asked for in the same words; the order of overrides is free."""
    wanted = sorted(asked(overrides))
    root = outputs.resolve() / "sweeps"
    found = [file for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/{SWEEP}")]
    starts = [
        (float(value.get("started_unix_s", 0)), file.parent) for file in found if (value := record.read_json(file))
    ]
    for _, folder in sorted(starts, reverse=True):
        if sorted(asked(read(folder).get("overrides", []))) == wanted:
            return folder
    where = f"a sweep of these overrides under {os.path.relpath(root)}, and there is none"
    raise InputError("run.resume", "true", f"{where}; name the sweep (run.sweep=NAME), or leave run.resume out")


@contextlib.contextmanager
def locked(sweep: Path, name: str = ".lock") -> Iterator[IO[str]]:
    """One process at a time."""
    with (sweep / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def hold(sweep: Path) -> IO[str]:
    """The lock of the process that runs the sweep, until it closes the file or dies."""
    file = (sweep / ".running").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError("run.sweep", os.path.relpath(sweep), "a sweep that no other process is running now") from None
    return file


def is_alive(folder: Path, status: dict[str, Any]) -> bool:
    """Whether the process that runs a point still does.

    One on another machine counts as dead when it has written nothing for QUIET_S.
    """
    if status.get("status") != "RUNNING":
        return False
    if status.get("host", socket.gethostname()) != socket.gethostname():
        written = [
            (folder / name).stat().st_mtime for name in (record.STATUS, record.EVENTS) if (folder / name).exists()
        ]
        return bool(written) and time.time() - max(written) < QUIET_S
    try:
        os.kill(int(status.get("pid", 0)) or os.getpid(), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def bury(sweep: Path) -> None:
    """Points whose process is gone without a word become FAILED."""
    for folder in points_of(sweep):
        status = record.read_json(folder / record.STATUS)
        if status.get("status") == "RUNNING" and not is_alive(folder, status):
            record.write_status(folder, "FAILED", 4, error="its process died without a word")


def claim(sweep: Path, offered: Path, key: str) -> tuple[Path, dict[str, Any]]:
    """The folder for a point of a resumed sweep, and the status that it has from before.

    `offered` is the folder by number. A grid that has changed gives known points other numbers, so a point is found by
    its config; one that is new takes the offered folder if no other point lies there.
    """
    if (known := _by_key(sweep).get(key)) is not None:
        if known != offered:
            with contextlib.suppress(OSError):
                offered.rmdir()
        return known, record.read_json(known / record.STATUS)
    while (offered / record.STATUS).exists():
        numbers = [int(place.name) for place in sweep.iterdir() if place.name.isdecimal()]
        offered = sweep / str(max([read(sweep).get("points") or 0, *(n + 1 for n in numbers)]))
        with contextlib.suppress(FileExistsError):
            offered.mkdir()
            break
    return offered, {}


@cache
def _by_key(sweep: Path) -> dict[str, Path]:
    """Points as they were when this process first looked; what it adds itself has other keys."""
    found = ((record.read_json(folder / record.STATUS).get("config_key"), folder) for folder in points_of(sweep))
    return {key: folder for key, folder in found if key}
